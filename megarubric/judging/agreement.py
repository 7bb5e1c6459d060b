"""How far two judges agree, or a judge and the truth: accuracy, kappas, Krippendorff's alpha, bootstrap intervals.

All of it on plain arrays. Unread judgements are NaN and never count as a label: pairs with one are left out (their
share is reported), and Krippendorff's alpha takes missing values as it always has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from megarubric.errors import BadInput

Floats = NDArray[np.float64]
Level = Literal["nominal", "ordinal", "interval"]


class Interval(msgspec.Struct, frozen=True):
    """A statistic and its percentile bootstrap interval (NaN where the statistic is not defined)."""

    value: float
    low: float
    high: float


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """Agreement of a judge with reference labels over `n` items that both judged; `unread` is the share left out.

    `accuracy`: equal labels; `kappa`: Cohen's, chance-corrected; `quadratic_kappa`: the same with squared-distance
    weights; `alpha`: Krippendorff's with squared-distance (interval) weights, over all items; `spearman`: rank
    correlation.
    """

    n: int
    unread: float
    accuracy: Interval
    kappa: Interval
    quadratic_kappa: Interval
    alpha: Interval
    spearman: Interval


def agreement(
    judge: ArrayLike, truth: ArrayLike, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Agreement:
    """Agreement of `judge` [N] with `truth` [N], labels on one scale, NaN where there is none.

    Expectations are compared as the nearest label of `truth` in accuracy and the kappas, and as they are in alpha and
    the rank correlation.
    """
    a, b = _pair(judge, truth)
    both = ~(np.isnan(a) | np.isnan(b))
    labels = np.unique(b[~np.isnan(b)])
    x, y = a[both], b[both]
    hard = nearest_label(x, labels) if x.size else x

    def interval(statistic: Callable[[Floats, Floats], float], left: Floats) -> Interval:
        return bootstrap(statistic, left, y, resamples=resamples, level=level, seed=seed)

    return Agreement(
        n=int(both.sum()),
        unread=float(np.isnan(a).mean()) if a.size else 0.0,
        accuracy=interval(lambda p, q: float(np.mean(p == q)), hard),
        kappa=interval(lambda p, q: cohen_kappa(p, q, labels), hard),
        quadratic_kappa=interval(lambda p, q: cohen_kappa(p, q, labels, quadratic=True), hard),
        alpha=interval(lambda p, q: krippendorff_alpha(np.stack([p, q]), "interval"), x),
        spearman=interval(spearman, x),
    )


def nearest_label(values: ArrayLike, labels: ArrayLike) -> Floats:
    """Each of `values` [N] as the nearest of the ascending `labels` [L]; halfway goes to the lower."""
    v, grid = np.asarray(values, np.float64), np.asarray(labels, np.float64)
    return np.asarray(grid[np.abs(v[:, None] - grid[None, :]).argmin(axis=1)], np.float64)


def cohen_kappa(a: ArrayLike, b: ArrayLike, labels: ArrayLike | None = None, *, quadratic: bool = False) -> float:
    """Cohen's kappa of two raters' labels [N] (Cohen 1960; weighted: Cohen 1968, weights (label difference)^2).

    NaN without items, or when both raters gave one and the same label throughout (chance explains everything).
    """
    x, y = _pair(a, b)
    grid = np.unique(np.concatenate([x, y])) if labels is None else np.unique(np.asarray(labels, np.float64))
    if not x.size:
        return float("nan")
    observed = np.zeros((grid.size, grid.size))
    np.add.at(observed, (np.searchsorted(grid, x), np.searchsorted(grid, y)), 1.0 / x.size)
    expected = np.outer(observed.sum(axis=1), observed.sum(axis=0))
    distance = (
        (grid[:, None] - grid[None, :]) ** 2 if quadratic else (grid[:, None] != grid[None, :]).astype(np.float64)
    )
    by_chance = float((distance * expected).sum())
    return float("nan") if by_chance == 0 else 1.0 - float((distance * observed).sum()) / by_chance


def krippendorff_alpha(ratings: ArrayLike, level: Level = "interval") -> float:
    """Krippendorff's alpha of `ratings` [raters, items], NaN where missing (Krippendorff 2011, coincidence matrix).

    1 is perfect, 0 is chance. NaN when fewer than two values can be paired or all of them are equal.
    """
    r = np.asarray(ratings, np.float64)
    if r.ndim != 2:
        raise BadInput("agreement", "ratings", f"need shape [raters, items], have {r.shape}")
    r = r[:, (~np.isnan(r)).sum(axis=0) >= 2]
    grid = np.unique(r[~np.isnan(r)])
    if grid.size < 2:
        return float("nan")
    counts = np.stack([(r == value).sum(axis=0) for value in grid]).astype(np.float64)  # [labels, items]
    per_item = counts.sum(axis=0)
    coincidence = (counts / (per_item - 1)) @ counts.T - np.diag((counts / (per_item - 1)).sum(axis=1))
    totals = coincidence.sum(axis=1)
    n = totals.sum()
    if level == "nominal":
        distance = (grid[:, None] != grid[None, :]).astype(np.float64)
    elif level == "interval":
        distance = (grid[:, None] - grid[None, :]) ** 2
    else:
        middle = np.cumsum(totals) - totals / 2
        distance = (middle[:, None] - middle[None, :]) ** 2
    observed = (coincidence * distance).sum() / n
    expected = (np.outer(totals, totals) * distance).sum() / (n * (n - 1))
    return float(1.0 - observed / expected)


def ranks(values: ArrayLike) -> Floats:
    """Ranks of `values` [N] from 1, ties share their mean rank."""
    v = np.asarray(values, np.float64)
    _, inverse, counts = np.unique(v, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray(((last - counts + 1 + last) / 2)[inverse], np.float64)


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation, NaN when either side is constant or there are fewer than two items."""
    x, y = _pair(a, b)
    if x.size < 2 or np.all(x == x[0]) or np.all(y == y[0]):
        return float("nan")
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def bootstrap(
    statistic: Callable[[Floats, Floats], float],
    a: ArrayLike,
    b: ArrayLike,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over items (pairs are resampled together). Resamples in which the statistic is not defined
    are left out; the same seed gives the same interval."""
    x, y = _pair(a, b)
    if not x.size:
        return Interval(float("nan"), float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    for i in range(resamples):
        pick = rng.integers(0, x.size, x.size)
        drawn[i] = statistic(x[pick], y[pick])
    drawn = drawn[~np.isnan(drawn)]
    if not drawn.size:
        return Interval(statistic(x, y), float("nan"), float("nan"))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(statistic(x, y), float(low), float(high))


def flip_rate(draws: ArrayLike) -> float:
    """Test-retest: over `draws` [K, N] of the same N items, the share of ordered pairs of draws whose labels differ
    (NaN, unread, differs from every label). 0 is a judge that always says the same."""
    d = np.asarray(draws, np.float64)
    if d.ndim != 2 or d.shape[0] < 2:
        raise BadInput("agreement", "draws", f"need at least 2 draws of the same items, have shape {d.shape}")
    pairs = [(i, j) for i in range(d.shape[0]) for j in range(i)]
    same = [(d[i] == d[j]) | (np.isnan(d[i]) & np.isnan(d[j])) for i, j in pairs]
    return float(1.0 - np.mean(same)) if d.shape[1] else 0.0


def compression(scores: ArrayLike, low: float, high: float) -> dict[str, float]:
    """How much of its scale a judge uses: `top_fifth` and `top_value`, the shares of scores in the upper fifth of the
    scale and at the most frequent value; `entropy` of the values over log of their number (1: all equally frequent);
    `std` on the scale taken as [0, 1]."""
    s = np.asarray(scores, np.float64)
    s = (s[~np.isnan(s)] - low) / (high - low)
    if not s.size:
        return {"top_fifth": float("nan"), "top_value": float("nan"), "entropy": float("nan"), "std": float("nan")}
    _, counts = np.unique(s, return_counts=True)
    p = counts / s.size
    entropy = float(-(p * np.log(p)).sum() / np.log(p.size)) if p.size > 1 else 0.0
    return {
        "top_fifth": float(np.mean(s >= 0.8)),
        "top_value": float(p.max()),
        "entropy": entropy,
        "std": float(s.std()),
    }


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise BadInput("agreement", "labels", f"two raters need equal numbers of labels, have {x.shape} and {y.shape}")
    return x, y
