"""Group-relative advantages: rewards of the rollouts of one prompt, compared with each other.

Sums run in float64 in index order and results are rounded once to float32, so a group of equal rewards has a spread of
exactly 0 (float32 sums would leave rounding noise, which standardising would blow up) and the compiled ops return the
same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megarubric.errors import BadInput

AdvantageMode = Literal["center", "standardize"]
STD_EPSILON = 1e-6  # added to the standard deviation
DEGENERATE_STD = 1e-8  # below it a group says nothing about which sample is better


def group_advantages(
    rewards: ArrayLike,
    valid: ArrayLike,
    group: ArrayLike,
    mode: AdvantageMode = "standardize",
    n_groups: int | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Advantage of every sample within its group (GRPO: "standardize", Dr.GRPO: "center").

    Args:
        rewards: float32 [N]; anything, NaN included, where `valid` is False.
        valid: bool [N]; an invalid (unscored) sample takes no part in its group and has advantage 0.
        group: int [N], group of each sample, 0 <= group < n_groups, in any order.
        mode: "center": r - mean; "standardize": (r - mean) / (std + 1e-6), population standard deviation.
        n_groups: number of groups; default max(group) + 1.

    Returns:
        (advantages float32 [N], degenerate bool [n_groups]). A group with fewer than two valid samples or std < 1e-8 is
        degenerate and all its advantages are 0.

    Raises:
        BadInput: shapes that differ, an unknown mode, a group index out of range, a valid reward that is not finite.
    """
    if mode not in ("center", "standardize"):
        raise BadInput("group_advantages", "mode", f"is {mode!r}, not center or standardize")
    r = np.asarray(rewards, dtype=np.float32)
    ok = np.asarray(valid, dtype=bool)
    g, n_groups = _groups(group, r.shape, n_groups)
    if ok.shape != r.shape:
        raise BadInput("group_advantages", "valid", f"has shape {ok.shape}, rewards have {r.shape}")
    bad = np.flatnonzero(ok & ~np.isfinite(r))
    if bad.size:
        raise BadInput("group_advantages", f"sample {bad[0]}", f"is valid but its reward is {r[bad[0]]}")
    deviation, std, degenerate = _spread(r, ok, g, n_groups)
    if mode == "standardize":
        deviation = deviation / (std[g] + STD_EPSILON)
    advantages = np.where(ok & ~degenerate[g], deviation, 0.0).astype(np.float32)
    return advantages, degenerate


def objective_wise(
    scores: ArrayLike,
    mask: ArrayLike,
    group: ArrayLike,
    weights: ArrayLike,
    mean_scores: ArrayLike | None = None,
    gamma: float = 0.0,
    valid: ArrayLike | None = None,
    n_groups: int | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Advantages per criterion, standardised within the group, then combined (GDPO / SA-MRPO style).

    A_i = sum_k m_ik * w~_k * A_ik with w~_k = w_k * (1 - sbar_k)**gamma: a criterion the policy already satisfies
    counts less; gamma = 0 keeps w_k. Summing standardised criteria keeps a criterion with little spread from
    drowning in one with much.

    Args:
        scores: float32 [N, K], normalised criterion scores; anything where `mask` is False.
        mask: bool [N, K], True where the criterion was judged.
        group: int [N].
        weights: float [K], or [n_groups, K] when groups have different rubrics (0 pads a shorter rubric).
        mean_scores: running mean score sbar in [0, 1], shaped like `weights`; needed when gamma > 0.
        gamma: >= 0.
        valid: bool [N] or None (all): samples that take part; the others have advantage 0.

    Returns:
        (advantages float32 [N], degenerate bool [n_groups]); a group is degenerate when every criterion with a
        weight is degenerate in it (fewer than two judged samples, or std < 1e-8).
    """
    s = np.asarray(scores, dtype=np.float32)
    if s.ndim != 2:
        raise BadInput("objective_wise", "scores", f"have shape {s.shape}, not [samples, criteria]")
    judged = np.asarray(mask, dtype=bool)
    if judged.shape != s.shape:
        raise BadInput("objective_wise", "mask", f"has shape {judged.shape}, scores have {s.shape}")
    g, n_groups = _groups(group, s.shape[:1], n_groups)
    if valid is not None:
        judged = judged & np.asarray(valid, dtype=bool)[:, None]
    bad = np.argwhere(judged & ~np.isfinite(s))
    if bad.size:
        i, k = (int(x) for x in bad[0])
        raise BadInput("objective_wise", f"sample {i}, criterion {k}", f"is judged but its score is {s[i, k]}")
    w = effective_weights(weights, mean_scores, gamma, n_groups, s.shape[1])
    total = np.zeros(s.shape[0])
    informative = np.zeros(n_groups, dtype=bool)
    for k in range(s.shape[1]):
        deviation, std, degenerate = _spread(s[:, k], judged[:, k], g, n_groups)
        counts = judged[:, k] & ~degenerate[g]
        total = total + np.where(counts, w[g, k].astype(np.float64) * (deviation / (std[g] + STD_EPSILON)), 0.0)
        informative |= ~degenerate & (w[:, k] != 0)
    return total.astype(np.float32), ~informative


def effective_weights(
    weights: ArrayLike, mean_scores: ArrayLike | None, gamma: float, n_groups: int, n_criteria: int
) -> NDArray[np.float32]:
    """w~ = w * (1 - sbar)**gamma as float32 [n_groups, K] (a view where `weights` is shared by the groups)."""
    if not gamma >= 0 or not np.isfinite(gamma):
        raise BadInput("objective_wise", "gamma", f"is {gamma}, not a finite number >= 0")
    w = np.asarray(weights, dtype=np.float64)
    if gamma > 0:
        if mean_scores is None:
            raise BadInput("objective_wise", "mean_scores", f"are needed for gamma = {gamma:g}")
        sbar = np.asarray(mean_scores, dtype=np.float64)
        if not ((sbar >= 0) & (sbar <= 1)).all():
            raise BadInput("objective_wise", "mean_scores", "must lie in [0, 1]")
        w = w * (1.0 - sbar) ** gamma
    if w.shape not in ((n_criteria,), (n_groups, n_criteria)):
        raise BadInput(
            "objective_wise", "weights", f"have shape {w.shape}, not [{n_criteria}] or [{n_groups}, {n_criteria}]"
        )
    if not np.isfinite(w).all():
        raise BadInput("objective_wise", "weights", "must be finite")
    return np.broadcast_to(w.astype(np.float32), (n_groups, n_criteria))


class CriterionMeans:
    """Running mean score per criterion (sbar of `objective_wise`), over every judged score seen so far.

    Keys are free: the loop uses (rubric id, criterion id) joined as one string. A criterion not seen yet has mean 0,
    so its weight is untouched.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def update(self, key: str, scores: Iterable[float | None]) -> None:
        """Add scores in [0, 1]; None (masked) is skipped."""
        for score in scores:
            if score is not None:
                self._sums[key] = self._sums.get(key, 0.0) + float(score)
                self._counts[key] = self._counts.get(key, 0) + 1

    def mean(self, key: str) -> float:
        return self._sums[key] / self._counts[key] if key in self._counts else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = {str(k): float(v) for k, v in state["sums"].items()}
        self._counts = {str(k): int(v) for k, v in state["counts"].items()}


def _groups(group: ArrayLike, shape: tuple[int, ...], n_groups: int | None) -> tuple[NDArray[np.int64], int]:
    g = np.asarray(group, dtype=np.int64)
    if g.shape != shape:
        raise BadInput("group_advantages", "group", f"has shape {g.shape}, samples have {shape}")
    top = int(g.max()) + 1 if g.size else 0
    n_groups = top if n_groups is None else n_groups
    if g.size and (int(g.min()) < 0 or top > n_groups):
        raise BadInput("group_advantages", "group", f"has indices outside 0..{n_groups - 1}")
    return g, n_groups


def _spread(
    x: NDArray[np.float32], take: NDArray[np.bool_], g: NDArray[np.int64], n_groups: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Deviation from the group mean [N], population std [n_groups], degenerate [n_groups].

    `np.bincount` adds in index order in float64.
    """
    value = np.where(take, x, np.float32(0)).astype(np.float64)
    count = np.bincount(g[take], minlength=n_groups)
    divisor = np.maximum(count, 1)
    mean = np.bincount(g[take], weights=value[take], minlength=n_groups) / divisor
    deviation = np.where(take, value - mean[g], 0.0)
    variance = np.bincount(g[take], weights=(deviation * deviation)[take], minlength=n_groups) / divisor
    std = np.sqrt(variance)
    return deviation, std, (count < 2) | (std < DEGENERATE_STD)
