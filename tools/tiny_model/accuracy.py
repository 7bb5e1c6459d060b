"""How well a tiny model judges: labelled questions asked of the real judge on a real engine.

    python -m tools.tiny_model.accuracy --model models/tiny-qwen3-moe --pairs build/tiny/judge_heldout.jsonl

Prints a row a criterion: questions, share answered rightly (the tier nearest to the judge's expectation), mean
probability mass on the tier tokens, share that could not be read.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from megarubric.judging.backends import backend_for_engine
from megarubric.judging.judge import Judge
from megarubric.judging.settings import JudgeSettings
from megarubric.judging.types import JudgeItem, Judgement
from megarubric.launch.engines import judge_engine
from megarubric.rubrics import parse_rubric


def item(row: dict[str, Any]) -> JudgeItem:
    """A labelled question as a judge item: a rubric of one criterion."""
    tiers = [{"value": i, "text": text} for i, text in enumerate(row["tiers"])]
    rubric = {
        "id": "tiny.pair",
        "version": 1,
        "title": row["criterion"],
        "scope": "task",
        "family": "style",
        "provenance": {"author": "hybrid", "model": "claude", "source": "megarubric", "licence": "Apache-2.0"},
        "criteria": [{"id": "c", "description": row["description"], "weight": 1.0, "tiers": tiers}],
    }
    return JudgeItem(parse_rubric(rubric, "pairs"), row["prompt"], row["response"])


async def judge_rows(model: Path, rows: list[dict[str, Any]]) -> list[Judgement]:
    async with judge_engine(model) as engine:
        judge = Judge(backend_for_engine(engine, model), JudgeSettings(template="tier_compact"))
        return [judged["c"] for judged in await judge.judge([item(row) for row in rows])]


def table(rows: list[dict[str, Any]], judgements: list[Judgement]) -> list[tuple[str, int, float, float, float]]:
    """(criterion, questions, accuracy, tier mass, unread) a criterion, then over all."""
    groups: dict[str, list[tuple[dict[str, Any], Judgement]]] = defaultdict(list)
    for row, judgement in zip(rows, judgements):
        groups[row["criterion"]].append((row, judgement))
        groups["all"].append((row, judgement))
    out = []
    for name in [*(n for n in groups if n != "all"), "all"]:
        pairs = groups[name]
        right = [j.value is not None and round(j.value) == row["label"] for row, j in pairs]
        mass = [j.tier_mass for _, j in pairs if j.tier_mass is not None]
        unread = sum(not j.read for _, j in pairs) / len(pairs)
        out.append((name, len(pairs), sum(right) / len(right), sum(mass) / max(1, len(mass)), unread))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    a = parser.parse_args()
    rows = [json.loads(line) for line in a.pairs.read_text(encoding="utf-8").splitlines()]
    print("| criterion | questions | accuracy | tier mass | unread |\n| --- | --: | --: | --: | --: |")
    for name, n, accuracy, mass, unread in table(rows, asyncio.run(judge_rows(a.model, rows))):
        print(f"| {name} | {n} | {accuracy:.3f} | {mass:.3f} | {unread:.3f} |")


if __name__ == "__main__":
    main()
