"""The one loss. GRPO, Dr. GRPO, DAPO, GSPO, CISPO, REINFORCE and SFT are settings of it plus token weights.

For tokens t that are trained on (mask m_t), with weights w_t that carry all normalisation, advantage A_t, and

    r_t   = exp(logp_t - old_t)                              ratio "token"
          = exp(mean over the sequence's tokens of (logp - old))   ratio "sequence" (GSPO, arXiv 2507.18071, eq. 7)
    tis_t = min(rho_t, cap), rho_t = exp(old_t - rollout_t)    truncated importance sampling (a constant), 1 when off
          = rho_t where 1/cap <= rho_t <= cap, else 0          mode "mask" (IcePop, arXiv 2510.18855)
          = 0 for a whole sequence whose geometric mean of rho is outside [reject_below, reject_above]

    loss = - sum_t m_t w_t tis_t J_t  +  kl_coef sum_t m_t w_t KL_t  -  entropy_coef sum_t m_t w_t H_t

    J_t = min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)      "clip": PPO/GRPO; DAPO widens clip_high
        = sg(clip(r_t, 1 - clip_low, 1 + clip_high)) A_t logp_t         "detached_clip": CISPO (arXiv 2506.13585, eq. 4)
        = A_t logp_t                                                    "logprob": REINFORCE; with A = 1, SFT

KL_t estimates KL(policy || reference) from the token at hand, with d = ref_t - logp_t: k1 = -d, k2 = d^2 / 2,
k3 = exp(d) - 1 - d. Its gradient is the estimator's own (for k1 that is zero in expectation; use it to observe).

The sequence ratio is differentiated in the form of GSPO's eq. 13, sg(r) * exp(logp_t - sg(logp_t)) for each token: its
gradient summed over a sequence is that of the sequence ratio, and it needs no reduction in backward.

Everything here is a pure function of tensors, float32 or float64, on any device.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from megarubric.megatron.messages import LossSettings

LOG_RATIO_LIMIT = 20.0  # exp of more would overflow into inf * 0; a token that far off is clipped in any case


@dataclass(frozen=True)
class TokenInputs:
    """What the loss knows about P tokens besides the model's output: float [P] each, constants.

    mask is 1 on trained tokens, else 0 (there all other values only have to be finite). segment int64[P] numbers the
    sequences 0..n_sequences-1 (n_sequences itself for padding); only ratio "sequence" reads it.
    old / rollout / ref: log-probabilities of the policy before this batch's updates (None: the present ones, detached),
    of the engine that sampled (None: no importance correction), of the reference (None: no KL). fresh is 1 where the
    engine had the same weights as the trainer has (None: everywhere), so that what differs there is drift.
    """

    mask: Tensor
    weights: Tensor
    advantages: Tensor
    segment: Tensor
    n_sequences: int
    old: Tensor | None = None
    rollout: Tensor | None = None
    ref: Tensor | None = None
    fresh: Tensor | None = None


@dataclass(frozen=True)
class LossSums:
    """Sums over trained tokens of one call (float64 scalars), to be added up over micro-batches and ranks.

    `UpdateMetrics` says what they become; the three `max_` entries are maxima, not sums.
    """

    loss: Tensor
    tokens: Tensor
    kl: Tensor
    kl_ref: Tensor
    entropy: Tensor
    fresh: Tensor
    logprob_abs_diff: Tensor
    clipped: Tensor
    tis: Tensor
    tis_clipped: Tensor
    rejected: Tensor
    max_logprob_diff: Tensor
    max_ratio_deviation: Tensor

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in fields(cls)]

    def vector(self) -> Tensor:
        """float64[len(names)] in the order of `names`."""
        return torch.stack([getattr(self, name) for name in self.names()])


def policy_loss(
    logprobs: Tensor,
    entropy: Tensor,
    inputs: TokenInputs,
    settings: LossSettings,
    sequence_sum: SequenceSum | None = None,
) -> tuple[Tensor, LossSums]:
    """The loss of P tokens (a sum, scalar, differentiable in `logprobs` and `entropy`) and its statistics.

    logprobs, entropy: float[P] of the policy for the tokens. `sequence_sum` adds per-sequence sums over the ranks that
    hold parts of the same sequences (context parallelism); by default a rank holds whole sequences.
    """
    m = inputs.mask
    now = logprobs.detach()
    old = now if inputs.old is None else inputs.old
    log_ratio = torch.where(m > 0, logprobs - old, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if settings.ratio == "sequence":
        mean = _sequence_mean(log_ratio.detach(), inputs, sequence_sum)
        log_ratio = mean + (logprobs - now)
    ratio = log_ratio.exp()

    clipped_ratio = ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    if settings.surrogate == "clip":
        surrogate = torch.minimum(ratio * inputs.advantages, clipped_ratio * inputs.advantages)
        clipped = ratio.detach() * inputs.advantages > surrogate.detach()
    elif settings.surrogate == "detached_clip":
        surrogate = clipped_ratio.detach() * inputs.advantages * logprobs
        clipped = clipped_ratio.detach() != ratio.detach()
    elif settings.surrogate == "logprob":
        surrogate = inputs.advantages * logprobs
        clipped = torch.zeros_like(now, dtype=torch.bool)
    else:
        raise ValueError(f"unknown surrogate {settings.surrogate!r}")

    engine_gap = torch.zeros_like(now) if inputs.rollout is None else torch.where(m > 0, old - inputs.rollout, 0.0)
    tis, tis_clipped, rejected = _importance(engine_gap, inputs, settings, sequence_sum)
    mw = m * inputs.weights
    loss = -(mw * tis * torch.where(m > 0, surrogate, 0.0)).sum()

    kl_ref = torch.zeros_like(now)
    if inputs.ref is not None:
        kl = kl_estimate(torch.where(m > 0, inputs.ref - logprobs, 0.0), settings.kl_estimator)
        kl_ref = kl.detach()
        if settings.kl_coef != 0:
            loss = loss + settings.kl_coef * (mw * kl).sum()
    if settings.entropy_coef != 0:
        loss = loss - settings.entropy_coef * (mw * entropy).sum()

    def total(x: Tensor) -> Tensor:
        return (m.double() * x.double()).sum()

    fresh = m if inputs.fresh is None else m * inputs.fresh
    fresh_gap = torch.where(fresh > 0, engine_gap, 0.0).abs()
    drift = torch.where(m > 0, old - now, 0.0)  # k3 of KL(policy || old): d = old - policy
    sums = LossSums(
        loss=loss.detach().double(),
        tokens=m.double().sum(),
        kl=total(kl_estimate(drift, "k3")),
        kl_ref=total(kl_ref),
        entropy=total(entropy.detach()),
        fresh=fresh.double().sum(),
        logprob_abs_diff=total(fresh_gap),
        clipped=total(clipped),
        tis=total(tis),
        tis_clipped=total(tis_clipped),
        rejected=total(rejected),
        max_logprob_diff=fresh_gap.amax().double(),
        max_ratio_deviation=(m * (ratio.detach() - 1.0)).abs().amax().double(),
    )
    return loss, sums


def _importance(
    log_rho: Tensor, inputs: TokenInputs, settings: LossSettings, sequence_sum: SequenceSum | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the mismatch of trainer and engine makes of a token's weight, and which tokens were cut off or rejected.

    log_rho: float[P] log-probability by the trainer's old policy minus by the engine, constant, 0 where not trained.
    """
    weight, cut = torch.ones_like(log_rho), torch.zeros_like(log_rho, dtype=torch.bool)
    rejected = torch.zeros_like(cut)
    if settings.tis_cap > 0:
        rho = log_rho.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        if settings.tis_mode == "mask":
            cut = (rho > settings.tis_cap) | (rho < 1.0 / settings.tis_cap)
            weight = torch.where(cut, 0.0, rho)
        else:
            weight = rho.clamp(max=settings.tis_cap)
            cut = weight < rho
    if settings.reject_below > 0 or settings.reject_above > 0:
        mean = _sequence_mean(log_rho, inputs, sequence_sum).exp()
        rejected = mean < settings.reject_below
        if settings.reject_above > 0:
            rejected = rejected | (mean > settings.reject_above)
        weight = torch.where(rejected, 0.0, weight)
    return weight, cut, rejected


def kl_estimate(log_ratio: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || other) from d = log other - log policy.

    The three estimators of J. Schulman, "Approximating KL divergence" (2020).

    Raises ValueError for an estimator other than k1, k2, k3.
    """
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        return torch.expm1(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)) - log_ratio
    raise ValueError(f"unknown KL estimator {estimator!r}")


class SequenceSum(Protocol):
    """Adds float[2, n] per-sequence sums over the ranks that share the sequences."""

    def __call__(self, sums: Tensor) -> Tensor: ...


def _sequence_mean(x: Tensor, inputs: TokenInputs, sequence_sum: SequenceSum | None) -> Tensor:
    """Mean of `x` over each sequence's trained tokens, spread back to the tokens; 0 for a sequence without any."""
    sums = x.new_zeros((2, inputs.n_sequences + 1))  # the last column collects padding
    sums[0].index_add_(0, inputs.segment, x * inputs.mask)
    sums[1].index_add_(0, inputs.segment, inputs.mask)
    if sequence_sum is not None:
        sums = sequence_sum(sums)
    return (sums[0] / sums[1].clamp(min=1.0))[inputs.segment]
