"""The compiled CUDA ops on a real GPU: a float64 reference, the CPU's bits, determinism, graphs, streams, poison."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megarubric.reward import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(not ops.cuda_architectures(), reason="CUDA ops not compiled"),
]

HEADER_WORDS, RUBRIC_WORDS, CRITERION_WORDS, PAIR_WORDS = 8, 12, 8, 4


def random_table(rng: np.random.Generator, n_rubrics: int) -> tuple[torch.Tensor, list[dict]]:
    """A packed table written by hand from csrc/rubric_table.h (no rubric files needed here), and what is in it."""
    rubrics = []
    for _ in range(n_rubrics):
        k, p = int(rng.integers(1, 24)), int(rng.integers(0, 9))
        theta, beta = rng.choice([0.0, 0.3, 0.7, 0.95], k), rng.choice([1e-4, 0.5, 3.0, 40.0], k)
        weight = np.where(rng.random(k) < 0.2, -0.5, rng.uniform(0.1, 2, k)) * (1 if rng.random() < 0.9 else -1)
        f32 = np.float32
        theta, beta, weight = f32(theta), f32(beta), f32(weight)
        rubrics.append(
            {
                "weight": weight,
                "theta": theta,
                "rate": beta / (f32(1) - theta) * f32(1.4426950408889634),
                "span": (f32(1) - theta) / beta,
                "beta": beta,
                "saturates": rng.random(k) < 0.6,
                "veto": rng.random(k) < 0.1,
                "tau": f32(rng.choice([0.25, 0.5], k)),
                "pairs": [
                    (
                        *map(int, rng.choice(k, 2, replace=False)),
                        int(rng.integers(0, 3)),
                        f32(rng.choice([0.5, -0.4, 1.5])),
                    )
                    for _ in range(p if k > 1 else 0)
                ],
                "shaped": rng.random() < 0.5,
                "kappa": f32(rng.choice([0.0, 0.6])),
                "alpha": f32(rng.choice([0.5, 4.0])),
                "power": f32(rng.choice([1.0, 2.0, 3.7])),
                "policy": int(rng.choice([0, 4, 8])),
                "veto_reward": f32(rng.choice([0.0, -0.5])),
            }
        )
    criteria_at = HEADER_WORDS + RUBRIC_WORDS * n_rubrics
    pairs_at = criteria_at + CRITERION_WORDS * sum(len(r["weight"]) for r in rubrics)
    words = pairs_at + PAIR_WORDS * sum(len(r["pairs"]) for r in rubrics)
    table = np.zeros(words, np.int32)
    real = table.view(np.float32)
    table[:5] = (0x4D525432, n_rubrics, 24, 8, words)
    for at, r in enumerate(rubrics):
        k = len(r["weight"])
        g1 = np.array([curve(1.0, r, c) for c in range(k)])
        r["g1"] = g1
        row = HEADER_WORDS + RUBRIC_WORDS * at
        flags = int(r["shaped"]) | 2 * bool((r["weight"] < 0).any()) | r["policy"]
        table[row : row + 5] = (k, len(r["pairs"]), criteria_at, pairs_at, flags)
        gain = r["alpha"] * (np.float32(1) - r["kappa"])
        real[row + 5 : row + 9] = (r["veto_reward"], r["kappa"], gain, r["power"])
        for c in range(k):
            detector = r["veto"][c] and r["weight"][c] < 0
            ceiling = max(r["weight"][c] * np.float32(g1[c]), np.float32(0))
            real[criteria_at : criteria_at + 6] = (
                *(r["weight"][c], ceiling, r["theta"][c], r["rate"][c], r["span"][c], r["tau"][c]),
            )
            table[criteria_at + 6] = int(r["saturates"][c]) | 2 * int(r["veto"][c]) | 4 * int(detector)
            criteria_at += CRITERION_WORDS
        for a, b, kind, w in r["pairs"]:
            best = (g1[a] * g1[b], min(g1[a], g1[b]), 0.0)[kind]
            table[pairs_at : pairs_at + 2] = (a | b << 16, kind)
            real[pairs_at + 2 : pairs_at + 4] = (w, max(w * np.float32(best), np.float32(0)))
            pairs_at += PAIR_WORDS
    return torch.from_numpy(table), rubrics


def curve(s: float, r: dict, c: int) -> float:
    theta, beta = float(r["theta"][c]), float(r["beta"][c])
    if not r["saturates"][c] or s <= theta:
        return s
    return theta - (1 - theta) * np.expm1(-beta * (s - theta) / (1 - theta)) / beta


def float64_reward(s: np.ndarray, judged: np.ndarray, r: dict) -> tuple[float | None, float]:
    """(reward or None, tolerance), the equations once more in float64."""
    g = {k: curve(float(s[k]), r, k) for k in range(len(s)) if judged[k]}
    w = r["weight"].astype(np.float64)
    terms = [w[k] * g[k] for k in g]
    best = [w[k] * r["g1"][k] for k in g if w[k] > 0]
    pair_terms = []
    for a, b, kind, weight in r["pairs"]:
        if a in g and b in g:
            pair_terms.append(float(weight) * (g[a] * g[b], min(g[a], g[b]), abs(g[a] - g[b]))[kind])
            if weight > 0:
                best.append(float(weight) * (r["g1"][a] * r["g1"][b], min(r["g1"][a], r["g1"][b]), 0.0)[kind])
    total, r0, condition = sum(best), None, 1.0
    if total > 0:
        r0 = min(1.0, max(0.0, (sum(terms) + sum(pair_terms)) / total))
        condition = max(1.0, sum(map(abs, terms + pair_terms)) / total)
    elif any(w[k] < 0 for k in g):
        r0 = min(1.0, max(0.0, 1 + sum(terms) / sum(abs(w[k]) for k in g)))
        condition = 2.0
    failed = missing = False
    for k in range(len(s)):
        if r["veto"][k]:
            if not judged[k]:
                failed, missing = failed or r["policy"] == 4, missing or r["policy"] == 8
            else:
                failed = failed or (s[k] >= r["tau"][k]) == (w[k] < 0)
    if failed:
        return float(r["veto_reward"]), 0.0
    if r0 is None or missing:
        return None, 0.0
    slope = 1.0
    if r["shaped"]:
        kappa, alpha, power = float(r["kappa"]), float(r["alpha"]), float(r["power"])
        t = max(0.0, (r0 - kappa) / (1 - kappa))
        r0, slope = (r0 + alpha * (1 - kappa) * t**power) / (1 + alpha * (1 - kappa)), 1 + alpha * power
    return r0, 2e-6 * condition * slope


def make_batch(seed: int, n: int, n_rubrics: int = 60) -> tuple[list[torch.Tensor], list[dict]]:
    rng = np.random.default_rng(seed)
    table, rubrics = random_table(rng, n_rubrics)
    index = np.repeat(rng.integers(0, n_rubrics, n // 8 + 1), 8)[:n].astype(np.int32)
    lengths = np.array([len(r["weight"]) for r in rubrics])[index]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    scores = rng.choice([0.0, 0.3, 0.7, 1.0, 2.0], offsets[-1])
    scores = np.where(scores > 1, rng.random(offsets[-1]), scores).astype(np.float32)
    mask = rng.random(offsets[-1]) > rng.choice([0.0, 0.3, 1.0], n, p=[0.5, 0.45, 0.05]).repeat(lengths)
    scores[~mask] = np.nan
    return [*map(torch.from_numpy, (scores, mask, offsets, index)), table], rubrics


def on_gpu(args: list[torch.Tensor]) -> list[torch.Tensor]:
    return [a.cuda() for a in args]


def bits(t: torch.Tensor) -> bytes:
    t = t.cpu()
    return (torch.nan_to_num(t, nan=-777.0) if t.is_floating_point() else t).numpy().tobytes()


def assert_same(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape and bits(x) == bits(y)


def poison(shapes: list[int]) -> None:
    """Leave the allocator's blocks full of nonsense."""
    blocks = [torch.full((n,), 1e30, device="cuda") for n in shapes for _ in range(8)]
    del blocks


@pytest.mark.parametrize("seed", range(3))
def test_against_float64(seed: int) -> None:
    args, rubrics = make_batch(seed, 4000)
    out = ops.aggregate(*on_gpu(args), attribution=True, max_pairs=8)
    scores, mask, offsets, index, _ = (a.numpy() for a in args)
    reward, valid = out.reward.cpu().numpy(), out.valid.cpu().numpy()
    for i in range(4000):
        row = slice(offsets[i], offsets[i + 1])
        want, tolerance = float64_reward(scores[row], mask[row], rubrics[index[i]])
        assert valid[i] == (want is not None)
        assert want is None or abs(reward[i] - want) <= max(tolerance, 1e-7 * abs(want))


@pytest.mark.parametrize("n", [1, 127, 128, 129, 5000, 100_000])
def test_the_cpu_bits(n: int) -> None:
    args, _ = make_batch(n, n)
    poison([n, n, args[0].numel()])
    assert_same(
        ops.aggregate(*on_gpu(args), attribution=True, max_pairs=8), ops.aggregate(*args, attribution=True, max_pairs=8)
    )
    assert_same(ops.aggregate(*on_gpu(args)), ops.aggregate(*args))
    shifted = on_gpu(args)
    shifted[0] = torch.cat([torch.zeros(1, device="cuda"), shifted[0]])[1:]
    assert_same(ops.aggregate(*shifted), ops.aggregate(*args))


def test_runs_and_splits_repeat_bit_for_bit() -> None:
    args, _ = make_batch(9, 20_000)
    gpu = on_gpu(args)
    first = ops.aggregate(*gpu, attribution=True, max_pairs=8)
    for _ in range(5):
        poison([20_000, gpu[0].numel()])
        assert_same(ops.aggregate(*gpu, attribution=True, max_pairs=8), first)
    scores, mask, offsets, index, table = gpu
    for cut in (1, 130, 7777):
        at = int(offsets[cut])
        parts = [
            ops.aggregate(scores[:at], mask[:at], offsets[: cut + 1], index[:cut], table),
            ops.aggregate(scores[at:], mask[at:], offsets[cut:] - at, index[cut:], table),
        ]
        assert bits(torch.cat([p.reward for p in parts])) == bits(first.reward)


def test_bad_scores_are_reported() -> None:
    args, _ = make_batch(3, 3000)
    at = int(torch.nonzero(args[1]).flatten()[500])
    args[0][at], args[3][1234] = float("inf"), 10_000
    assert_same(ops.aggregate(*on_gpu(args)), ops.aggregate(*args))
    assert ops.aggregate(*on_gpu(args)).bad.tolist() == [at, 1234]


def test_sweep() -> None:
    args, _ = make_batch(4, 3000)
    other = args[4].clone()
    row = HEADER_WORDS + 6  # kappa of the first rubric
    other.view(torch.float32)[row] = 0.123
    args[4] = torch.stack([args[4], other])
    assert_same(ops.sweep(*on_gpu(args)), ops.sweep(*args))


def test_group_advantages_bits() -> None:
    torch.manual_seed(0)
    rewards, valid, group = torch.rand(5000), torch.rand(5000) > 0.2, torch.randint(0, 500, (5000,))
    rewards[group == 3] = 0.1
    for mode in ("center", "standardize"):
        got = ops.group_advantages(rewards.cuda(), valid.cuda(), group.cuda(), 501, mode)
        assert_same(got, ops.group_advantages(rewards, valid, group, 501, mode))
    args = (torch.rand(5000, 6), torch.rand(5000, 6) > 0.3, group)
    got = ops.objective_wise(*(a.cuda() for a in args), 501, torch.ones(6).cuda())
    assert_same(got, ops.objective_wise(*args, 501, torch.ones(6)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1000, 1003, 151_936])
def test_tier_expectation(dtype: torch.dtype, vocabulary: int) -> None:
    torch.manual_seed(0)
    logits = (5 * torch.randn(33, vocabulary)).to(dtype)
    values, ids = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([4, 900, 2])
    got = ops.tier_expectation(logits.cuda(), values.cuda(), 1e-4, ids.cuda())
    again = ops.tier_expectation(logits.cuda(), values.cuda(), 1e-4, ids.cuda())
    assert_same(got, again)
    full = torch.log_softmax(logits.double(), -1)[:, ids]
    p = torch.softmax(full, -1)
    torch.testing.assert_close(got[0].cpu().double(), (p * values).sum(-1), rtol=2e-6, atol=0)
    torch.testing.assert_close(got[2].cpu().double(), full.exp().sum(-1), rtol=2e-6, atol=0)
    gathered = full.to(dtype)
    assert_same(ops.tier_expectation(gathered.cuda(), values.cuda(), 0.2), ops.tier_expectation(gathered, values, 0.2))


def test_cuda_graph_and_streams() -> None:
    args, _ = make_batch(5, 4096)
    gpu = on_gpu(args)
    want = ops.aggregate(*gpu)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            ops.aggregate(*gpu)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.aggregate(*gpu)
        advantages = torch.ops.megarubric.group_advantages(
            captured.reward, captured.valid, torch.arange(0, 4097, 8, device="cuda"), None, True
        )
    for tensor in captured[:1]:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, want)
    assert advantages[0].shape == (4096,)
    # Work queued on another stream is ordered by that stream alone.
    with torch.cuda.stream(side):
        slow = torch.rand(4000, 4000, device="cuda")
        scores = gpu[0].clone()
        scores.nan_to_num_(0.5).mul_((slow @ slow).sum() * 0 + 0.5)
        halved = ops.aggregate(scores, None, *gpu[2:])
    side.synchronize()
    assert bits(halved.reward) == bits(ops.aggregate(args[0].nan_to_num(0.5) * 0.5, None, *args[2:]).reward)


def test_torch_compile() -> None:
    args, _ = make_batch(6, 256)
    gpu = on_gpu(args)
    compiled = torch.compile(lambda *a: ops.aggregate(*a).reward * 2, fullgraph=True)
    assert bits(compiled(*gpu)) == bits(ops.aggregate(*gpu).reward * 2)
