"""The judge examined: agreement with labels, calibration, biases, steadiness, attacks. `megarubric eval --suite judge`.

Labelled answers come in the responses format of `megarubric score`, with the labels as their judgements and, where it
is known, the model that wrote the answer as `author`. Nothing of the labels reaches the judge.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from megarubric.errors import BadInput
from megarubric.judging.agreement import Agreement, Interval, agreement, bootstrap, compression, flip_rate, spearman
from megarubric.judging.attacks import AttackReport, run_attacks
from megarubric.judging.calibration import Calibration, Labelled, calibration_error, fit
from megarubric.judging.judge import Judge
from megarubric.judging.score import ResponseReader, read_chunks
from megarubric.judging.types import JudgeItem, Judgement
from megarubric.rubrics import Criterion, Rubric, load_rubrics

_NOTHING = Interval(float("nan"), float("nan"), float("nan"))


class LabelledAnswer(msgspec.Struct, frozen=True):
    """An answer, its labels on the criteria's tier scales, and who wrote it."""

    item: JudgeItem
    labels: dict[str, float]
    author: str | None = None


class Biases(msgspec.Struct, frozen=True, kw_only=True):
    """What moves a judge that should not.

    `length`: rank correlation of the error (score - label) with the answer's number of words; `verbosity`: mean change
    of the score when the answer's last sentence is said again; `tier_order`: mean absolute change of the score when the
    tiers are listed highest first; `self_preference`: mean error on the judge's own answers less that on others'.
    0 is no bias; NaN where the data cannot say.
    """

    length: Interval
    verbosity: float
    tier_order: float
    self_preference: Interval


class JudgeReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about a judge on labelled answers. `criteria` has one agreement a criterion with at least 10 labels;
    `overall` compares normalised scores. Calibration errors are cross-fitted: no map is tested on what it was fitted
    on.
    """

    judge: str
    answers: int
    overall: Agreement
    criteria: dict[str, Agreement]
    unread: float
    compression: dict[str, float]
    compression_calibrated: dict[str, float]
    calibration_error: float
    calibration_error_calibrated: float
    flip_rate: float
    biases: Biases
    attacks: AttackReport | None
    seconds: float
    judgements_per_second: float


def load_labelled(rubrics: Path, responses: Path) -> list[LabelledAnswer]:
    """Labelled answers of a file. Raises BadInput naming the first line that cannot be used or has no label."""
    reader = ResponseReader(load_rubrics(rubrics))
    answers = []
    with responses.open("rb") as f:
        for number, raw in (pair for chunk in read_chunks(f) for pair in chunk):
            line = reader.read(number, raw)
            if line.item is None or not line.item.stored:
                raise BadInput(responses, f"line {number}", line.error or "has no judgements to take as labels")
            labels = {name: float(value) for name, value in line.item.stored.items() if value is not None}
            author = msgspec.json.decode(raw).get("author")
            item = msgspec.structs.replace(line.item, stored=None)
            answers.append(LabelledAnswer(item, labels, author if isinstance(author, str) else None))
    return answers


async def run_judge_suite(
    judge: Judge,
    answers: Sequence[LabelledAnswer],
    *,
    author: str | None = None,
    attacks: int = 8,
    resamples: int = 500,
    report: Callable[[str], None] = lambda line: None,
) -> JudgeReport:
    """Examine `judge` on `answers`. `author` is the judge's own name among the answers' authors; `attacks` answers
    (those with the lowest labels) are attacked, 0 for none. `report` gets a line of text at the start of each part."""
    if not answers:
        raise BadInput("judge suite", None, "no labelled answers")
    report(f"judging {len(answers)} labelled answers")
    began = time.perf_counter()
    judged = await judge.judge([a.item for a in answers])
    seconds = time.perf_counter() - began
    rows = _rows(answers, judged)
    scores = np.array([np.nan if r.score is None else r.score for r in rows])
    labels = np.array([r.label for r in rows])
    read = ~np.isnan(scores)
    calibrated = _cross_fitted(judge, answers, rows)
    lowest = sorted(range(len(answers)), key=lambda i: sum(answers[i].labels.values()))[:attacks]
    report("asking again: flips, order of tiers, length")
    flip_rate, biases = await _retest(judge, answers), await _biases(judge, answers, rows, author, resamples)
    if attacks:
        report(f"attacking {len(lowest)} answers")
    return JudgeReport(
        judge="none" if judge.backend is None else judge.backend.identity,
        answers=len(answers),
        overall=agreement(scores, labels, resamples=resamples),
        criteria=_per_criterion(answers, rows, resamples),
        unread=float(1 - read.mean()) if rows else 0.0,
        compression=compression(scores, 0, 1),
        compression_calibrated=compression(calibrated, 0, 1),
        calibration_error=calibration_error(scores[read], labels[read]),
        calibration_error_calibrated=calibration_error(calibrated[read], labels[read]),
        flip_rate=flip_rate,
        biases=biases,
        attacks=await run_attacks(judge, [answers[i].item for i in lowest]) if attacks else None,
        seconds=seconds,
        judgements_per_second=len(rows) / seconds if seconds else 0.0,
    )


async def fit_calibration(judge: Judge, answers: Sequence[LabelledAnswer]) -> Calibration:
    """The calibration of `judge` (which has none yet) by all labelled answers. Raises BadInput with too few labels."""
    judged = await judge.judge([a.item for a in answers])
    known = [
        Labelled(answers[r.answer].item.rubric.id, r.criterion.id, r.score, r.label)
        for r in _rows(answers, judged)
        if r.score is not None
    ]
    return fit("none" if judge.backend is None else judge.backend.identity, known, asked=judge.asked)


class _Row(msgspec.Struct, frozen=True):
    """One labelled judgement: answer, criterion, normalised score (None: unread) and label."""

    answer: int
    criterion: Criterion
    score: float | None
    label: float


def _rows(answers: Sequence[LabelledAnswer], judged: Sequence[dict[str, Judgement]]) -> list[_Row]:
    return [
        _Row(i, c, judged[i][c.id].score, _normal(c, a.labels[c.id]))
        for i, a in enumerate(answers)
        for c in a.item.rubric.criteria
        if c.id in a.labels and c.check is None
    ]


def _normal(criterion: Criterion, value: float) -> float:
    low, high = criterion.tier_values[0], criterion.tier_values[-1]
    return (value - low) / (high - low)


def _per_criterion(answers: Sequence[LabelledAnswer], rows: Sequence[_Row], resamples: int) -> dict[str, Agreement]:
    groups: dict[str, list[_Row]] = {}
    for row in rows:
        groups.setdefault(f"{answers[row.answer].item.rubric.id}/{row.criterion.id}", []).append(row)
    return {
        key: agreement(
            [np.nan if r.score is None else r.score for r in group], [r.label for r in group], resamples=resamples
        )
        for key, group in groups.items()
        if len(group) >= 10
    }


def _cross_fitted(judge: Judge, answers: Sequence[LabelledAnswer], rows: Sequence[_Row]) -> NDArray[np.float64]:
    """Calibrated scores [rows], each by a map fitted on the other half of the answers; unchanged with too few
    labels."""
    out = np.array([np.nan if r.score is None else r.score for r in rows])
    for half in (0, 1):
        known = [
            Labelled(answers[r.answer].item.rubric.id, r.criterion.id, r.score, r.label)
            for r in rows
            if r.answer % 2 != half and r.score is not None
        ]
        calibration = fit("suite", known) if len(known) >= 20 else Calibration("suite", {})
        for k, r in enumerate(rows):
            if r.answer % 2 == half and r.score is not None:
                out[k] = calibration.score(answers[r.answer].item.rubric.id, r.criterion.id, r.score)
    return out


async def _retest(judge: Judge, answers: Sequence[LabelledAnswer]) -> float:
    """Share of judgements whose nearest tier differs when the same answers are asked about a second time."""
    draws = []
    for draw in (1, 2):  # draw 0 is the judgement that counts, and may come from a cache
        judged = await judge.judge([a.item for a in answers], draw=draw)
        draws.append([_tier(a.item.rubric, row) for a, row in zip(answers, judged)])
    return flip_rate([[tier for row in d for tier in row] for d in draws])


def _tier(rubric: Rubric, row: dict[str, Judgement]) -> list[float]:
    """Index of the nearest tier for every criterion that a judge was asked about, NaN where unread."""
    out = []
    for criterion in rubric.criteria:
        judgement = row[criterion.id]
        if judgement.source != "judge":
            continue
        values = np.array(criterion.tier_values)
        out.append(float("nan") if judgement.value is None else float(np.abs(values - judgement.value).argmin()))
    return out


async def _biases(
    judge: Judge, answers: Sequence[LabelledAnswer], rows: Sequence[_Row], author: str | None, resamples: int
) -> Biases:
    read = [r for r in rows if r.score is not None]
    errors = np.array([(r.score or 0.0) - r.label for r in read])
    words = np.array([len(answers[r.answer].item.response.split()) for r in read], float)
    own = np.array([author is not None and answers[r.answer].author == author for r in read], float)
    preference = _NOTHING
    if author is not None and 0 < own.sum() < len(own):
        preference = bootstrap(
            lambda e, o: float(e[o == 1].mean() - e[o == 0].mean()) if 0 < o.sum() < len(o) else float("nan"),
            errors,
            own,
            resamples=resamples,
        )
    said_again = [msgspec.structs.replace(a.item, response=_said_again(a.item.response)) for a in answers]
    return Biases(
        length=bootstrap(spearman, errors, words, resamples=resamples) if len(read) else _NOTHING,
        verbosity=_mean_change(rows, await judge.judge(said_again)),
        tier_order=_mean_change(rows, await judge.judge([a.item for a in answers], highest_first=True), absolute=True),
        self_preference=preference,
    )


def _said_again(text: str) -> str:
    last = text.rstrip().split("\n")[-1].split(". ")[-1]
    return f"{text.rstrip()} {last}"


def _mean_change(rows: Sequence[_Row], again: Sequence[dict[str, Judgement]], absolute: bool = False) -> float:
    changes = [
        now - r.score
        for r in rows
        if r.score is not None and (now := again[r.answer][r.criterion.id].score) is not None
    ]
    if not changes:
        return float("nan")
    return float(np.mean(np.abs(changes) if absolute else changes))
