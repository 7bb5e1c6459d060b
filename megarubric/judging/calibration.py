"""Monotone calibration of a judge: from the score it gives to the score that labelled data say it means.

One map per judge and criterion, fitted by isotonic regression and applied by linear interpolation, so the judge's order
is kept (ties may appear, never inversions) while its scale is corrected: a judge that gives everything 0.8 to 1.0 is
spread out to what those scores were worth. A criterion with too few labels uses the judge's pooled map, or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from megarubric.errors import BadInput
from megarubric.observe.files import whole_file

Floats = NDArray[np.float64]
POOLED = "*"


class Map(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A non-decreasing piecewise linear map on [0, 1]: knots `x` (increasing) and values `y`; constant outside them.
    `labels` says how many labelled items it was fitted on."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    labels: int

    def __post_init__(self) -> None:
        x, y = self.x, self.y
        if not x or len(x) != len(y):
            raise ValueError("a map needs as many values as knots, and at least one")
        if not all(a < b for a, b in pairwise(x)) or not all(a <= b for a, b in pairwise(y)):
            raise ValueError("knots must increase and values must not decrease")
        if not all(0.0 <= v <= 1.0 for v in (*x, *y)):
            raise ValueError("knots and values lie in [0, 1]")

    def __call__(self, score: float) -> float:
        return float(np.interp(score, self.x, self.y))


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The maps of one judge by ``rubric id/criterion id``; `POOLED` holds for criteria without one of their own.
    `asked` names the templates and modes it was fitted with (`Judge.asked`), empty where that is not known."""

    judge: str
    maps: dict[str, Map]
    version: int = 1
    asked: str = ""

    def score(self, rubric: str, criterion: str, score: float) -> float:
        """The calibrated normalised score; unchanged when there is no map for it."""
        found = self.maps.get(f"{rubric}/{criterion}") or self.maps.get(POOLED)
        return score if found is None else found(score)

    def save(self, path: Path) -> None:
        with whole_file(path) as f:
            f.write(msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=2).decode() + "\n")

    @classmethod
    def load(cls, path: Path, judge: str | None = None, asked: str = "") -> Calibration:
        """Read and check; raises BadInput when the file is unusable, or was fitted for another judge than `judge` or
        with another way of asking than `asked` (where both are known)."""
        try:
            loaded = msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError) as error:
            raise BadInput(path, None, f"cannot be used as a calibration: {error}") from error
        if loaded.version != 1:
            raise BadInput(path, "version", f"is {loaded.version}, this program reads 1")
        if judge is not None and loaded.judge != judge:
            raise BadInput(path, "judge", f"was fitted for {loaded.judge}, the judge is {judge}")
        if asked and loaded.asked and loaded.asked != asked:
            raise BadInput(path, "asked", "was fitted with other templates, modes or draws than the judge has")
        return loaded


class Labelled(msgspec.Struct, frozen=True):
    """One labelled judgement: the judge's normalised score and the true one, both in [0, 1]."""

    rubric: str
    criterion: str
    score: float
    label: float


def fit(judge: str, items: Sequence[Labelled], *, min_labels: int = 20, asked: str = "") -> Calibration:
    """Maps for every criterion with at least `min_labels` labelled judgements, and a pooled one over all of them.

    Raises BadInput on a score or label outside [0, 1] or fewer than `min_labels` items in all.
    """
    if len(items) < min_labels:
        raise BadInput("calibration", judge, f"{len(items)} labelled judgements, needs at least {min_labels}")
    for item in items:
        if not (0.0 <= item.score <= 1.0 and 0.0 <= item.label <= 1.0):  # also refuses NaN
            raise BadInput("calibration", f"{item.rubric}/{item.criterion}", "scores and labels lie in [0, 1]")
    groups: dict[str, list[Labelled]] = {POOLED: list(items)}
    for item in items:
        groups.setdefault(f"{item.rubric}/{item.criterion}", []).append(item)
    maps = {key: _fit_map(rows) for key, rows in sorted(groups.items()) if len(rows) >= min_labels}
    return Calibration(judge, maps, asked=asked)


def _fit_map(items: Sequence[Labelled]) -> Map:
    x = np.array([item.score for item in items])
    y = np.array([item.label for item in items])
    knots, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    means = np.bincount(inverse, weights=y) / counts
    fitted = np.clip(isotonic(means, counts), 0.0, 1.0)
    # Inner knots of a level stretch say nothing: its two ends draw it.
    keep = np.ones(knots.size, bool)
    keep[1:-1] = (fitted[1:-1] != fitted[:-2]) | (fitted[1:-1] != fitted[2:])
    return Map(tuple(knots[keep].tolist()), tuple(fitted[keep].tolist()), len(items))


def isotonic(y: ArrayLike, weights: ArrayLike) -> Floats:
    """The non-decreasing sequence [N] nearest to `y` [N] in weighted squares (pool adjacent violators)."""
    values = np.asarray(y, np.float64)
    w = np.asarray(weights, np.float64)
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values.tolist(), w.tolist()):
        mean, total, length = value, weight, 1
        while blocks and blocks[-1][0] >= mean:
            before, before_weight, before_length = blocks.pop()
            mean = (mean * total + before * before_weight) / (total + before_weight)
            total, length = total + before_weight, length + before_length
        blocks.append((mean, total, length))
    return np.repeat([m for m, _, _ in blocks], [n for _, _, n in blocks]).astype(np.float64)


def calibration_error(scores: ArrayLike, labels: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error: over `bins` equal-count bins of the scores [N], the mean |mean score - mean label|
    weighted by the bins' sizes."""
    s, t = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    order = np.argsort(s, kind="stable")
    parts = [part for part in np.array_split(order, bins) if part.size]
    return float(sum(part.size * abs(s[part].mean() - t[part].mean()) for part in parts) / max(s.size, 1))


def describe(calibration: Calibration) -> Mapping[str, str]:
    """One line a map, for people: how many labels, and where 0, 0.5 and 1 go."""
    return {
        key: f"{m.labels} labels: 0 -> {m(0):.2f}, 0.5 -> {m(0.5):.2f}, 1 -> {m(1):.2f}"
        for key, m in calibration.maps.items()
    }
