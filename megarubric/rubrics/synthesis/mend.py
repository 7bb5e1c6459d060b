"""Duplicates out, lint findings mended or their criteria dropped: what is left has no finding.

A repair is made where it cannot change what the rubric means to ask; everything else costs the criterion, and what is
wrong with the rubric as a whole costs the rubric. Every step leaves a note.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from megarubric.rubrics.lint import Finding, lint_rubric, near_duplicates
from megarubric.rubrics.lint.rules import CRITERIA_ALIKE, DOMINATED_ABOVE
from megarubric.rubrics.lint.run import fixed
from megarubric.rubrics.lint.wording import alike
from megarubric.rubrics.schema import Criterion, Rubric, Veto
from megarubric.rubrics.synthesis.draft import worst_tier_veto
from megarubric.rubrics.synthesis.model import Action, Note, note_of

DOMINATED_SHARE = 0.9 * DOMINATED_ABOVE  # a criterion that has too much of the weight is brought down to this share


def without_duplicates(criteria: Sequence[Criterion]) -> tuple[tuple[Criterion, ...], list[Note]]:
    """The criteria, each demand once: of two that ask the same with the same sign (the same check, or descriptions as
    alike as lint's double counting) the one with the larger weight stays, the first when they weigh the same."""
    kept: list[Criterion] = []
    notes: list[Note] = []
    for criterion in sorted(criteria, key=lambda c: -abs(c.weight)):
        twin = next((k for k in kept if _same(k, criterion)), None)
        if twin is None:
            kept.append(criterion)
            continue
        likeness = alike(twin.description, criterion.description)
        notes.append(note_of(criterion, "dropped", "deduplicate", f"asks the same as {twin.id}", alike=likeness))
    order = {c.id: i for i, c in enumerate(criteria)}
    return tuple(sorted(kept, key=lambda c: order[c.id])), notes


def _same(a: Criterion, b: Criterion) -> bool:
    if (a.weight > 0) != (b.weight > 0):
        return False
    if a.check is not None or b.check is not None:
        return a.check == b.check
    same_words = a.description.casefold() == b.description.casefold()
    return same_words or alike(a.description, b.description) > CRITERIA_ALIKE


def mended(rubric: Rubric, fewest: int) -> tuple[Rubric | None, list[Note]]:
    """The rubric without a lint finding, or None when it cannot be had with at least `fewest` criteria."""
    notes: list[Note] = []
    if len(rubric.criteria) < fewest:
        return None, [_too_few(len(rubric.criteria), fewest)]
    for _ in range(8 * len(rubric.criteria) + 8):  # every round repairs or drops, and a repair may need a second
        findings = list(lint_rubric(rubric))
        if not findings:
            return rubric, notes
        # What is wrong with the whole comes last: mending a criterion may end it.
        finding = next((f for f in findings if f.criterion is not None), findings[0])
        better = _repaired(rubric, finding)
        if better is not None and better != rubric:
            notes.append(_note(rubric, finding, "repaired"))
            rubric = better
            continue
        if finding.criterion is None:
            return None, [*notes, _note(rubric, finding, "rejected")]
        notes.append(_note(rubric, finding, "dropped"))
        left = tuple(c for c in rubric.criteria if c.id != finding.criterion)
        if len(left) < max(1, fewest):
            return None, [*notes, _too_few(len(left), fewest)]
        rubric = msgspec.structs.replace(rubric, criteria=left)
    return None, [*notes, Note("rejected", "lint", "findings that repairs do not end")]


def _too_few(left: int, fewest: int) -> Note:
    return Note("rejected", "lint", f"{left} criteria left, a rubric has at least {fewest}")


def _note(rubric: Rubric, finding: Finding, action: Action) -> Note:
    reason = f"{finding.rule}: {finding.message}"
    said = next((c.description for c in rubric.criteria if c.id == finding.criterion), "")
    return Note(action, "lint", reason, finding.criterion or "", said)


Repair = Callable[[Rubric, Criterion], Criterion]


def _repaired(rubric: Rubric, finding: Finding) -> Rubric | None:
    """The rubric with that finding mended, or None when there is no safe repair for its kind."""
    if finding.criterion is None:
        if finding.rule == "reference":  # a reference that no criterion needs
            return msgspec.structs.replace(rubric, reference=None)
        return fixed(rubric) if finding.rule == "untidy-text" else None
    repair = _REPAIRS.get(finding.rule)
    if repair is None:
        return fixed(rubric) if finding.rule == "untidy-text" else None
    criteria = tuple(repair(rubric, c) if c.id == finding.criterion else c for c in rubric.criteria)
    return msgspec.structs.replace(rubric, criteria=criteria)


def _ask_for_reference(rubric: Rubric, c: Criterion) -> Criterion:
    """It speaks of the reference answer: show it to the judge, when there is one."""
    if c.needs_reference or not rubric.reference or c.check is not None:
        return c
    return msgspec.structs.replace(c, needs_reference=True)


def _cap_weight(rubric: Rubric, c: Criterion) -> Criterion:
    rest = sum(abs(o.weight) for o in rubric.criteria if o.id != c.id)
    share = DOMINATED_SHARE / (1 - DOMINATED_SHARE)
    return msgspec.structs.replace(c, weight=rest * share * (1 if c.weight > 0 else -1))


def _without_saturation(_: Rubric, c: Criterion) -> Criterion:
    return msgspec.structs.replace(c, saturation=None)


def _careful_veto(_: Rubric, c: Criterion) -> Criterion:
    """A veto on the worst tier only; if it is one already, no veto, for a criterion that counts without it."""
    if c.veto is None:
        return c
    worst = Veto(threshold=worst_tier_veto(c)["threshold"], detector=c.veto.detector)
    if c.veto != worst and len(c.tier_values) > 2 and not (c.weight == 0 and c.veto.detector):
        return msgspec.structs.replace(c, veto=worst)
    return msgspec.structs.replace(c, veto=None) if c.weight != 0 else c


def _polarity(_: Rubric, c: Criterion) -> Criterion:
    """A hack detector's veto fires when the hack is there; a weight on it counts against the answer."""
    if c.weight > 0:
        return msgspec.structs.replace(c, weight=-c.weight)
    return msgspec.structs.replace(c, veto=Veto(c.veto.threshold, detector=True)) if c.veto is not None else c


_REPAIRS: dict[str, Repair] = {
    "reference": _ask_for_reference,
    "dominated-weights": _cap_weight,
    "unreachable-saturation": _without_saturation,
    "veto-on-good": _careful_veto,
    "veto-polarity": _polarity,
}


def duplicates_across(rubrics: Sequence[Rubric], existing: Sequence[Rubric] = ()) -> dict[int, tuple[str, float]]:
    """Which of `rubrics` (by position) repeat an earlier one, or one of `existing`: its id and the similarity."""
    found = near_duplicates([*existing, *rubrics])
    everything = [*existing, *rubrics]
    n = len(existing)
    return {later - n: (everything[earlier].id, overlap) for later, earlier, overlap in found if later >= n}
