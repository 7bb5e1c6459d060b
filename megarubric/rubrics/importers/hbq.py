"""HBQ-RS: modules of yes/no questions in trees of weighted groups, with hard gates.

A question becomes a criterion with the tiers no and yes. Weights inside a group are kept in proportion; groups stand to
each other as their own weights do. A hard gate becomes a veto without weight; a diagnostic question keeps weight 0; a
ladder of cumulative thresholds becomes one criterion with a tier for each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megarubric.rubrics.importers.model import NOT_STATED, Importer, Report, slug, unique_ids

_ALWAYS = "The criterion is relevant to the requested artifact, scope, and operation."
_FAMILIES = {
    "procedure": "instruction",
    "workflow": "instruction",
    "dataset_eval": "instruction",
    "penalty": "style",
    "preference_modifier": "style",
}


def _fits(row: dict[str, Any]) -> bool:
    return isinstance(row.get("tree"), list) and "module_id" in row


def _weight(node: dict[str, Any]) -> float:
    return float(node.get("weight", 1.0))


def _leaves(nodes: list[dict[str, Any]], mass: float, report: Report) -> Iterator[tuple[dict[str, Any], float]]:
    """(question or ladder, weight): `mass` shared out by weight, through all groups."""
    counted = [n for n in nodes if n.get("question_type") not in ("hard_gate", "diagnostic")]
    total = sum(map(_weight, counted))
    for node in nodes:
        share = mass * _weight(node) / total if node in counted and total else 0.0
        if node["type"] != "group" or node.get("score_mode") == "cumulative_threshold":
            yield node, share
        else:
            if node.get("score_mode") == "capped_penalty":
                report.lost["the cap of a penalty group (its questions are weighted like others)"] += 1
            yield from _leaves(node["children"], share, report)


def _criterion(node: dict[str, Any], name: str, weight: float, report: Report) -> dict[str, Any]:
    if node["type"] == "group":  # a ladder
        steps = [child["text"] for child in node["children"]]
        report.criteria_in += len(steps)
        report.lost["thresholds of a ladder as criteria of their own (they are tiers now)"] += len(steps) - 1
        tiers = [{"value": k, "text": text} for k, text in enumerate(["No step is reached.", *steps])]
        return {
            "id": name,
            "description": f"{node['title']}: the highest step reached.",
            "weight": weight,
            "tiers": tiers,
        }
    report.criteria_in += 1
    yes = node.get("pass_answer", "YES") == "YES"
    text = node["text"]
    if node.get("applies_when", _ALWAYS) != _ALWAYS:
        text += f" (Asked when: {node['applies_when']})"
        report.lost["a condition of use (kept as words)"] += 1
    if node.get("evidence_policy", {}).get("required"):
        report.lost["the evidence policy"] += 1
    if node.get("severity") or node.get("criterion_key") != node["id"]:
        report.lost["severity and shared criterion keys"] += 1
    tiers = [{"value": 0, "text": "No." if yes else "Yes."}, {"value": 1, "text": "Yes." if yes else "No."}]
    out: dict[str, Any] = {"id": name, "description": text, "weight": weight, "tiers": tiers}
    if node.get("question_type") == "hard_gate":
        out |= {"weight": 0.0, "veto": {"threshold": 0.5}}
        report.lost["the weight of a hard gate (it is a veto now)"] += 1
    elif node.get("question_type") == "diagnostic":
        out["weight"] = 0.0
    return out


def _convert(row: dict[str, Any], number: int, report: Report) -> list[dict[str, Any]]:
    module = row["module_id"]
    scored = sum(_weight(q) for group in row["tree"] for q in group.get("children", [group]))
    leaves = list(_leaves(row["tree"], scored, report))
    names = unique_ids(slug(n["id"].removeprefix(f"{module}."), f"q{k}", 100) for k, (n, _) in enumerate(leaves, 1))
    for key, what in (("modifier_actions", "modifier actions"), ("profile_overrides", "profiles of a module")):
        if row.get(key):
            report.lost[what] += 1
    report.lost["activation, incompatibility and research basis of a module"] += 1
    criteria = [_criterion(n, name, round(w, 6), report) for (n, w), name in zip(leaves, names)]
    return [
        {
            "id": f"hbq.{slug(module, str(number), 150)}",
            "version": row.get("version", 1),
            "title": row["title"],
            "scope": "task",
            "family": _FAMILIES.get(row.get("kind", ""), "creative"),
            "provenance": {"author": "hybrid", "model": NOT_STATED, "source": "HBQ-RS", "licence": "Apache-2.0"},
            "tags": ["hbq", *([slug(row["kind"], "kind")] if row.get("kind") else [])],
            "criteria": criteria,
        }
    ]


IMPORTER = Importer(_fits, _convert)
