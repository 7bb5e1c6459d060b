"""What sampled answers say about a criterion: does it tell answers apart, and does a judge give the same twice.

Scores are normalised to [0, 1]; None is unread and counts nowhere. A reading is one pass of the judge over all answers
(another draw, another order of the tiers): two readings of one answer should agree, two answers should not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import msgspec

from megarubric.rubrics.schema import Criterion

Scores = Sequence[Sequence[float | None]]  # [readings][answers]


class Floors(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a criterion must reach.

    Attributes:
        variance: between-answer variance of the mean score (0.01 is a standard deviation of a tenth of the scale).
        disagreement: the most that two readings of one answer may differ by, on average.
        reliability: intraclass correlation ICC(1,1) of the readings; 0 asks that answers differ more than readings do.
        read: share of the answers that must have been read.
        backwards: how much lower than sampled answers given good answers may score.
        best: share of the answers, by the rest of the rubric, that count as good where none are given.
    """

    variance: float = 0.01
    disagreement: float = 0.25
    reliability: float = 0.0
    read: float = 0.5
    backwards: float = 0.1
    best: float = 0.25

    def __post_init__(self) -> None:
        for name in ("variance", "disagreement", "read", "backwards", "best"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name):g}")
        if not -1 <= self.reliability <= 1:
            raise ValueError(f"reliability must lie between -1 and 1, not {self.reliability:g}")


class Evidence(msgspec.Struct, frozen=True):
    """The numbers of one criterion; None where they cannot be had.

    Attributes:
        answers: distinct answers judged.
        read: of them, those with at least one score.
        mean: mean over answers of their mean score.
        variance: population variance over answers of the same.
        disagreement: mean absolute difference of the readings of one answer.
        reliability: ICC(1,1), one-way random effects, over answers that every reading scored.
        good: mean score of given good answers.
    """

    answers: int
    read: int
    mean: float | None = None
    variance: float | None = None
    disagreement: float | None = None
    reliability: float | None = None
    good: float | None = None

    def numbers(self) -> dict[str, float | int | None]:
        """For the report, rounded to what the data can carry."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in fields.items() if v is not None}


def evidence(scores: Scores, good: Scores = ()) -> Evidence:
    """The numbers of `scores` [readings][answers] and of given good answers [readings][good answers]."""
    by_answer = [[s for s in column if s is not None] for column in zip(*scores)]
    seen = [column for column in by_answer if column]
    means = [statistics.fmean(column) for column in seen]
    twice = [column for column in seen if len(column) > 1]
    good_scores = [s for row in good for s in row if s is not None]
    return Evidence(
        answers=len(by_answer),
        read=len(seen),
        mean=statistics.fmean(means) if means else None,
        variance=statistics.pvariance(means) if len(means) > 1 else None,
        disagreement=statistics.fmean(map(_mean_difference, twice)) if twice else None,
        reliability=icc([column for column in seen if len(column) == len(scores)]),
        good=statistics.fmean(good_scores) if good_scores else None,
    )


def _mean_difference(values: Sequence[float]) -> float:
    """Mean absolute difference over all pairs."""
    pairs = [(a, b) for i, a in enumerate(values) for b in values[i + 1 :]]
    return statistics.fmean(abs(a - b) for a, b in pairs)


def icc(rows: Sequence[Sequence[float]]) -> float | None:
    """ICC(1,1) (Shrout and Fleiss 1979) of `rows` [answers][readings]: (B - W) / (B + (k - 1) W) with the mean squares
    between and within answers. None for fewer than two answers or readings, or when nothing varies at all."""
    k = len(rows[0]) if rows else 0
    if len(rows) < 2 or k < 2:
        return None
    means = [statistics.fmean(row) for row in rows]
    between = k * statistics.variance(means)
    within = sum((x - m) ** 2 for row, m in zip(rows, means) for x in row) / (len(rows) * (k - 1))
    whole = between + (k - 1) * within
    return (between - within) / whole if whole > 1e-12 else None


def unusable(e: Evidence, floors: Floors) -> str | None:
    """Why the judge cannot be relied on for a criterion, whatever the criterion is for; None when it can."""
    if e.read < max(1, math.ceil(floors.read * e.answers)):
        return f"read on {e.read} of {e.answers} answers"
    if e.disagreement is not None and e.disagreement > floors.disagreement:
        return f"readings of one answer differ by {e.disagreement:.2f} on average, more than {floors.disagreement:g}"
    return None


def pointless(criterion: Criterion, e: Evidence, floors: Floors) -> str | None:
    """Why a criterion that counts should not: it does not tell answers apart, or it tells them apart the wrong way."""
    if e.variance is None:
        return f"read on {e.read} of {e.answers} answers: whether it tells answers apart cannot be seen"
    if e.variance < floors.variance:
        same = f"every answer scores about {e.mean:.2f}"
        return f"does not tell answers apart: {same} (variance {e.variance:.4f}, floor {floors.variance:g})"
    if e.reliability is not None and e.reliability < floors.reliability:
        return f"readings differ as much as answers do (reliability {e.reliability:.2f}, floor {floors.reliability:g})"
    if e.good is not None and e.mean is not None:
        gain = (e.good - e.mean) * (1 if criterion.weight >= 0 else -1)
        if gain < -floors.backwards:
            return f"good answers do worse on it: {e.good:.2f} against {e.mean:.2f}"
    return None


def veto_fires(criterion: Criterion, score: float) -> bool:
    """Whether the criterion's veto fires at a normalised `score`; False without a veto."""
    veto = criterion.veto
    if veto is None:
        return False
    detects = criterion.weight < 0 or (criterion.weight == 0 and veto.detector)
    return score >= veto.threshold if detects else score < veto.threshold


def best_answers(rewards: Sequence[float | None], share: float) -> list[int]:
    """Positions of the best `share` of the answers, at least one, best first; unscored ones are never among them."""
    scored = sorted((i for i, r in enumerate(rewards) if r is not None), key=lambda i: (-(rewards[i] or 0.0), i))
    return scored[: max(1, round(share * len(scored)))]
