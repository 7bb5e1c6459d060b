"""Programmatic checks: the 25 IFEval instruction kinds, a few kinds of ours, and deterministic hack detectors.

`run_check` gives 1.0 when the condition holds. For a detector (`hack:*`) the condition is that the hack is present.
"""

from __future__ import annotations

from megarubric.errors import BadInput
from megarubric.rubrics.checks import (  # noqa: F401  (each registers its kinds)
    flattery,
    formats,
    judge_address,
    keywords,
    length,
    repetition,
    self_praise,
    surface,
)
from megarubric.rubrics.checks.registry import KINDS, Kind, Text, arguments, full_params, parse_check
from megarubric.rubrics.schema import Check, Rubric

__all__ = ["KINDS", "Kind", "full_params", "parse_check", "run_check"]


def run_check(check: Check, prompt: str, response: str, rubric: Rubric | None = None) -> float:
    """Value of a check on a response: 1.0 when its condition holds, else 0.0.

    A blank response follows no instruction (IFEval's strict rule) and holds no hack: 0.0 for every kind.

    Args:
        check: from a parsed rubric.
        prompt: the prompt text; `combination:repeat_prompt` and the detectors read it.
        response: the text that is checked.
        rubric: the rubric the check stands in; `hack:rubric_echo` reads it.

    Raises:
        BadInput: a check made by hand with an unknown kind or unfit arguments, or `hack:rubric_echo` without a rubric.
    """
    where = f"rubric {rubric.id}" if rubric is not None else "check"
    try:
        args = arguments(check.kind, check.params)
    except ValueError as error:
        raise BadInput(where, check.kind, str(error)) from None
    kind = KINDS[check.kind]
    if kind.needs_rubric and rubric is None:
        raise BadInput(where, check.kind, "needs the rubric it stands in")
    if not response.strip():
        return 0.0
    return 1.0 if kind.follows(args, Text(response, prompt, rubric)) else 0.0
