"""How a rubric's weight is spread: over presence and absence, over criteria."""

from __future__ import annotations

from megarubric.rubrics.checks import KINDS
from megarubric.rubrics.lint.wording import ABSENCE
from megarubric.rubrics.schema import Criterion, Rubric

# Checks that a longer or richer answer does not satisfy more easily: limits, prohibitions, exact form.
_EXACT_CHECKS = frozenset(
    {
        "change_case:english_capital",
        "change_case:english_lowercase",
        "combination:two_responses",
        "detectable_format:constrained_response",
        "detectable_format:json_format",
        "detectable_format:number_bullet_lists",
        "keywords:forbidden_words",
        "language:response_language",
        "length_constraints:nth_paragraph_first_word",
        "length_constraints:number_paragraphs",
        "punctuation:no_comma",
        "startend:quotation",
    }
)


def asks_for_absence(criterion: Criterion) -> bool:
    """Whether the criterion rewards that something is absent, limited or right, rather than that something is there."""
    if criterion.weight < 0:
        return True
    if criterion.check is not None:
        if criterion.check.kind in _EXACT_CHECKS or KINDS[criterion.check.kind].detector:
            return True
        params = criterion.check.params
        relation = next((v for k, v in params.items() if k.endswith("relation")), None)
        return relation in ("less than", "at most", "exactly") or params.get("max") is not None
    return criterion.needs_reference or ABSENCE.search(criterion.description) is not None


def absence_share(rubric: Rubric) -> float | None:
    """Share of the absolute weight on absence or correctness, in [0, 1]; None when no criterion has weight."""
    total = sum(abs(c.weight) for c in rubric.criteria)
    if total == 0:
        return None
    return sum(abs(c.weight) for c in rubric.criteria if asks_for_absence(c)) / total
