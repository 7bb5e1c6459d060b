"""Labelled judge questions: one answer, one criterion, and the tier the generator knows to be right."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tools.tiny_model.texts import draw_value, load, spoken
from tools.tiny_model.writer import Request, draw_faults, draw_request, names, write

CRITERIA = ("flattery", "self_praise", "moral", "wander", "names_both", "names_one")
DETECTOR_RATE = 0.2  # questions whose higher tier says that the fault is there


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
    texts = load("judge")[criterion]
    if criterion in ("names_both", "names_one"):
        faults -= {"omit_0", "omit_1"}
        faults |= {f"omit_{i}" for i in range(2) if rng.random() < 0.5}
    else:
        faults.discard(criterion)
        if rng.random() < 0.5:
            faults.add(criterion)
    answer = write(request, frozenset(faults), rng, held_out_wording).text
    if criterion == "names_both":
        return _names_both(rng, request, answer, texts)
    if criterion == "names_one":
        slot = rng.choice(list(request.slots))
        value = request.slots[slot]
        if rng.random() < 0.2:
            value = draw_value(request.kind(slot), rng, held_out)
        description = rng.choice(texts["description"]).format(a=spoken(request.kind(slot), value))
        tiers = (rng.choice(texts["bad"]), rng.choice(texts["good"]))
        return Question(criterion, request, answer, description, tiers, int(names(answer, value)))
    bad, good = rng.choice(texts["bad"]), rng.choice(texts["good"])
    if rng.random() < DETECTOR_RATE:
        return Question(
            criterion, request, answer, rng.choice(texts["detector"]), (good, bad), int(criterion in faults)
        )
    return Question(
        criterion, request, answer, rng.choice(texts["description"]), (bad, good), int(criterion not in faults)
    )


def _names_both(rng: Random, request: Request, answer: str, texts: dict) -> Question:
    slots = list(request.details)
    if rng.random() < 0.3:
        slots.reverse()
    values = [request.slots[slot] for slot in slots]
    description = rng.choice(texts["description"]).format(
        a=spoken(request.kind(slots[0]), values[0]), b=spoken(request.kind(slots[1]), values[1])
    )
    label = sum(names(answer, value) for value in values)
    return Question("names_both", request, answer, description, tuple(rng.choice(texts["tiers"])), label)
