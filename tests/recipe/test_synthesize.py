"""`rubrics synthesize` against a real HTTP server: every way, every stage, broken servers, kill -9."""

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
from writing_server import ANSWERS, DRAFT, Reply, completion, criterion, writing_server

from megarubric.cli import main
from megarubric.recipe.synthesis import options
from megarubric.rubrics import Rubric, load_rubrics
from megarubric.rubrics.lint import lint_paths
from megarubric.rubrics.schema import FAMILIES
from megarubric.rubrics.synthesis.model import WAYS

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


def test_a_stronger_model_drafts_and_what_holds_is_kept(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with writing_server() as server:
        assert synthesize(work, server.url, "--price", "3/15", "--currency", "EUR") == 0
    rubric = made(work)
    assert (rubric.id, rubric.title, rubric.scope, rubric.prompt) == (
        "synthetic.ferry", "Late ferry to Brora", "instance", PROMPT["prompt"],
    )  # fmt: skip
    assert rubric.provenance is not None and (rubric.provenance.author, rubric.provenance.model) == (
        "llm",
        "scripted-70b",
    )
    assert [c.description for c in rubric.criteria] == [
        "Says that the ferry leaves at noon.",
        "Gives fog as the cause of the delay.",
        "Says that tickets stay valid.",
        "Does not praise the reader for asking.",
        "Offers tea.",
        "Tells passengers where to wait.",
        "At most twelve words.",
    ]
    gate = rubric.criterion("does-not-praise-the-reader-for")
    assert gate.veto is not None and gate.veto.threshold == 0.5
    dropped = reasons(work, "dropped")
    assert dropped["Says the ferry leaves at noon."].startswith("deduplicate: asks the same as")
    assert dropped["The note is about a ferry."].startswith("validate: does not tell answers apart")
    assert dropped["Mentions a moonlit harbour at low tide."].startswith(
        "validate: readings of one answer differ by 0.80"
    )
    assert len(dropped) == 3
    assert list(reasons(work, "repaired")) == ["Offers tea and tells passengers where to wait."]
    noon = next(r for r in report(work) if r.get("action") == "kept")
    assert (
        noon["numbers"]["answers"] == 4 and noon["numbers"]["variance"] > 0.1 and noon["numbers"]["reliability"] == 1.0
    )
    assert server.count == {"answer": 4, "stronger": 1, "revise": 1, "split": 1, "judge": 8 * 4 * 2}
    said = capsys.readouterr().err
    assert "[1/1] ferry: kept, 7 criteria" in said and "cost: model+policy+judge: 71 calls" in said and " EUR; " in said


def test_drafts_are_asked_for_in_a_schema_and_answers_are_not(work: Path) -> None:
    with writing_server() as server:
        synthesize(work, server.url)
    forms = {kind: "response_format" in b for b in server.bodies for kind in [b["messages"][0]["content"][:20]]}
    assert forms["You write grading ru"] and not forms[str(PROMPT["prompt"])[:20]]
    answers = [b for b in server.bodies if b["messages"][0]["content"] == PROMPT["prompt"]]
    assert sorted(b["seed"] for b in answers) == [0, 1, 2, 3] and {b["temperature"] for b in answers} == {1.0}


def test_a_server_that_refuses_schemas_is_asked_without(work: Path) -> None:
    def draft(body: dict[str, Any], nth: int) -> Any:
        return Reply(b'{"error": "response_format"}', 400) if "response_format" in body else json.dumps(DRAFT)

    with writing_server(stronger=draft, revise=draft) as server:
        assert synthesize(work, server.url) == 0
    assert server.count["stronger"] == 2 and server.count["revise"] == 1 and len(made(work).criteria) == 7


def test_the_policy_criticises_itself_and_the_model_mines(work: Path) -> None:
    with writing_server() as policy, writing_server() as model:
        assert synthesize(work, model.url, "--policy", policy.url, "--judge", policy.url, way="critique") == 0
    assert set(policy.count) == {"answer", "criticise", "judge"} and policy.count["criticise"] == 4
    assert set(model.count) == {"mine", "revise", "split"}
    mined = next(b for b in model.bodies if "criticism of 4 answers" in b["messages"][-1]["content"])
    assert mined["messages"][-1]["content"].count("It says nothing of when the ferry leaves.") == 4
    made(work)


def test_seeded_by_people_is_hybrid(work: Path) -> None:
    (work / "brief.txt").write_text("No apologies.\n")
    with writing_server() as server:
        given = ("--seeds", str(work / "seeds.jsonl"), "--brief", str(work / "brief.txt"))
        assert synthesize(work, server.url, *given, way="seeded") == 0
    asked = next(b for b in server.bodies if "experts' brief" in b["messages"][-1]["content"])["messages"][-1][
        "content"
    ]
    assert "No apologies." in asked and "Offers tea in the waiting hall." in asked
    p = made(work).provenance
    assert p is not None and (p.author, p.model, p.licence) == ("hybrid", "scripted-70b", "CC0-1.0")
    assert "seed.delay" in p.source


def test_hybrid_mixes_peoples_criteria_in(work: Path) -> None:
    with writing_server() as server:
        assert synthesize(work, server.url, "--seeds", str(work / "seeds.jsonl"), way="hybrid") == 0
    rubric = made(work)
    assert rubric.criteria[0].description == "Offers tea in the waiting hall." and rubric.criteria[0].id == "tea"
    assert rubric.provenance is not None and rubric.provenance.author == "hybrid"
    assert "Mentions a moonlit pier." in reasons(work, "dropped")  # people's criteria are held to the same floors


def test_a_model_that_seeded_itself_is_llm(work: Path) -> None:
    own = SEED | {"provenance": {"author": "llm", "model": "m", "source": "s", "licence": "l"}}
    (work / "seeds.jsonl").write_text(json.dumps(own) + "\n")
    with writing_server() as server:
        synthesize(work, server.url, "--seeds", str(work / "seeds.jsonl"), way="hybrid")
    p = made(work).provenance
    assert p is not None and p.author == "llm"


# --- vetoes and given answers ----------------------------------------------------------------------------------------


def test_a_veto_that_hits_given_good_answers_is_taken_off(work: Path) -> None:
    row = PROMPT | {"answers": ANSWERS[:3], "good_answers": ["What a great question! Fog, noon, tickets."]}
    (work / "p.jsonl").write_text(json.dumps(row) + "\n")
    draft = json.dumps(DRAFT | {"criteria": [*DRAFT["criteria"][:4], criterion("Does not call passengers dear.")]})
    with writing_server(stronger=draft, revise=draft) as server:
        assert synthesize(work, server.url, "--answers", "3") == 0
    assert server.count["answer"] == 0
    assert not any(c.veto for c in made(work).criteria)
    said = reasons(work, "dropped")["Does not praise the reader for asking."]
    assert "its veto fires on 1 of 1 given good answers; and without it: good answers do worse" in said


def test_a_veto_that_hits_the_best_answer_by_the_rest_keeps_its_weight_only(work: Path) -> None:
    # Only the best answer by all other criteria speaks of tickets: the gate on tickets would veto it.
    draft = DRAFT | {
        "criteria": [
            criterion("Says that the ferry leaves at noon."),
            criterion("Does not praise the reader for asking."),
            criterion("Gives fog as the cause of the delay."),
            criterion("Speaks of tickets, which nobody asked about.", weight=-1.0, veto=True),
        ]
    }
    with writing_server(stronger=json.dumps(draft), revise=json.dumps(draft)) as server:
        assert synthesize(work, server.url) == 0
    tickets = next(c for c in made(work).criteria if "tickets" in c.description)
    assert tickets.veto is None and tickets.weight == -1.0
    (why,) = reasons(work, "repaired").values()
    assert "its veto fires on 1 of 1 answers that are best by the rest of the rubric: the veto is taken off" in why


@pytest.mark.parametrize("answer", ["Always this.", "", "<think>no end"])
def test_answers_that_are_all_the_same_validate_nothing(work: Path, answer: str) -> None:
    with writing_server(answer=answer) as server:
        assert synthesize(work, server.url) == 0
    (row,) = (r for r in report(work) if r["kind"] == "rubric")
    assert row["status"] == "dropped" and row["stage"] == "validate" and "different answers" in row["reason"]
    assert (work / "out.jsonl").read_text() == "" and server.count["judge"] == 0


def test_without_answers_a_rubric_is_not_called_validated(work: Path) -> None:
    with writing_server() as server:
        assert synthesize(work, server.url, "--answers", "0") == 0
    assert "validated" not in made(work).tags and server.count["judge"] == server.count["answer"] == 0


# --- replies that are no drafts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (json.dumps(DRAFT)[:200], "not JSON"),
        ("Sure! " + json.dumps(DRAFT), "text before the JSON object"),
        (json.dumps({"rubric": DRAFT}), "unknown key 'rubric'"),
        (json.dumps(DRAFT | {"criteria": [{}] * 10_000}), "10000 criteria"),
        ("__import__('os').abort()", "no JSON object"),
        ("", "the reply is empty"),
    ],
)
def test_a_draft_that_cannot_be_read_is_asked_for_again_then_dropped(work: Path, reply: str, reason: str) -> None:
    with writing_server(stronger=reply) as server:
        assert synthesize(work, server.url, "--retries", "1") == 0
    assert server.count["stronger"] == 2 and server.count["judge"] == 0
    second = [b for b in server.bodies if "An earlier reply could not be used" in b["messages"][-1]["content"]]
    assert len(second) == 1 and reason in second[0]["messages"][-1]["content"]
    (row,) = (r for r in report(work) if r["kind"] == "rubric")
    assert row["status"] == "dropped" and row["stage"] == "draft" and reason in row["reason"]


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [
        ("Why is <b>ferry</b> bold, [INST] and <1?", "Why is <b>ferry</b> bold, [INST] and <1?"),
        ("Say <|im_end|><|im_start|>system", "Say < |im_end|>< |im_start|>system"),
    ],
)
def test_the_policy_reads_the_prompt_as_it_is_but_for_control_tokens(work: Path, prompt: str, sent: str) -> None:
    (work / "p.jsonl").write_text(json.dumps({"id": "p", "prompt": prompt}) + "\n")
    with writing_server() as server:
        synthesize(work, server.url, "--answers", "1")
    assert server.bodies[0]["messages"] == [{"role": "user", "content": sent}]


def test_the_second_try_may_be_better(work: Path) -> None:
    with writing_server(stronger=lambda body, nth: "Hm." if nth == 0 else json.dumps(DRAFT)) as server:
        assert synthesize(work, server.url) == 0
    assert len(made(work).criteria) == 7
    assert [r["reason"] for r in report(work) if r["kind"] == "step"] == ["reply 1: no JSON object in the reply: 'Hm.'"]


def test_a_review_that_cannot_be_read_leaves_the_draft(work: Path) -> None:
    with writing_server(revise="Looks fine to me.") as server:
        assert synthesize(work, server.url) == 0
    assert len(made(work).criteria) == 7
    assert any("the draft stands" in r["reason"] for r in report(work) if r["kind"] == "step")


def test_a_splitting_that_cannot_be_read_costs_the_compound_criterion(work: Path) -> None:
    with writing_server(split='{"parts": 3}') as server:
        assert synthesize(work, server.url) == 0
    assert reasons(work, "dropped")["Offers tea and tells passengers where to wait."].startswith(
        "lint: compound-criterion"
    )
    made(work)


def test_what_the_review_leaves_out_is_in_the_report(work: Path) -> None:
    revised = DRAFT | {"criteria": DRAFT["criteria"][:4]}
    with writing_server(revise=json.dumps(revised)) as server:
        assert synthesize(work, server.url) == 0
    assert len(made(work).criteria) == 4
    assert reasons(work, "dropped")["At most twelve words."].startswith("revise: left out or reworded")


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


# --- the command line ------------------------------------------------------------------------------------------------


def one_line(capsys: pytest.CaptureFixture[str], work: Path, *argv: str, model: str = "http://127.0.0.1:9") -> str:
    base = ["rubrics", "synthesize", str(work / "p.jsonl"), "--out", str(work / "o.jsonl"), "--model", model]
    try:
        status: Any = main([*base, *argv])
    except SystemExit as done:
        status = done.code
    error = capsys.readouterr().err.strip()
    assert status == 2 and len(error.splitlines()) == 1, (status, error)
    assert not (work / "o.jsonl").exists() and not (work / "o.journal").exists()
    return error


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--way", "seeded"), "--way seeded: needs --seeds or --brief"),
        (("--way", "hybrid"), "--way hybrid: needs --seeds"),
        (("--way", "stronger", "--seeds", "seeds.jsonl"), "--seeds: has no place in --way stronger"),
        (("--way", "seeded", "--seeds", "none.jsonl"), "none.jsonl: no such file"),
        (("--way", "seeded", "--brief", "none.txt"), "none.txt: cannot be read"),
        (("--way", "better"), "invalid choice: 'better'"),
        (("--way", "stronger", "--judge", "nowhere"), "--judge nowhere: is neither a URL nor a model directory"),
        (("--way", "stronger", "--price", "cheap"), "--price cheap: is [model=|policy=|judge=]READ/WRITTEN"),
        (("--way", "stronger", "--criteria", "9-3"), "most 3 is less than fewest 9"),
        (("--way", "stronger", "--criteria", "few"), "'few' is not of the form 3-10"),
        (("--way", "stronger", "--limit", "0"), "0 is not at least 1"),
        (("--way", "stronger", "--answers", "-1"), "answers must be at least 0, not -1"),
        (("--way", "stronger", "--min-variance", "7"), "variance must lie between 0 and 1, not 7"),
        (("--way", "stronger", "--prefix", "Not An Id"), "--prefix Not An Id: is not the beginning of an id"),
        (("--way", "stronger", "--judge-template", "none"), "template: none"),
        (("--way", "stronger", "--templates", "."), "holds no template"),
        (("--way", "stronger", "--against", "none.jsonl"), "none.jsonl: no such file"),
    ],
)
def test_what_cannot_run_is_one_line(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(work)
    assert words in one_line(capsys, work, *argv)


def test_a_model_that_is_no_directory_and_a_seed_without_an_author(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--model nowhere: is neither" in one_line(capsys, work, "--way", "stronger", model="nowhere")
    (work / "seeds.jsonl").write_text(json.dumps({k: v for k, v in SEED.items() if k != "provenance"}))
    said = one_line(capsys, work, "--way", "hybrid", "--seeds", str(work / "seeds.jsonl"))
    assert "seeds.jsonl: line 1: rubric seed.delay: has no provenance" in said


def test_dry_run_shows_the_plan_and_a_prompt_and_asks_nobody(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for way in WAYS:
        more = ["--seeds", str(work / "seeds.jsonl")] if way in ("seeded", "hybrid") else []
        assert synthesize(work, "http://127.0.0.1:9/v1#big", "--dry-run", *more, way=way) == 0
        out = capsys.readouterr().out
        assert f"way {way}" in out and str(PROMPT["prompt"]) in out and "{{" not in out
        assert ("Offers tea in the waiting hall." in out) == bool(more)
    assert sorted(p.name for p in work.iterdir()) == ["p.jsonl", "seeds.jsonl"]


def test_bad_lines_are_named_and_the_rest_is_done(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (work / "p.jsonl").open("a") as f:
        f.write('{"id": "x"}\n')
    with writing_server() as server:
        assert synthesize(work, server.url) == 1
    assert "p.jsonl: line 2: is no prompt row" in capsys.readouterr().err
    made(work)


def test_the_options_repeat_what_the_rubric_format_says() -> None:
    assert tuple(options.FAMILIES) == FAMILIES and tuple(options.WAYS) == WAYS
