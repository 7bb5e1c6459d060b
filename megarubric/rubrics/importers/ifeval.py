"""IFEval and IFBench rows: a prompt with instruction ids and their arguments; every known one becomes a check."""

from __future__ import annotations

from typing import Any

from megarubric.rubrics.checks import KINDS, parse_check
from megarubric.rubrics.importers.model import Importer, Report, is_chinese, slug, unique_ids


def _fits(row: dict[str, Any]) -> bool:
    return isinstance(row.get("instruction_id_list"), list) and isinstance(row.get("kwargs"), list)


def _convert(row: dict[str, Any], number: int, report: Report) -> list[dict[str, Any]]:
    kinds, arguments = row["instruction_id_list"], row["kwargs"]
    if len(kinds) != len(arguments):
        raise ValueError(f"{len(kinds)} instructions and {len(arguments)} sets of arguments")
    report.criteria_in += len(kinds)
    checks = []
    for kind, given in zip(kinds, arguments):
        params = {k: v for k, v in (given or {}).items() if v is not None}  # every key is there, most are null
        if kind not in KINDS:
            report.lost[f"the instruction {kind}, which has no check"] += 1
            continue
        try:
            parse_check(kind, params)
        except ValueError as error:
            report.lost[f"an instruction whose arguments do not fit ({error})"] += 1
            continue
        checks.append({"kind": kind, **params})
    if not checks:
        report.lost["rows without a known instruction"] += 1
        return []
    names = unique_ids(slug(c["kind"].partition(":")[2], "check") for c in checks)
    criteria = [{"id": name, "description": c["kind"], "weight": 1.0, "check": c} for name, c in zip(names, checks)]
    return [
        {
            "id": f"ifeval.{slug(str(row.get('key', number)), str(number))}",
            "version": 1,
            "title": "Verifiable instructions",
            "scope": "instance",
            "family": "instruction",
            "provenance": {"author": "human", "source": "IFEval", "licence": "Apache-2.0"},
            "tags": ["ifeval", *(["zh"] if is_chinese(row["prompt"]) else [])],
            "prompt": row["prompt"],
            "criteria": criteria,
        }
    ]


IMPORTER = Importer(_fits, _convert)
