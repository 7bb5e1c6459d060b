"""Offline data filtering, the pure part: which prompts lie in the central part of the score distribution.

A prompt's score is the mean reward over its valid answers. The distribution is that of the scores of all scored
prompts, or of those of one family. Quantile q of n sorted scores x[0..n-1] is the linear interpolation at place
q * (n - 1): with i = floor(q * (n - 1)) and f = q * (n - 1) - i it is x[i] + f * (x[i + 1] - x[i]) (Hyndman and Fan's
type 7, numpy's default). Both ends belong to the central part, so that of equal scores all are inside or all outside.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal

import msgspec

from megarubric.config.schema import Filter

Reason = Literal["central", "too hard", "too easy", "no spread", "unscored", "unusable"]
REASONS: tuple[Reason, ...] = ("central", "too hard", "too easy", "no spread", "unscored", "unusable")


class PromptScore(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one prompt: `rewards[i]` belongs to answer i, None where that answer is unscored."""

    id: str
    family: str | None = None
    rewards: tuple[float | None, ...] = ()

    @property
    def valid(self) -> list[float]:
        """The rewards of the valid answers."""
        return [r for r in self.rewards if r is not None]

    @property
    def score(self) -> float | None:
        """Mean reward of the valid answers; None when there is none, never 0."""
        return math.fsum(self.valid) / len(self.valid) if self.valid else None

    @property
    def std(self) -> float | None:
        """Population standard deviation over the valid answers; None when there is none."""
        mean = self.score
        if mean is None:
            return None
        return math.sqrt(math.fsum((r - mean) ** 2 for r in self.valid) / len(self.valid))


class Bounds(msgspec.Struct, frozen=True):
    """The central part of one distribution of `scored` prompts: scores from `low` to `high`, both included."""

    low: float
    high: float
    scored: int


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a prompt is kept, and why. `bounds` is None when its distribution holds no score."""

    id: str
    kept: bool
    reason: Reason
    score: float | None
    std: float | None
    bounds: Bounds | None


def quantile(values: Sequence[float], q: float) -> float:
    """Quantile `q` in [0, 1] of `values`, as defined above. Raises ValueError for no values or another q."""
    if not values or not 0 <= q <= 1:
        raise ValueError(f"no quantile {q} of {len(values)} values")
    x = sorted(values)
    place = q * (len(x) - 1)
    i = math.floor(place)
    if i + 1 >= len(x) or x[i] == x[i + 1]:
        return x[i]
    return min(x[i] + (place - i) * (x[i + 1] - x[i]), x[i + 1])


def bounds_of(prompts: Sequence[PromptScore], f: Filter) -> dict[str, Bounds]:
    """The central part of each distribution, by family (`f.by` family; prompts without one are "none") or of "all"."""
    scores: defaultdict[str, list[float]] = defaultdict(list)
    for p in prompts:
        if p.score is not None:
            scores[_distribution(p, f)].append(p.score)
    return {name: Bounds(quantile(x, f.low), quantile(x, f.high), len(x)) for name, x in sorted(scores.items())}


def decide(prompts: Sequence[PromptScore], f: Filter) -> list[Decision]:
    """One decision a prompt, in order. It depends on the set of prompts, not on their order.

    The first reason that holds is given: no valid answer (unscored), below or above the central part (too hard, too
    easy), a standard deviation below `f.min_std` or of a single answer (no spread: such a group has no advantage).
    """
    bounds = bounds_of(prompts, f)
    out = []
    for p in prompts:
        score, std = p.score, p.std
        b = bounds.get(_distribution(p, f))
        reason: Reason
        if score is None or std is None or b is None:
            reason = "unscored"
        elif score < b.low:
            reason = "too hard"
        elif score > b.high:
            reason = "too easy"
        elif len(p.valid) < 2 or std < f.min_std:
            reason = "no spread"
        else:
            reason = "central"
        out.append(Decision(id=p.id, kept=reason == "central", reason=reason, score=score, std=std, bounds=b))
    return out


def counts(decisions: Sequence[Decision]) -> dict[str, int]:
    """How many decisions have each reason, zeros included, in the order of REASONS."""
    found = Counter(d.reason for d in decisions)
    return {reason: found[reason] for reason in REASONS}


def histogram(decisions: Sequence[Decision], bins: int = 10) -> list[tuple[float, float, int, int]]:
    """(from, to, kept, dropped) of `bins` equal parts of [least, greatest score]; the last part holds its upper end.
    One part when all scores are the same."""
    scored = [(d.score, d.kept) for d in decisions if d.score is not None]
    if not scored:
        return []
    low, high = min(s for s, _ in scored), max(s for s, _ in scored)
    width = (high - low) / bins
    rows = [[0, 0] for _ in range(bins if width > 0 else 1)]
    for s, kept in scored:
        rows[min(bins - 1, int((s - low) / width)) if width > 0 else 0][0 if kept else 1] += 1
    return [(low + i * width, low + (i + 1) * width, k, d) for i, (k, d) in enumerate(rows)]


def _distribution(p: PromptScore, f: Filter) -> str:
    return (p.family or "none") if f.by == "family" else "all"
