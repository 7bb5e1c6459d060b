"""From a judge's distribution over tier tokens to a value: the expectation, not the most likely tier."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megarubric.errors import BadInput

DEFAULT_MIN_TIER_MASS = 0.5


class TierReading(NamedTuple):
    """`value`: expected tier value; `entropy`: of the restricted distribution, in nats; `mass`: sum of the tier tokens'
    unrestricted probabilities; `read`: False where the judgement is to be masked. All [...]."""

    value: NDArray[np.float32]
    entropy: NDArray[np.float32]
    mass: NDArray[np.float32]
    read: NDArray[np.bool_]


def tier_expectation(
    logprobs: ArrayLike, values: ArrayLike, min_tier_mass: float = DEFAULT_MIN_TIER_MASS
) -> TierReading:
    """Expected tier value under p_t = exp(l_t) / sum_u exp(l_u).

    Args:
        logprobs: [..., T], the judge's unrestricted log-probabilities of the T tier tokens; -inf is a token the
            engine did not report.
        values: [T], the tiers' values in the same order.
        min_tier_mass: a total probability below this leaves the judgement unread: the judge was about to say
            something else. Unread is masked, never 0.

    Returns:
        `TierReading` of shape [...]. Where no tier has any probability, value and entropy are NaN and `read` is False.

    Raises:
        BadInput: shapes that do not fit, NaN, or a total probability above 1 (these are logits, not log-probabilities).
    """
    l = np.asarray(logprobs, dtype=np.float64)  # noqa: E741  (the contract's letter)
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 1 or l.ndim < 1 or l.shape[-1] != v.shape[0] or v.size == 0:
        raise BadInput("tier_expectation", "logprobs", f"have shape {l.shape} for {v.shape} tier values")
    if np.isnan(l).any():
        raise BadInput("tier_expectation", "logprobs", "hold NaN")
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        mass = np.exp(l).sum(axis=-1)
        if (mass > 1.02).any():  # bf16 log-probabilities may sum to a little above 1
            raise BadInput("tier_expectation", "logprobs", f"give a total probability of {mass.max():g}: logits?")
        top = l.max(axis=-1, keepdims=True)
        unnormalised = np.exp(l - np.where(np.isfinite(top), top, 0.0))
        z = unnormalised.sum(axis=-1, keepdims=True)
        p = unnormalised / z
        value = (p * v).sum(axis=-1)
        entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(axis=-1)
    dead = z[..., 0] == 0
    value, entropy = np.where(dead, np.nan, value), np.where(dead, np.nan, entropy)
    # `mass` is compared before rounding so that the reference and a float32 engine agree on everything but exact ties.
    return TierReading(
        value.astype(np.float32),
        entropy.astype(np.float32) + np.float32(0),
        mass.astype(np.float32),
        np.asarray((mass >= min_tier_mass) & ~dead),
    )
