"""FastChat's question sets. They hold no rubrics: what can be had is a prompt, and in MT-bench often a reference.

MT-bench: the first turn with its reference becomes a reference-based rubric. Vicuna questions: the four qualities that
FastChat's reviewers were asked about become the criteria. The wording of criteria and tiers is this project's, so the
author is `hybrid`.
"""

from __future__ import annotations

from typing import Any

from megarubric.rubrics.importers.model import NOT_STATED, Importer, Report

_FAMILIES = {
    "writing": "creative",
    "roleplay": "creative",
    "reasoning": "reasoning",
    "math": "reasoning",
    "coding": "reasoning",
    "fermi": "reasoning",
    "counterfactual": "reasoning",
    "extraction": "instruction",
    "generic": "instruction",
    "common-sense": "instruction",
}
_PROVENANCE = {"author": "hybrid", "model": NOT_STATED, "source": "FastChat", "licence": "Apache-2.0"}


def _tiers(*texts: str) -> list[dict[str, Any]]:
    return [{"value": value, "text": text} for value, text in enumerate(texts)]


_AGAINST_REFERENCE = [
    {
        "id": "agrees-with-reference",
        "description": "Comes to the result of the reference answer.",
        "weight": 2.0,
        "needs_reference": True,
        "tiers": _tiers(
            "Another result, or none.",
            "Part of the result is that of the reference, part is missing or different.",
            "The result is that of the reference.",
        ),
    },
    {
        "id": "nothing-false",
        "description": "Contains no step or claim that contradicts the reference answer.",
        "weight": 1.0,
        "needs_reference": True,
        "tiers": _tiers("A step or claim contradicts it.", "Nothing contradicts it."),
    },
]
_QUALITIES = [
    {
        "id": "helpful",
        "description": "Gives the asker what the question wants.",
        "tiers": _tiers(
            "The asker has to ask again.",
            "Part of what was asked is answered, part is not.",
            "Everything that was asked is answered.",
        ),
    },
    {
        "id": "relevant",
        "description": "Stays with the question.",
        "tiers": _tiers("A passage is about something else.", "No passage is about something else."),
    },
    {
        "id": "accurate",
        "description": "Contains no false statement.",
        "tiers": _tiers("The main statement is false.", "A side statement is false.", "No statement is false."),
    },
    {
        "id": "detailed",
        "description": "Has the detail the question needs.",
        "tiers": _tiers(
            "Only general statements.",
            "Some statements have examples, numbers or reasons, the main one does not.",
            "The main statement has an example, a number or a reason.",
        ),
    },
]


def _tree(kind: str, row: dict[str, Any], prompt: str, criteria: list[dict[str, Any]]) -> dict[str, Any]:
    category = str(row.get("category", ""))
    return {
        "id": f"{kind}.{row['question_id']}",
        "version": 1,
        "title": f"{kind} {row['question_id']}: {category}",
        "scope": "instance",
        "family": _FAMILIES.get(category, "humanities"),
        "provenance": _PROVENANCE,
        "tags": [kind, *([category] if category else [])],
        "prompt": prompt,
        "criteria": criteria,
    }


def _mt_bench(row: dict[str, Any], number: int, report: Report) -> list[dict[str, Any]]:
    turns, references = row["turns"], row.get("reference") or []
    report.lost["second turns (they need the first answer)"] += len(turns) - 1
    if not references:
        report.lost["questions without a reference (nothing to judge by)"] += 1
        return []
    report.criteria_in += len(references)
    report.lost["references of second turns"] += len(references) - 1
    return [_tree("mtbench", row, turns[0], _AGAINST_REFERENCE) | {"reference": references[0]}]


def _vicuna(row: dict[str, Any], number: int, report: Report) -> list[dict[str, Any]]:
    if "review_id" in row:
        report.lost["reviews (scores of answers, no rubric)"] += 1
        return []
    if "answer_id" in row:
        report.lost["answers (no rubric)"] += 1
        return []
    return [_tree("vicuna", row, row["text"], _QUALITIES)]


MT_BENCH = Importer(lambda row: isinstance(row.get("turns"), list), _mt_bench)
VICUNA = Importer(lambda row: "question_id" in row and "text" in row, _vicuna)
