"""Lists of weighted criteria: HealthBench (points), RubricHub (points or weights) and Rubrics as Rewards (weights).

They differ in key names only. Negative points are pitfalls. A criterion is met or not: two tiers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from megarubric.rubrics.importers.model import NOT_STATED, Importer, Report, conversation, slug, unique_ids

_LISTS = ("rubrics", "rubric", "rubric_list", "Rubrics", "criteria")
_TEXTS = ("criterion", "description", "criteria", "text")
_WEIGHTS = ("points", "weight", "score")
_PROMPTS = ("prompt", "question", "problem", "instruction")
_REFERENCES = ("reference_answer", "reference", "answer", "ideal_completion")
_IDS = ("prompt_id", "id", "question_id", "index")
# RaR opens a description with its kind of criterion.
_KIND = re.compile(r"^(Essential|Important|Optional|Pitfall) Criteria:\s*", re.IGNORECASE)


def _first(row: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((row[k] for k in keys if row.get(k) is not None), None)


def _entries(row: dict[str, Any]) -> list[dict[str, Any]]:
    found = _first(row, _LISTS)
    if not isinstance(found, list) or not all(isinstance(e, dict) for e in found):
        raise ValueError(f"no list of criteria under {', '.join(_LISTS)}")
    return found


def _fits(*signs: str) -> Callable[[dict[str, Any]], bool]:
    def fits(row: dict[str, Any]) -> bool:
        found = _first(row, _LISTS)
        first = found[0] if isinstance(found, list) and found else None
        return isinstance(first, dict) and all(s in first for s in signs) and _first(first, _WEIGHTS) is not None

    return fits


def _converter(
    name: str, family: str, provenance: dict[str, str]
) -> Callable[[dict[str, Any], int, Report], list[dict[str, Any]]]:
    def convert(row: dict[str, Any], number: int, report: Report) -> list[dict[str, Any]]:
        entries = _entries(row)
        report.criteria_in += len(entries)
        prompt, turns = conversation(_first(row, _PROMPTS))
        if turns > 1:
            report.lost["turns of a conversation as turns (kept as one prompt text)"] += 1
        reference = _first(row, _REFERENCES)
        texts = [str(_first(e, _TEXTS) or "") for e in entries]
        titles = [str(e.get("title") or _KIND.sub("", text)) for e, text in zip(entries, texts)]
        criteria = []
        for name_, entry, text in zip(
            unique_ids(slug(t, f"c{k}", 40) for k, t in enumerate(titles, 1)), entries, texts
        ):
            weight = float(_first(entry, _WEIGHTS))
            kind = _KIND.match(text)
            if kind:
                report.lost["the name of a criterion's kind (its weight is kept)"] += 1
            if entry.get("tags"):
                report.lost["tags of single criteria"] += 1
            tiers = [{"value": 0, "text": "Not so."}, {"value": 1, "text": "So."}]
            criteria.append({"id": name_, "description": _KIND.sub("", text), "weight": weight, "tiers": tiers})
        tree: dict[str, Any] = {
            "id": f"{name}.{slug(str(_first(row, _IDS) or number), str(number))}",
            "version": 1,
            "title": str(row.get("title") or f"{report.format} {number}"),
            "scope": "instance",
            "family": family,
            "provenance": provenance,
            "tags": [name],
            "prompt": prompt,
            "criteria": criteria,
        }
        if isinstance(reference, str) and reference.strip():
            tree["reference"] = reference
        return [tree]

    return convert


def _provenance(author: str, source: str, licence: str) -> dict[str, str]:
    who = {"author": author, "source": source, "licence": licence}
    return who if author == "human" else who | {"model": NOT_STATED}


HEALTHBENCH = Importer(
    _fits("criterion", "points", "tags"),
    _converter("healthbench", "safety", _provenance("human", "HealthBench", "MIT")),
)
RUBRICHUB = Importer(
    _fits("criterion"), _converter("rubrichub", "instruction", _provenance("llm", "RubricHub", NOT_STATED))
)
RAR = Importer(
    _fits("description"), _converter("rar", "reasoning", _provenance("llm", "Rubrics as Rewards", NOT_STATED))
)
