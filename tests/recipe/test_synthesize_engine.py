"""`rubrics synthesize` on a real vLLM engine with the project's own tiny model, which can answer and judge what it was
taught, and cannot draft."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from writing_server import criterion, writing_server

from megarubric.exchange.rpc import ipc_endpoint
from megarubric.judging.opening import EngineFactory
from megarubric.judging.prompt import TEMPLATE_DIR
from megarubric.launch import plan
from megarubric.launch.supervisor import Supervisor
from megarubric.recipe.synthesis.pipeline import Settings
from megarubric.recipe.synthesis.verb import Job, run_synthesize
from megarubric.rollout.client import EngineClient
from megarubric.rollout.messages import EngineConfig
from megarubric.rubrics import load_rubrics
from megarubric.rubrics.lint import lint_paths

pytestmark = pytest.mark.engine

TINY = Path(__file__).resolve().parents[2] / "models/tiny-qwen3-moe"
PLAIN = "Tobias, the ferry is missing. I looked in the harbour this morning and found nothing. Call me tonight."
MORAL = "Tobias, the ferry is missing. I looked in the harbour this morning. We are all stronger than we think."
PRAISE = "Tobias, the ferry is missing. I looked in the harbour this morning. This response is clear and well written."
ROW: dict[str, Any] = {
    "id": "note",
    "prompt": "Leave a short note for Tobias next door about the missing ferry. It should have 20 to 40 words.",
    "answers": [PLAIN, MORAL, PRAISE],
}
# The words of the criteria that the tiny model was taught, and one check.
DRAFT = {
    "title": "A note to a neighbour",
    "family": "social",
    "criteria": [
        criterion(
            "Ends without a moral or consolation.",
            tiers=[
                {"value": 0, "text": "Adds a moral or a consolation."},
                {"value": 1, "text": "Stays plain to the end."},
            ],
        ),
        criterion(
            "Does not praise itself.",
            tiers=[
                {"value": 0, "text": "Praises its own quality."},
                {"value": 1, "text": "Says nothing about its own quality."},
            ],
        ),
        criterion("At most eighteen words.", tiers=None)
        | {"check": {"kind": "length_constraints:number_words", "relation": "at most", "num_words": 18}},
    ],
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineFactory]:
    """A running engine on the tiny model, as a factory of clients: a run of its own would start one of its own."""
    folder = tmp_path_factory.mktemp("engine")
    supervisor = Supervisor(folder / "logs")
    sockets = plan.socket_dir(folder)
    endpoint = ipc_endpoint(sockets, "judge")
    config = EngineConfig(
        model_dir=str(TINY), role="judge", dtype="float32", max_model_len=1024, kv_cache_gib=0.2, threads=1,
        structured_output=True,
    )  # fmt: skip
    path = plan.write_json(folder / "judge.json", config)
    child = supervisor.start("judge", plan.command("engine", path, endpoint), plan.quiet_environment(1))

    @contextlib.asynccontextmanager
    async def connect(directory: Path, device: object = "cpu") -> AsyncIterator[EngineClient]:
        assert directory == TINY
        client = EngineClient(endpoint, peer_status=child.status)
        await client.ready()
        try:
            yield client
        finally:
            await client.close()

    async def started() -> None:
        async with connect(TINY):
            pass

    try:
        asyncio.run(started())
        yield connect
    finally:
        supervisor.stop()


def job(work: Path, model: str, **changes: Any) -> Job:
    (work / "p.jsonl").write_text(json.dumps(ROW | changes.pop("row", {})) + "\n")
    settings = Settings(**{"way": "stronger", "answers": 3, "answer_tokens": 64, "max_tokens": 64, **changes})
    return Job(prompts=work / "p.jsonl", out=work / "out.jsonl", model=model, settings=settings, policy=str(TINY),
               judge=str(TINY))  # fmt: skip


def report(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "out.report.jsonl").read_text().splitlines()]


def test_the_tiny_judge_validates_what_another_model_drafted(tmp_path: Path, engine: EngineFactory) -> None:
    """In the order it was taught, in two wordings of the question."""
    wording = (TEMPLATE_DIR / "tier_compact.txt").read_text().replace("Judge.", "Judge this.")
    (tmp_path / "again.txt").write_text(wording)
    templates = ("tier_compact", str(tmp_path / "again.txt"))
    with writing_server(stronger=json.dumps(DRAFT), revise=json.dumps(DRAFT)) as server:
        told = job(tmp_path, server.url, fewest=2, judge_templates=templates, judge_orders="lowest")
        assert run_synthesize(told, engine) == 0
    assert set(server.count) == {"stronger", "revise"}
    rows = {r["description"]: r for r in report(tmp_path) if r["kind"] == "criterion"}
    assert set(rows) == {c["description"] for c in DRAFT["criteria"]}
    for row in rows.values():
        n = row["numbers"]
        assert (n["answers"], n["read"]) == (3, 3)
        held = n["variance"] >= 0.01 and n["disagreement"] <= 0.25 and n.get("reliability", 1) >= 0
        assert (row["action"] == "kept") == held
    # One answer of three moralises, one praises itself: the judge that was taught to see it sees it.
    for description in ("Ends without a moral or consolation.", "Does not praise itself."):
        assert rows[description]["action"] == "kept"
        assert rows[description]["numbers"]["mean"] == pytest.approx(2 / 3, abs=0.1)
    (rubric,) = load_rubrics(tmp_path / "out.jsonl")
    assert lint_paths([tmp_path / "out.jsonl"]) == ([], 1)
    assert {c.description for c in rubric.criteria} == {d for d, r in rows.items() if r["action"] == "kept"}


def test_a_judge_that_reads_the_place_and_not_the_tier_is_found_out(tmp_path: Path, engine: EngineFactory) -> None:
    """The tiny judge was taught with the tiers lowest first only: listed the other way round, it says the opposite."""
    with writing_server(stronger=json.dumps(DRAFT), revise=json.dumps(DRAFT)) as server:
        assert run_synthesize(job(tmp_path, server.url, fewest=2), engine) == 0
    head, *rows = report(tmp_path)
    assert head["status"] == "dropped" and (tmp_path / "out.jsonl").read_text() == ""
    judged = [r for r in rows if r["kind"] == "criterion"]
    assert len(judged) == 2 and all("readings of one answer differ by" in r["reason"] for r in judged)


def test_the_tiny_model_cannot_draft_and_says_why(tmp_path: Path, engine: EngineFactory) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/draft_stronger.txt").write_text(
        "<|im_start|>user\nWrite a rubric for: {{prompt}}\n{{=form}}<|im_end|>\n<|im_start|>assistant\n"
    )
    (tmp_path / "templates/form.txt").write_text("As JSON.")
    alone = replace(job(tmp_path, str(TINY), row={"answers": []}, retries=1), templates=tmp_path / "templates")
    assert run_synthesize(alone, engine) == 0
    assert (tmp_path / "out.jsonl").read_text() == ""
    head, *notes = report(tmp_path)
    assert (head["status"], head["stage"]) == ("dropped", "draft") and "no usable draft in 2 replies" in head["reason"]
    assert [n["action"] for n in notes] == ["rejected", "rejected"]
    stages = [json.loads(line).get("stage") for line in alone.journal.read_text().splitlines()]
    assert stages.count("answer") == 3 and stages.count("draft") == 2
    # It was held to the schema as far as its 64 tokens went.
    drafts = [json.loads(line) for line in alone.journal.read_text().splitlines() if '"stage":"draft"' in line]
    assert all(d["value"]["text"].startswith('{"title":"') for d in drafts) and "not JSON" in head["reason"]
    # Once more: everything was said already, and is not asked again.
    before = alone.journal.read_bytes()
    assert run_synthesize(alone, engine) == 0 and alone.journal.read_bytes() == before


def test_a_prompt_that_the_model_cannot_read_whole_is_dropped_not_retried(
    tmp_path: Path, engine: EngineFactory
) -> None:
    long = job(tmp_path, str(TINY), row={"prompt": "the missing ferry " * 600})
    assert run_synthesize(long, engine) == 0
    (head,) = report(tmp_path)
    assert head["status"] == "dropped" and "leaves no room in max_model_len 1024" in head["reason"]
