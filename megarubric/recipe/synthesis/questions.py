"""What each way of drafting shows the model: which template, filled with what."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from megarubric.rubrics.schema import Rubric
from megarubric.rubrics.synthesis.inputs import shown_seed
from megarubric.rubrics.synthesis.model import PromptRow, Way
from megarubric.rubrics.synthesis.prompts import Segment, Templates

MAX_SHOWN = 4_000  # characters of an answer or a criticism that a drafting model is shown
ANSWERS_SHOWN = 3


class Sources(msgspec.Struct, frozen=True):
    """What people gave: rubrics to start from, a brief."""

    seeds: tuple[Rubric, ...] = ()
    brief: str | None = None


def draft_question(
    way: Way,
    row: PromptRow,
    seeds: Sequence[Rubric],
    brief: str | None,
    answers: Sequence[str],
    critiques: Sequence[str],
) -> tuple[str, dict[str, str | None]]:
    """The template that drafts, and its values. `seeds` are those chosen for this prompt."""
    values: dict[str, str | None] = {"prompt": row.prompt, "reference": row.reference}
    shown_seeds = "\n".join(map(shown_seed, seeds)) or None
    shown_answers = numbered("Answer", answers[:ANSWERS_SHOWN]) or None
    match way:
        case "seeded":
            return "draft_seeded", {**values, "seeds": shown_seeds, "brief": brief}
        case "critique":
            return "mine", {**values, "critiques": numbered("Answer", critiques), "count": str(len(critiques))}
        case "stronger":
            return "draft_stronger", {**values, "answers": shown_answers}
        case "hybrid":
            return "draft_stronger", {**values, "answers": shown_answers, "seeds": shown_seeds}


def criticism_question(row: PromptRow, answer: str) -> dict[str, str | None]:
    """The values of the template ``criticise``."""
    return {"prompt": row.prompt, "reference": row.reference, "answer": cut(answer)}


def preview(
    way: Way, row: PromptRow, seeds: Sequence[Rubric], brief: str | None, templates: Templates
) -> list[Segment]:
    """The first prompt of drafting as far as it is known before anything was asked: with the answers that are given."""
    if way == "critique":
        answer = row.answers[0] if row.answers else "(an answer of the policy)"
        return templates.render("criticise", **criticism_question(row, answer))
    name, values = draft_question(way, row, seeds, brief, row.answers, ())
    return templates.render(name, **values)


def numbered(what: str, texts: Sequence[str]) -> str:
    """ "Answer 1:", the text, an empty line, "Answer 2:" and so on; long texts cut."""
    return "\n\n".join(f"{what} {n}:\n{cut(text)}" for n, text in enumerate(texts, 1))


def cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + " [cut]"
