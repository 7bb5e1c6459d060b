"""A workplace for `rubrics synthesize` and what the tests read of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megarubric.cli import main
from megarubric.rubrics import Rubric, load_rubrics
from megarubric.rubrics.lint import lint_paths

PROMPT = {"id": "ferry", "prompt": "Write a note: the ten o'clock ferry to Brora is two hours late because of fog."}
PROVENANCE = {"author": "human", "source": "the harbour", "licence": "CC0-1.0"}
SEED: dict[str, Any] = {
    "id": "seed.delay",
    "title": "Delay notices",
    "family": "instruction",
    "provenance": PROVENANCE,
    "criteria": [
        {"id": "tea", "description": "Offers tea in the waiting hall."},
        {"id": "moon", "description": "Mentions a moonlit pier."},
    ],
}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "p.jsonl").write_text(json.dumps(PROMPT) + "\n")
    (tmp_path / "seeds.jsonl").write_text(json.dumps(SEED) + "\n")
    return tmp_path


def synthesize(work: Path, url: str, *more: str, way: str = "stronger") -> int:
    out = str(work / "out.jsonl")
    fast = [] if "--timeout" in more else ["--timeout", "5"]
    return main(
        ["rubrics", "synthesize", str(work / "p.jsonl"), "--out", out, "--model", url, "--way", way, *fast, *more]
    )


def report(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "out.report.jsonl").read_text().splitlines()]


def made(work: Path) -> Rubric:
    """The one rubric that was written, which lint has nothing against."""
    (rubric,) = load_rubrics(work / "out.jsonl")
    assert lint_paths([work / "out.jsonl"]) == ([], 1)
    return rubric


def reasons(work: Path, action: str) -> dict[str, str]:
    return {r["description"]: f"{r['stage']}: {r['reason']}" for r in report(work) if r.get("action") == action}
