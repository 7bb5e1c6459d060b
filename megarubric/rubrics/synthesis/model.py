"""What synthesis works on: prompts in, drafts between, rubrics and reasons out."""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

from megarubric.rubrics.schema import Criterion, Family

Way = Literal["seeded", "critique", "stronger", "hybrid"]
WAYS: tuple[Way, ...] = get_args(Way)
Stage = Literal["draft", "revise", "atomise", "deduplicate", "lint", "validate"]
Action = Literal["dropped", "repaired", "rejected"]


class PromptRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A prompt to write a rubric for.

    Attributes:
        reference: a reference answer; drafts and criteria with `needs_reference` may use it.
        answers: answers to validate on, before any are sampled.
        good_answers: answers known to be good: no veto may fire on them.
    """

    id: str
    prompt: str
    reference: str | None = None
    answers: tuple[str, ...] = ()
    good_answers: tuple[str, ...] = ()
    family: Family | None = None


class Draft(msgspec.Struct, frozen=True):
    """A rubric as a model wrote it, as far as it could be read; every criterion is valid by itself."""

    title: str
    family: Family | None
    criteria: tuple[Criterion, ...]


class Note(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the report about a criterion (or, without `criterion`, about the rubric): what was done to it, at
    which stage, why, and the numbers that decided."""

    action: Action
    stage: Stage
    reason: str
    criterion: str = ""
    description: str = ""
    numbers: dict[str, float | int | None] = {}


class BadDraft(ValueError):
    """A model's reply that is no draft; the message is the reason, one line, fit to be shown to the model."""


def note_of(criterion: Criterion, action: Action, stage: Stage, reason: str, **numbers: float | int | None) -> Note:
    """A `Note` about `criterion`."""
    return Note(action, stage, reason, criterion.id, criterion.description, dict(numbers))


def plain(value: msgspec.Struct) -> dict[str, Any]:
    """For JSON."""
    built: dict[str, Any] = msgspec.to_builtins(value)
    return built
