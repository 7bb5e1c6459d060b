"""`rubrics synthesize` over its life: servers that break, budgets, many prompts, kill -9 and the same command again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from synthesizing import PROMPT, made, report, synthesize, work
from writing_server import ANSWERS, DRAFT, Reply, completion, writing_server

from megarubric.rubrics import load_rubrics

__all__ = ["work"]  # a fixture

# --- servers that break ----------------------------------------------------------------------------------------------

LIMITED = Reply(b"slow down", 429, {"retry-after": "0.01"})


@pytest.mark.parametrize(
    "broken",
    [LIMITED, Reply(b"oops", 500, {"retry-after": "0.01"}), Reply(b"{", 200), Reply(b'{"choices": []}', 200)],
    ids=["429", "500", "half a JSON", "no choices"],
)
def test_a_server_that_breaks_now_and_then_costs_retries_only(work: Path, broken: Reply) -> None:
    def flaky(good: Any) -> Any:
        return lambda body, nth: broken if nth % 2 == 0 else good(body, nth)

    with writing_server(
        stronger=flaky(lambda body, nth: json.dumps(DRAFT)),
        answer=flaky(lambda body, nth: completion(ANSWERS[body["seed"]])),
    ) as server:
        assert synthesize(work, server.url) == 0
    assert len(made(work).criteria) == 7 and server.count["stronger"] == 2


def test_a_server_that_hangs_leaves_the_prompt_for_the_next_run(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with writing_server(stronger=Reply(hang=True)) as server:
        assert synthesize(work, server.url, "--timeout", "0.2") == 1
        assert "[1/1] ferry: failed, draft: timed out" in capsys.readouterr().err
        (row,) = (r for r in report(work) if r["kind"] == "rubric")
        assert row["status"] == "failed" and (work / "out.jsonl").read_text() == ""
        server.replies["stronger"] = json.dumps(DRAFT)
        asked = server.count["answer"]
        assert synthesize(work, server.url) == 0
        assert server.count["answer"] == asked  # the answers were in the journal
    made(work)


def test_a_judge_that_says_nothing_says_nothing_about_the_rubric(work: Path) -> None:
    with writing_server(judge="It is hard to say.") as server:
        assert synthesize(work, server.url) == 1
    (row,) = (r for r in report(work) if r["kind"] == "rubric")
    assert row["status"] == "failed" and row["stage"] == "validate" and "the judge read 0 of 64" in row["reason"]


@pytest.mark.parametrize("budget", [6, 60])  # while drafting; with most judgements made
def test_a_budget_ends_asking_and_a_larger_one_goes_on(
    work: Path, capsys: pytest.CaptureFixture[str], budget: int
) -> None:
    with writing_server() as server:
        assert synthesize(work, server.url, "--max-requests", str(budget)) == 1
        assert server.count.total() == budget and f"budget spent: {budget} requests" in capsys.readouterr().err
        assert next(r for r in report(work))["status"] == "failed"
        assert synthesize(work, server.url, "--max-requests", "500", "--json") == 0
        summary = json.loads(capsys.readouterr().out)
    assert server.count.total() == 71  # as many as in one run
    (cost,) = summary["cost"]
    assert cost["now"][0] == 71 - budget and cost["total"][0] == 71 and summary["kept"] == 1


def test_two_names_of_one_model_are_counted_together(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with writing_server() as server:
        assert synthesize(work, server.url, "--judge", server.url + "#scripted-70b", "--json") == 0
    (cost,) = json.loads(capsys.readouterr().out)["cost"]
    assert cost["roles"] == ["model", "policy", "judge"] and cost["now"][0] == server.count.total() == 71


def test_nothing_listens(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert synthesize(work, "http://127.0.0.1:9/v1") == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and "does not answer" in error and not (work / "out.jsonl").exists()


# --- many prompts ----------------------------------------------------------------------------------------------------


def many(work: Path, n: int) -> None:
    rows = [PROMPT | {"id": f"p{i}", "prompt": f"{PROMPT['prompt']} Passenger {i} asks."} for i in range(n)]
    (work / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def draft_for(body: dict[str, Any], nth: int) -> str:
    """A draft of its own for every prompt, by the passenger's number."""
    number = body["messages"][-1]["content"].split("Passenger ")[1].split(" ")[0]
    words = " ".join(f"w{number}x{k}" for k in range(60))
    best = {"value": 1, "text": f"The note has it in so many words, {words}."}
    own = [c | {"tiers": c["tiers"] and [c["tiers"][0], best]} for c in DRAFT["criteria"]]
    return json.dumps(DRAFT | {"criteria": own})


def test_the_same_rubric_twice_is_once(work: Path) -> None:
    many(work, 3)

    def draft(body: dict[str, Any], nth: int) -> str:
        return draft_for(body, nth) if "Passenger 1" in str(body) else json.dumps(DRAFT)

    with writing_server(stronger=draft, revise=draft) as server:
        assert synthesize(work, server.url) == 0
        assert [r.id for r in load_rubrics(work / "out.jsonl")] == ["synthetic.p0", "synthetic.p1"]
        row = next(r for r in report(work) if r["kind"] == "rubric" and r["prompt"] == "p2")
        assert row["status"] == "dropped" and row["stage"] == "deduplicate" and "synthetic.p0" in row["reason"]
        # Against a corpus that holds them, all are repeats.
        (work / "out.jsonl").rename(work / "have.jsonl")
        assert synthesize(work, server.url, "--against", str(work / "have.jsonl"), "--prefix", "again") == 0
        assert (work / "out.jsonl").read_text() == ""


def test_limit_takes_the_first_and_a_longer_run_goes_on_from_there(work: Path) -> None:
    many(work, 3)
    with writing_server(stronger=draft_for, revise=draft_for) as server:
        assert synthesize(work, server.url, "--limit", "1") == 0
        assert server.count["stronger"] == 1
        assert synthesize(work, server.url) == 0
        assert server.count["stronger"] == 3 and server.count["answer"] == 12
        assert [r.id for r in load_rubrics(work / "out.jsonl")] == [f"synthetic.p{i}" for i in range(3)]
        assert synthesize(work, server.url, "--fresh", "--limit", "1") == 0
        assert server.count["stronger"] == 4


@pytest.mark.parametrize("after", [12, 150])
def test_kill_9_and_the_same_command_asks_nothing_twice(work: Path, after: int) -> None:
    many(work, 4)
    with writing_server(stronger=draft_for, revise=draft_for) as server:
        command = [sys.executable, "-m", "megarubric", "rubrics", "synthesize", "p.jsonl", "--out", "out.jsonl"]
        command += ["--model", server.url, "--way", "stronger", "--concurrency", "2", "--at-once", "2"]
        process = subprocess.Popen(command, cwd=work, stderr=subprocess.DEVNULL)
        server.on_request = lambda n: os.kill(process.pid, signal.SIGKILL) if n == after else None
        assert process.wait(60) == -signal.SIGKILL
        server.on_request = lambda n: None
        assert not (work / "out.jsonl").exists()
        before = [json.dumps(b, sort_keys=True) for b in server.bodies]
        assert synthesize(work, server.url) == 0
        later = [json.dumps(b, sort_keys=True) for b in server.bodies[len(before) :]]
        # What was under way when it was killed, two requests at most, was never heard.
        assert len(set(before) & set(later)) <= 2 and len(set(later)) == len(later)
        resumed = (work / "out.jsonl").read_bytes()
        assert synthesize(work, server.url, "--fresh") == 0
        assert (work / "out.jsonl").read_bytes() == resumed and len(load_rubrics(work / "out.jsonl")) == 4


def test_sigterm_is_status_3_with_the_journal_kept(work: Path) -> None:
    with writing_server(revise=Reply(hang=True)) as server:
        command = [sys.executable, "-m", "megarubric", "rubrics", "synthesize", "p.jsonl", "--out", "out.jsonl"]
        process = subprocess.Popen(
            [*command, "--model", server.url, "--way", "stronger"], cwd=work, stderr=subprocess.PIPE, text=True
        )
        server.on_request = lambda n: process.terminate() if server.count["revise"] else None
        _, said = process.communicate(timeout=60)
    assert process.returncode == 3 and "out.journal: interrupted; the same command goes on" in said.splitlines()[-1]
    assert "Traceback" not in said and not (work / "out.jsonl").exists()
    assert (work / "out.journal").read_text().count('"stage":"draft"') == 1
