"""The few statistics that mining needs: intervals, stratified tests, correction for many tests, robust scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054


def wilson(hits: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share of `hits` in `n`, two-sided, 95% by default; (0, 1) when n is 0."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = hits / n, z * z
    centre, spread = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low, high = (centre - spread) / (1 + z2 / n), (centre + spread) / (1 + z2 / n)
    return (low if hits else 0.0), (high if hits < n else 1.0)  # exact at the ends, where rounding is seen


def holm(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Holm's adjusted p-values [N]: those below alpha keep the chance of any false find below alpha."""
    order = np.argsort(p, kind="stable")
    scaled = p[order] * np.arange(len(p), 0, -1)
    out = np.empty_like(p)
    out[order] = np.minimum(1.0, np.maximum.accumulate(scaled)) if len(p) else scaled
    return out


def upper_tail(z: float) -> float:
    """P(Z >= z) of a standard normal."""
    return 0.5 * math.erfc(z / math.sqrt(2))


def robust_scale(values: NDArray[np.float64], floor: float) -> float:
    """1.4826 times the median absolute deviation (a normal's standard deviation), at least `floor`."""
    return max(floor, 1.4826 * float(np.median(np.abs(values - np.median(values))))) if len(values) else floor


class Strata:
    """N values in strata: what a yes-no feature gains within them, and how surely.

    `stratum` int [N] numbers the strata; `values` float64 [N].
    """

    def __init__(self, stratum: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        self.stratum = stratum
        self.size = np.bincount(stratum)
        mean = np.bincount(stratum, values) / np.maximum(1, self.size)
        self.centred = values - mean[stratum]
        self.square = np.bincount(stratum, self.centred**2)

    def compare(self, carriers: Sequence[int]) -> tuple[float, float, int]:
        """(gain, z, strata) of the answers `carriers` (indices) over the others of their own strata.

        gain: the mean difference, strata weighted by n1 * n0 / n. z: the sum of the carriers' centred values over its
        standard deviation when the feature is dealt out at random within each stratum (exact variance). strata: how
        many hold both carriers and others. (0, 0, 0) when none does.
        """
        at = np.asarray(carriers, np.int64)
        ids, t = np.unique(self.stratum[at], return_counts=True)
        n = self.size[ids]
        both = t < n
        if not both.any():
            return 0.0, 0.0, 0
        part = np.bincount(self.stratum[at], self.centred[at], minlength=len(self.size))[ids][both]
        t, n, square = t[both], n[both], self.square[ids][both]
        # centred values: mean1 - mean0 = part * n / (t * (n - t)); times the weight t * (n - t) / n that is `part`
        gain = float(part.sum() / (t * (n - t) / n).sum())
        variance = float((t * (n - t) / (n * (n - 1)) * square).sum())
        return gain, float(part.sum()) / math.sqrt(variance) if variance > 0 else 0.0, int(both.sum())
