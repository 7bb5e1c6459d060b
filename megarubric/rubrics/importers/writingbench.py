"""WritingBench: a writing query with five criteria, each with five tier texts for the scores 1-2 to 9-10."""

from __future__ import annotations

import re
from typing import Any

from megarubric.rubrics.importers.model import NOT_STATED, Importer, Report, is_chinese, slug, unique_ids

_BAND = re.compile(r"(\d+)\s*-\s*(\d+)")
_FAMILIES = {
    "Literature & Arts": "creative",
    "Advertising & Marketing": "creative",
    "Politics & Law": "humanities",
    "Education": "humanities",
    "Academic & Engineering": "reasoning",
    "Finance & Business": "reasoning",
}


def _fits(row: dict[str, Any]) -> bool:
    return isinstance(row.get("checklist"), list) and "query" in row


def _convert(row: dict[str, Any], number: int, report: Report) -> list[dict[str, Any]]:
    entries = row["checklist"]
    report.criteria_in += len(entries)
    names = unique_ids(slug(e["name"], f"c{k}") for k, e in enumerate(entries, 1))
    criteria = []
    for name, entry in zip(names, entries):
        bands = sorted((int(m[1]), int(m[2]), text) for key, text in entry.items() if (m := _BAND.fullmatch(key)))
        tiers = [{"value": (low + high) / 2, "text": text} for low, high, text in bands]
        criteria.append({"id": name, "description": entry["criteria_description"], "tiers": tiers})
        report.lost["the two scores inside a band (its middle is kept)"] += len(bands)
    tags = ["writingbench", *(slug(row[k], "") for k in ("domain1", "domain2") if slug(row.get(k) or "", ""))]
    if is_chinese(row["query"]):
        tags.append("zh")
    return [
        {
            "id": f"writingbench.{row.get('index', number)}",
            "version": 1,
            "title": f"{row.get('domain1', 'Writing')}: {row.get('domain2', '')}".strip(": "),
            "scope": "instance",
            "family": _FAMILIES.get(row.get("domain1", ""), "creative"),
            "provenance": {"author": "llm", "model": NOT_STATED, "source": "WritingBench", "licence": "Apache-2.0"},
            "tags": tags,
            "prompt": row["query"],
            "criteria": criteria,
        }
    ]


IMPORTER = Importer(_fits, _convert)
