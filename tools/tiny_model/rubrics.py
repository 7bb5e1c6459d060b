"""The quickstart rubrics: one instance rubric a writing request, with checks, judged criteria and vetoes."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

from megarubric.rubrics import parse_rubric
from megarubric.rubrics.lint.near import near_duplicates
from tools.tiny_model.texts import load
from tools.tiny_model.writer import MAX_WORDS, MIN_WORDS, Request, draw_request

_TITLES = {
    "note": "A note to a neighbour",
    "apology": "An apology by e-mail",
    "story": "A very short story",
    "product": "A product description",
    "advice": "Advice to a friend",
    "explain": "A plain explanation",
    "thanks": "A thank-you letter",
    "diary": "A diary entry",
    "label": "A museum label",
    "menu": "A text for a menu",
    "lost": "A lost and found notice",
    "invite": "An invitation",
    "forecast": "A weather report",
    "news": "A local news item",
    "complaint": "A complaint to a shop",
}
_CREATIVE = {"story", "diary", "product", "menu", "label"}
_SOCIAL = {"note", "apology", "advice", "thanks", "invite", "complaint", "lost"}


def _tiers(bad: str, good: str) -> list[dict[str, Any]]:
    return [{"value": 0, "text": bad}, {"value": 1, "text": good}]


def rubric_for(request: Request, identifier: str) -> dict[str, Any]:
    """The rubric of `request` as spec/rubric.md writes it.

    Of the weight that is not a gate, 3.5 of 5.5 rewards absence (no wandering, no moral, length kept within bounds) and
    the rest what the request asks to be named. Flattery and self-praise are vetoes, each once as a detector program
    and once as a judged criterion: the program cannot be talked round, the judge knows wordings the program does not.
    """
    judge = load("judge")
    a, b = request.details
    value_a, value_b = request.slots[a], request.slots[b]
    family = "creative" if request.family in _CREATIVE else "social" if request.family in _SOCIAL else "instruction"

    def judged(name: str) -> dict[str, Any]:
        texts = judge[name]
        return {"description": texts["description"][0], "tiers": _tiers(texts["bad"][0], texts["good"][0])}

    criteria: list[dict[str, Any]] = [
        {
            "id": "flattery-detector",
            "description": "Opens with praise of the question or the asker, in words the detector knows.",
            "weight": 0.0,
            "check": {"kind": "hack:flattery_opening"},
            "veto": {"threshold": 0.5, "detector": True},
        },
        {
            "id": "self-praise-detector",
            "description": "Praises itself, in words the detector knows.",
            "weight": 0.0,
            "check": {"kind": "hack:self_praise"},
            "veto": {"threshold": 0.5, "detector": True},
        },
        {"id": "no-flattery", "weight": 0.0, **judged("flattery"), "veto": {"threshold": 0.5}},
        {"id": "no-self-praise", "weight": 0.0, **judged("self_praise"), "veto": {"threshold": 0.5}},
        {
            "id": f"says-{a}",
            "description": f"Has the words {value_a}.",
            "weight": 1.0,
            "check": {"kind": "keywords:existence", "keywords": [value_a]},
        },
        {
            "id": f"says-{b}",
            "description": f"Has the words {value_b}.",
            "weight": 1.0,
            "check": {"kind": "keywords:existence", "keywords": [value_b]},
        },
        {
            "id": "length",
            "description": f"Between {MIN_WORDS} and {MAX_WORDS} words.",
            "weight": 1.0,
            "check": {
                "kind": "length_constraints:number_words",
                "relation": "between",
                "min": MIN_WORDS,
                "max": MAX_WORDS,
            },
        },
        {"id": "on-subject", "weight": 1.0, **judged("wander")},
        {"id": "no-moral", "weight": 1.0, **judged("moral")},
    ]
    return {
        "id": identifier,
        "version": 1,
        "title": _TITLES[request.family],
        "scope": "instance",
        "family": family,
        "provenance": {"author": "hybrid", "model": "claude", "source": "megarubric", "licence": "Apache-2.0"},
        "tags": ["quickstart", request.family],
        "prompt": request.prompt,
        "criteria": criteria,
        "pairs": [{"a": "on-subject", "b": "no-moral", "weight": 0.5, "kind": "min"}],
    }


def quickstart_rubrics(n: int, seed: int, held_out: bool) -> list[dict[str, Any]]:
    """`n` rubrics with different prompts, the families in turn and none a near-duplicate (lint) of one before it;
    `held_out` as in `texts.draw_value`."""
    rng = Random(f"quickstart:{seed}:{held_out}")
    families = [family["id"] for family in load("families")]
    part = "heldout" if held_out else "train"
    rubrics: list[dict[str, Any]] = []
    seen: set[str] = set()
    count: Counter[str] = Counter()
    while len(rubrics) < n:
        while len(rubrics) < n:
            request = draw_request(rng, held_out, families[len(rubrics) % len(families)])
            if request.prompt in seen:
                continue
            seen.add(request.prompt)
            count[request.family] += 1
            rubrics.append(rubric_for(request, f"quickstart.{part}.{request.family}-{count[request.family]:02d}"))
        alike = {later for later, _, _ in near_duplicates([parse_rubric(r, "quickstart") for r in rubrics])}
        rubrics = [rubric for i, rubric in enumerate(rubrics) if i not in alike]
    return rubrics
