"""The one loss against each paper's own form, written the slow way in float64; log-probabilities against softmax."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megarubric.errors import BadInput
from megarubric.megatron.logprob import token_logprobs
from megarubric.megatron.loss import LossSums, TokenInputs, kl_estimate, policy_loss
from megarubric.megatron.messages import LossSettings
from megarubric.recipe.algorithms import ALGORITHMS, algorithm

MAX_NEW = 16


class Answers:
    """A few sequences of prompt and answer tokens with random log-probabilities, as lists and as flat arrays."""

    def __init__(self, seed: int, spread: float = 0.3) -> None:
        rng = np.random.default_rng(seed)
        self.prompt = rng.integers(1, 4, size=6)
        self.answer = rng.integers(1, MAX_NEW, size=6)
        self.lengths = (self.prompt + self.answer).astype(np.int32)
        n = int(self.lengths.sum())
        self.now = torch.tensor(-rng.exponential(2.0, n), requires_grad=True)
        self.old = self.now.detach() + torch.tensor(rng.normal(0, spread, n))
        self.rollout = self.old + torch.tensor(rng.normal(0, spread, n))
        self.ref = self.now.detach() + torch.tensor(rng.normal(0, spread, n))
        self.entropy = torch.tensor(rng.exponential(1.0, n), requires_grad=True)
        self.advantage = rng.normal(size=6)
        self.mask = np.concatenate([[0.0] * p + [1.0] * a for p, a in zip(self.prompt, self.answer)]).astype(np.float32)
        self.starts = np.cumsum(self.lengths) - self.lengths

    def answers(self):
        """(advantage, slice of the answer's tokens) of each sequence."""
        for k in range(6):
            first = int(self.starts[k] + self.prompt[k])
            yield float(self.advantage[k]), slice(first, first + int(self.answer[k]))

    def inputs(self, name: str, **present) -> TokenInputs:
        weights = algorithm(name).token_weights(self.mask, self.lengths, MAX_NEW)
        return TokenInputs(
            mask=torch.from_numpy(self.mask).double(),
            weights=torch.from_numpy(weights).double(),
            advantages=torch.from_numpy(np.repeat(self.advantage, self.lengths)),
            segment=torch.from_numpy(np.repeat(np.arange(6), self.lengths)),
            n_sequences=6,
            **present,
        )


def grpo(a: Answers, low=0.2, high=0.2):  # arXiv 2402.03300, eq. 3: mean over answers of the mean over tokens
    total = 0.0
    for advantage, tokens in a.answers():
        r = torch.exp(a.now[tokens] - a.old[tokens])
        total = total + torch.min(r * advantage, torch.clip(r, 1 - low, 1 + high) * advantage).mean()
    return -total / 6


def dr_grpo(a: Answers):  # arXiv 2503.20783: no length normalisation, a constant instead
    total = 0.0
    for advantage, tokens in a.answers():
        r = torch.exp(a.now[tokens] - a.old[tokens])
        total = total + torch.min(r * advantage, torch.clip(r, 0.8, 1.2) * advantage).sum() / MAX_NEW
    return -total / 6


def dapo(a: Answers):  # arXiv 2503.14476, eq. 8: token mean over all answers, wider upper clip
    total = 0.0
    for advantage, tokens in a.answers():
        r = torch.exp(a.now[tokens] - a.old[tokens])
        total = total + torch.min(r * advantage, torch.clip(r, 0.8, 1.28) * advantage).sum()
    return -total / int(a.answer.sum())


def gspo(a: Answers):  # arXiv 2507.18071, eqs. 5-7, differentiated as written: through the sequence ratio
    total = 0.0
    for advantage, tokens in a.answers():
        s = torch.exp((a.now[tokens] - a.old[tokens]).mean())
        total = total + torch.min(s * advantage, torch.clip(s, 1 - 3e-4, 1 + 4e-4) * advantage)
    return -total / 6


def cispo(a: Answers):  # arXiv 2506.13585, eq. 4 with the clipped weight held constant
    total = 0.0
    for advantage, tokens in a.answers():
        r = torch.exp(a.now[tokens] - a.old[tokens]).detach().clip(max=5.0)
        total = total + (r * advantage * a.now[tokens]).sum()
    return -total / int(a.answer.sum())


def sft(a: Answers):
    return -torch.cat([a.now[tokens] for _, tokens in a.answers()]).mean()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [0.01, 0.5, 2.0])
@pytest.mark.parametrize("paper", [grpo, dr_grpo, dapo, gspo, cispo, sft], ids=lambda f: f.__name__)
def test_each_algorithm_equals_its_paper(paper, spread, seed):
    a = Answers(seed, spread)
    if paper is sft:
        a.advantage[:] = 1.0
    expected = paper(a)
    (expected_grad,) = torch.autograd.grad(expected, a.now)
    # weights are float32 by contract, so equality holds to their rounding
    loss, sums = policy_loss(
        a.now, a.entropy, a.inputs(paper.__name__, old=a.old), algorithm(paper.__name__).settings()
    )
    (grad,) = torch.autograd.grad(loss, a.now)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-7)
    assert torch.allclose(grad, expected_grad, rtol=1e-6, atol=1e-9)
    assert sums.tokens.item() == a.answer.sum()


def test_clip_higher_is_the_only_difference_of_an_upward_ratio():
    a = Answers(3, 1.0)
    low_high = algorithm("grpo").settings(clip_low=0.1, clip_high=0.4)
    loss, _ = policy_loss(a.now, a.entropy, a.inputs("grpo", old=a.old), low_high)
    assert loss.item() == pytest.approx(grpo(a, 0.1, 0.4).item(), rel=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_to_the_reference_is_added_with_the_policy_weights(estimator):
    a = Answers(1)
    without, _ = policy_loss(a.now, a.entropy, a.inputs("grpo", old=a.old), algorithm("grpo").settings())
    settings = algorithm("grpo").settings(kl_coef=0.3, kl_estimator=estimator)
    loss, sums = policy_loss(a.now, a.entropy, a.inputs("grpo", old=a.old, ref=a.ref), settings)
    kl = 0.0
    per_token = []
    for _, tokens in a.answers():
        log_r = a.ref[tokens] - a.now[tokens]
        each = {"k1": -log_r, "k2": log_r**2 / 2, "k3": log_r.exp() - log_r - 1}[estimator]
        kl = kl + each.mean() / 6
        per_token.append(each)
    assert (loss - without).item() == pytest.approx(0.3 * kl.item(), rel=1e-6)
    assert sums.kl_ref.item() == pytest.approx(torch.cat(per_token).sum().item(), rel=1e-9)
    (grad,) = torch.autograd.grad(loss - without, a.now)
    (expected,) = torch.autograd.grad(0.3 * kl, a.now)
    assert torch.allclose(grad, expected, rtol=1e-5, atol=1e-9)


def test_kl_estimators_agree_on_the_expectation():
    """E over the policy's own samples of k1 and k3 is the KL itself, exactly, when summed over the vocabulary."""
    rng = torch.Generator().manual_seed(0)
    p, q = (torch.softmax(torch.randn(50, generator=rng, dtype=torch.float64), 0) for _ in range(2))
    kl = (p * (p / q).log()).sum()
    for estimator in ("k1", "k3"):
        assert (p * kl_estimate((q / p).log(), estimator)).sum().item() == pytest.approx(kl.item(), rel=1e-12)


@pytest.mark.parametrize("cap", [0.0, 0.9, 2.0])
def test_truncated_importance_sampling_multiplies_the_surrogate_only(cap):
    a = Answers(2, 0.7)
    settings = algorithm("dapo").settings(tis_cap=cap, kl_coef=0.1)
    loss, sums = policy_loss(a.now, a.entropy, a.inputs("dapo", old=a.old, rollout=a.rollout, ref=a.ref), settings)
    expected, truncated, n = 0.0, 0, int(a.answer.sum())
    for advantage, tokens in a.answers():
        r = torch.exp(a.now[tokens] - a.old[tokens])
        tis = torch.exp(a.old[tokens] - a.rollout[tokens])
        truncated += int((tis > cap).sum()) if cap else 0
        tis = tis.clip(max=cap) if cap else torch.ones_like(tis)
        expected = expected - (tis * torch.min(r * advantage, r.clip(0.8, 1.28) * advantage)).sum() / n
        log_r = a.ref[tokens] - a.now[tokens]
        expected = expected + 0.1 * (log_r.exp() - log_r - 1).sum() / n
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums.tis_clipped.item() == truncated
    assert sums.logprob_abs_diff.item() == pytest.approx(
        sum((a.old[t] - a.rollout[t]).abs().sum().item() for _, t in a.answers())
    )


def test_drift_is_measured_on_fresh_tokens_alone():
    a = Answers(4, 0.5)
    fresh = torch.from_numpy(np.repeat([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], a.lengths))
    settings = algorithm("grpo").settings(tis_cap=2.0)
    whole, all_fresh = policy_loss(a.now, a.entropy, a.inputs("grpo", old=a.old, rollout=a.rollout), settings)
    loss, sums = policy_loss(a.now, a.entropy, a.inputs("grpo", old=a.old, rollout=a.rollout, fresh=fresh), settings)
    gaps = [(a.old[t] - a.rollout[t]).abs() for k, (_, t) in enumerate(a.answers()) if k not in (1, 4)]
    assert sums.logprob_abs_diff.item() == pytest.approx(sum(g.sum().item() for g in gaps))
    assert sums.max_logprob_diff.item() == pytest.approx(max(g.max().item() for g in gaps))
    assert sums.fresh.item() == sum(len(g) for g in gaps) < all_fresh.fresh.item() == a.answer.sum()
    assert loss.item() == whole.item() and sums.tis.item() == all_fresh.tis.item()


@pytest.mark.parametrize(("below", "above"), [(0.0, 0.0), (0.99, 0.0), (0.0, 1.05), (0.99, 1.1)])
def test_masked_tokens_and_rejected_sequences_have_no_weight(below, above):
    a = Answers(9, 0.4)
    settings = algorithm("grpo").settings(tis_cap=1.5, tis_mode="mask", reject_below=below, reject_above=above)
    loss, sums = policy_loss(a.now, a.entropy, a.inputs("grpo", old=a.old, rollout=a.rollout), settings)
    expected, cut, rejected = 0.0, 0, 0
    for advantage, tokens in a.answers():
        rho = torch.exp(a.old[tokens] - a.rollout[tokens])
        outside = (rho > 1.5) | (rho < 1 / 1.5)
        cut += int(outside.sum())
        geometric = math.exp(rho.log().mean().item())
        if geometric < below or (above and geometric > above):
            rejected += len(rho)
            continue
        r = torch.exp(a.now[tokens] - a.old[tokens])
        surrogate = torch.min(r * advantage, r.clip(0.8, 1.2) * advantage)
        expected = expected - (torch.where(outside, 0.0, rho) * surrogate).mean() / 6
    assert loss.item() == pytest.approx(float(expected), rel=1e-6)
    assert (sums.tis_clipped.item(), sums.rejected.item()) == (cut, rejected)
    assert cut > 0 and (rejected > 0 or not (below or above))
    (grad,) = torch.autograd.grad(loss, a.now)
    (wanted,) = torch.autograd.grad(expected, a.now)
    assert torch.allclose(grad, wanted, rtol=1e-5, atol=1e-9)


def test_entropy_bonus_lowers_the_loss_by_its_weighted_mean():
    a = Answers(4)
    base, _ = policy_loss(a.now, a.entropy, a.inputs("dapo", old=a.old), algorithm("dapo").settings())
    loss, _ = policy_loss(a.now, a.entropy, a.inputs("dapo", old=a.old), algorithm("dapo").settings(entropy_coef=0.5))
    mean = torch.cat([a.entropy[t] for _, t in a.answers()]).mean()
    assert (base - loss).item() == pytest.approx(0.5 * mean.item(), rel=1e-6)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_on_policy_ratio_is_exactly_one_and_kl_exactly_zero(name):
    a = Answers(5)
    for old in (None, a.now.detach()):
        _, sums = policy_loss(a.now, a.entropy, a.inputs(name, old=old), algorithm(name).settings())
        assert sums.kl.item() == 0.0 and sums.max_ratio_deviation.item() == 0.0 and sums.clipped.item() == 0


def test_masked_tokens_and_far_ratios_never_poison_the_loss():
    a = Answers(6)
    with torch.no_grad():
        a.now[a.mask == 0] = -torch.finfo(torch.float64).max  # a prompt token may be next to impossible
        a.old[np.flatnonzero(a.mask)[0]] = a.now[np.flatnonzero(a.mask)[0]] - 500.0
    for name in ALGORITHMS:
        loss, sums = policy_loss(a.now, a.entropy, a.inputs(name, old=a.old), algorithm(name).settings(kl_coef=0.1))
        (grad,) = torch.autograd.grad(loss, a.now)
        assert math.isfinite(loss.item()) and torch.isfinite(grad).all() and torch.isfinite(sums.vector()).all()
        assert (grad[a.mask == 0] == 0).all()


def test_weights_are_normalised_for_each_optimizer_step():
    a = Answers(7)
    updates = np.array([0, 0, 1, 1, 1, 0], dtype=np.int32)
    for name in ("grpo", "dapo", "gspo", "cispo", "sft"):
        weights = algorithm(name).token_weights(a.mask, a.lengths, MAX_NEW, updates)
        assert weights.dtype == np.float32 and (weights[a.mask == 0] == 0).all()
        per_sequence = np.add.reduceat(weights, a.starts)
        for u in (0, 1):
            assert per_sequence[updates == u].sum() == pytest.approx(1.0, rel=1e-6)


def test_a_sequence_without_trained_tokens_does_not_count():
    mask = np.array([0, 1, 1, 0, 0, 0, 1], dtype=np.float32)
    lengths = np.array([3, 2, 2], dtype=np.int32)
    weights = algorithm("grpo").token_weights(mask, lengths, 8)
    assert list(weights) == [0, 0.25, 0.25, 0, 0, 0, 0.5]


def test_unknown_names_are_refused_in_one_line():
    with pytest.raises(BadInput, match=r"^config: algorithm.name: 'ppo' is none of grpo, dr_grpo"):
        algorithm("ppo")
    with pytest.raises(Exception, match="k4"):
        algorithm("grpo").settings(kl_estimator="k4")


def test_sums_are_ordered_as_their_names():
    a = Answers(8)
    _, sums = policy_loss(a.now, a.entropy, a.inputs("grpo", old=a.old), LossSettings())
    assert dict(zip(LossSums.names(), sums.vector().tolist()))["tokens"] == a.answer.sum()


# Log-probabilities from logits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reuse", [False, True])
def test_token_logprobs_equal_log_softmax(temperature, dtype, reuse, monkeypatch):
    monkeypatch.setattr("megarubric.megatron.logprob.CHUNK_ELEMENTS", 64 * 7)  # several ragged chunks
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(50, 70, generator=g) * 3).to(dtype).requires_grad_()
    targets = torch.randint(0, 64, (50,), generator=g)
    d_logp, d_entropy = torch.randn(50, generator=g), torch.randn(50, generator=g)

    reference = logits.detach().double()[:, :64].requires_grad_()  # columns 64.. are padding
    logp = torch.log_softmax(reference / temperature, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    picked = logp.gather(1, targets[:, None]).squeeze(1)
    ((picked * d_logp).sum() + (entropy * d_entropy).sum()).backward()

    ours, our_entropy = token_logprobs(
        logits.clone(), targets, vocab_size=64, temperature=temperature, reuse_logits=reuse
    )
    assert ours.dtype == torch.float32
    assert torch.allclose(ours.double(), picked, atol=2e-6, rtol=1e-6)
    assert torch.allclose(our_entropy.double(), entropy, atol=2e-6, rtol=1e-6)
    ((ours * d_logp).sum() + (our_entropy * d_entropy).sum()).backward()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert torch.allclose(logits.grad[:, :64].double(), reference.grad, atol=tolerance, rtol=tolerance)
    assert (logits.grad[:, 64:] == 0).all()


def test_token_logprobs_hold_for_extreme_logits():
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4], [88.0, 89.0, 90.0]])
    logp, entropy = token_logprobs(logits, torch.tensor([0, 1, 2]), vocab_size=3)
    assert torch.isfinite(logp).all() and torch.isfinite(entropy).all()
    assert logp[0].item() == 0.0 and logp[1].item() == pytest.approx(-math.log(3)) and entropy[0].item() == 0.0


def test_token_logprobs_gradient_by_finite_differences(monkeypatch):
    monkeypatch.setattr("megarubric.megatron.logprob.CHUNK_ELEMENTS", 16)
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 5, generator=g).requires_grad_()
    targets = torch.randint(0, 5, (6,), generator=g)

    def f(x):
        logp, entropy = token_logprobs(x, targets, vocab_size=5, temperature=0.8)
        return logp, entropy

    assert torch.autograd.gradcheck(f, (logits,), eps=1e-2, atol=2e-3, rtol=2e-2, nondet_tol=0.0)


def test_log_probabilities_never_hold_the_vocabulary_in_full_precision():
    """At Qwen3's vocabulary, in a process of its own: less memory than one [P, V] float32, gradient included."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(root / "benchmarks/logprob.py"), "--one", "in place", "--positions", "1024"]
    out = subprocess.run([*command, "--dtype", "bfloat16"], check=True, capture_output=True, text=True)
    assert json.loads(out.stdout)["bytes"] < 1024 * 151_936 * 4 // 2
