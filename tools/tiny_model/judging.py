"""Labelled judge questions: one answer, one criterion, and the tier the generator knows to be right."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tools.tiny_model.texts import load
from tools.tiny_model.writer import (
    SENTENCE_FAULTS,
    Request,
    draw_faults,
    draw_request,
    one_sentence,
    write,
)

CRITERIA = SENTENCE_FAULTS
MIX = (*CRITERIA, "wander")  # what training asks about; wandering is the hardest to see
USUAL_WORDING_RATE = 0.5  # questions in a criterion's first wording, the one that the quickstart rubrics use


@dataclass(frozen=True)
class Question:
    """A judge question and its label, the index of the right tier."""

    criterion: str
    request: Request
    answer: str
    description: str
    tiers: tuple[str, ...]
    label: int


def draw_question(rng: Random, criterion: str, held_out: bool = False, held_out_wording: bool = False) -> Question:
    """A question on `criterion` with balanced labels; the other faults come at their cold-start rates."""
    request = draw_request(rng, held_out)
    faults = set(draw_faults(rng))
    faults.discard(criterion)
    if rng.random() < 0.5:
        faults.add(criterion)
    answer = write(request, frozenset(faults), rng, held_out_wording).text
    return _question(rng, criterion, request, answer, criterion in faults)


def draw_drill(rng: Random, criterion: str) -> Question:
    """A question on an answer of one sentence: short rows from which a small model learns what a fault looks like."""
    request = draw_request(rng)
    fault = None
    if rng.random() < 0.7:
        fault = criterion if rng.random() < 0.7 else rng.choice(SENTENCE_FAULTS)
    answer = one_sentence(request, fault, rng)
    return _question(rng, criterion, request, answer, criterion == fault)


def _question(rng: Random, criterion: str, request: Request, answer: str, present: bool) -> Question:
    """The question whether `answer` meets `criterion`; `present` says whether it has the fault of that name."""
    texts = load("judge")[criterion]

    def wording(name: str) -> str:
        usual = rng.random() < USUAL_WORDING_RATE
        return texts[name][0] if usual else rng.choice(texts[name])

    tiers = (wording("bad"), wording("good"))
    return Question(criterion, request, answer, wording("description"), tiers, int(not present))
