"""Criteria tried on answers by a real judge, in readings that should agree."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

import msgspec

from megarubric.judging.judge import Judge
from megarubric.judging.settings import JudgeSettings
from megarubric.judging.types import JudgeItem, Judgement
from megarubric.recipe.synthesis.models import HOPELESS, Recorded, Unreached
from megarubric.reward.reference import aggregate
from megarubric.rubrics.schema import Criterion, Rubric
from megarubric.rubrics.synthesis.model import Note, note_of
from megarubric.rubrics.synthesis.validation import (
    Evidence,
    Floors,
    best_answers,
    evidence,
    pointless,
    unusable,
    veto_fires,
)

# Why a judgement is unread although the judge was reached; everything else is a judge that was not.
_ANSWERED = (
    *HOPELESS,
    "no tier",
    "low tier mass",
    "not log-probabilities",
    "verdict out of range",
    "wrong number of tier",
)

Readings = list[list[dict[str, Judgement]]]  # [readings][answers]
Column = list[list[float | None]]  # [readings][answers] of one criterion


class Validated(msgspec.Struct, frozen=True):
    """The rubric with the criteria that hold, the numbers of all, and a note for every change."""

    rubric: Rubric
    numbers: dict[str, dict[str, float | int | None]]
    notes: list[Note] = []


class Examiner:
    """Judges with every template, in both orders of the tiers unless told otherwise, and applies the floors."""

    def __init__(self, templates: Sequence[str], both_orders: bool, floors: Floors) -> None:
        self.floors = floors
        orders = (False, True) if both_orders else (False,)
        self.ways = [(template, highest_first) for template in templates for highest_first in orders]
        self.settings = {template: JudgeSettings(template=template) for template in templates}

    async def examine(
        self, rubric: Rubric, prompt: str, answers: Sequence[str], good: Sequence[str], backend: Recorded
    ) -> Validated:
        """`rubric` with what holds on `answers` (and on `good`, answers known to be good).

        Raises Unreached when the judge could not be asked everything, or most of what it said could not be read.
        """
        items = [JudgeItem(rubric, prompt, text) for text in (*answers, *good)]
        judges = {name: Judge(backend, settings) for name, settings in self.settings.items()}
        readings: Readings = [
            await judges[template].judge(items, highest_first=highest_first) for template, highest_first in self.ways
        ]
        _refuse_silence(readings)
        n = len(answers)
        columns = {c.id: [[row[c.id].score for row in reading] for reading in readings] for c in rubric.criteria}
        found = {name: evidence([r[:n] for r in column], [r[n:] for r in column]) for name, column in columns.items()}
        notes: list[Note] = []
        kept: list[Criterion] = []
        for c in rubric.criteria:
            e = found[c.id]
            # A gate that no sampled answer failed may still be needed: it need not tell them apart.
            reason = unusable(e, self.floors) or (None if c.veto else pointless(c, e, self.floors))
            if reason is None:
                kept.append(c)
            else:
                notes.append(note_of(c, "dropped", "validate", reason, **e.numbers()))
        kept = [c for c in (self._gate(c, kept, rubric, columns, found, n, notes) for c in kept) if c is not None]
        left = msgspec.structs.replace(rubric, criteria=tuple(kept))
        return Validated(left, {name: e.numbers() for name, e in found.items()}, notes)

    def _gate(
        self,
        c: Criterion,
        kept: Sequence[Criterion],
        rubric: Rubric,
        columns: dict[str, Column],
        found: dict[str, Evidence],
        n: int,
        notes: list[Note],
    ) -> Criterion | None:
        """The criterion if its veto spares good answers; without the veto if it counts by its weight; or None."""
        if c.veto is None:
            return c
        means = [_mean(column) for column in zip(*columns[c.id])]
        good = list(range(n, len(means)))
        whose = "given good answers"
        if not good:
            good = best_answers(_rest(c, kept, rubric, columns, n), self.floors.best)
            whose = "answers that are best by the rest of the rubric"
        scores = [m for i in good if (m := means[i]) is not None]
        fired = sum(veto_fires(c, score) for score in scores)
        if scores and not fired:
            return c
        numbers = {**found[c.id].numbers(), "good_answers": len(scores), "vetoed": fired}
        why = f"its veto fires on {fired} of {len(scores)} {whose}" if scores else "nothing shows whom its veto hits"
        reason = pointless(c, found[c.id], self.floors) if c.weight != 0 else "it has no weight of its own"
        if reason is not None:
            notes.append(note_of(c, "dropped", "validate", f"{why}; and without it: {reason}", **numbers))
            return None
        notes.append(note_of(c, "repaired", "validate", f"{why}: the veto is taken off", **numbers))
        return msgspec.structs.replace(c, veto=None)


def _rest(
    c: Criterion, kept: Sequence[Criterion], rubric: Rubric, columns: dict[str, Column], n: int
) -> list[float | None]:
    """The reward of every answer by the other criteria, vetoes left aside."""
    others = tuple(msgspec.structs.replace(k, veto=None) for k in kept if k.id != c.id and k.weight != 0)
    if not others:
        return [None] * n
    rest = msgspec.structs.replace(rubric, criteria=others, pairs=(), shaping=None)
    means = {k.id: [_mean(column) for column in zip(*columns[k.id])] for k in others}
    return [aggregate(rest, {name: row[i] for name, row in means.items()}, str(i)).reward for i in range(n)]


def _mean(scores: Sequence[float | None]) -> float | None:
    seen = [s for s in scores if s is not None]
    return statistics.fmean(seen) if seen else None


def _refuse_silence(readings: Readings) -> None:
    """A judge that was not reached leaves holes that say nothing about a criterion, and can be filled another day. One
    that answers what cannot be read is the judge's own matter, until it is most of what it says."""
    asked = [j for reading in readings for row in reading for j in row.values() if j.source == "judge"]
    unread = Counter(j.reason or "unread" for j in asked if not j.read)
    missed = Counter({reason: n for reason, n in unread.items() if not reason.startswith(_ANSWERED)})
    for some in (missed, unread if 2 * unread.total() > len(asked) else Counter[str]()):
        if some:
            reason, _ = some.most_common(1)[0]
            raise Unreached(f"the judge read {len(asked) - unread.total()} of {len(asked)} judgements: {reason}")
