"""Whole runs against a real HTTP server that plays a bad judge, and whole runs that are ended in the middle."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from http_judge import HttpJudge, Reply, chat_reply, http_judge

from megarubric.config import load_train
from megarubric.judging.types import JudgeItem
from megarubric.launch.judge import make_judge
from megarubric.launch.supervisor import Supervisor
from megarubric.launch.system import System
from megarubric.rubrics import load_rubrics

ROOT = Path(__file__).resolve().parents[2]
GOOD = chat_reply([("1", {"0": math.log(0.2), "1": math.log(0.7)})])
FAULTS = {
    "late": Reply(hang=True),
    "down": Reply(b"oops", 500),
    "garbage": Reply(b"<html>hello</html>"),
    "half": Reply(GOOD.body[: len(GOOD.body) // 2]),
    "cut": Reply(GOOD.body, cut=40),
    "none": chat_reply([("1", {"1": -0.1})], n=0),
    "two": chat_reply([("1", {"1": -0.1})], n=2),
    "chatter": chat_reply([], text="Yes, this is clearly excellent.", logprobs=False),
}


async def megarubric(*arguments: str, meanwhile: Callable[[Any], Any] | None = None) -> tuple[int, str, str]:
    """Exit status, standard output and standard error; `meanwhile` runs on the process until it ends."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "megarubric", *arguments, cwd=ROOT, env=environment,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    if meanwhile is not None:
        await meanwhile(process)
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def files(directory: Path, criteria: list[str], lines: int) -> list[str]:
    rubric = {"id": "r", "criteria": [{"id": c, "description": f"It is {c}."} for c in criteria]}
    rows = [{"id": f"{i}", "prompt": "Write.", "rubric": "r", "response": f"Answer {i}."} for i in range(lines)]
    (directory / "rubrics.json").write_text(json.dumps(rubric))
    (directory / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["score", "--rubrics", f"{directory}/rubrics.json", "--responses", f"{directory}/in.jsonl"]


def question(body: dict[str, Any]) -> tuple[str, str]:
    """The answer and the criterion that a request is about."""
    text = body["messages"][1]["content"]
    return re.findall(r"Answer \d+\.", text)[0], re.findall(r"Criterion: It is (\w+)\.", text)[0]


def test_a_run_goes_on_through_every_fault_of_a_judge_and_nothing_becomes_zero(tmp_path: Path) -> None:
    """Every fault has a criterion of its own: masked, counted by kind, retried, kept out of the cache, and asked again
    by the same command when the judge is well."""
    criteria = ["fine", *FAULTS]
    arguments = files(tmp_path, criteria, 1)  # more failures in a row would count as a server that is down
    well = False

    def handler(server: HttpJudge, path: str, body: dict[str, Any]) -> Reply:
        return GOOD if well else FAULTS.get(question(body)[1], GOOD)

    async def main() -> None:
        nonlocal well
        async with http_judge(handler) as server:
            out, cache = tmp_path / "out.jsonl", tmp_path / "judge.db"
            arguments.extend(["--judge", f"{server.url}#m", "--cache", str(cache), "--out", str(out), "--json"])
            status, printed, errors = await megarubric(*arguments, "--timeout", "2")
            rows = [json.loads(x) for x in out.read_text().splitlines()]
            assert status == 0 and "Traceback" not in errors
            for row in rows:
                assert row["unread"] == list(FAULTS) and row["valid"] and row["reward"] == pytest.approx(7 / 9)
                assert {n: s for n, s in row["scores"].items() if s is not None} == {"fine": pytest.approx(7 / 9)}
            assert json.loads(printed)["unread"] == len(FAULTS)
            told = re.findall(r"unread judgements: (.*)", errors)[0]
            assert sum(map(int, re.findall(r"(?:^|, )(\d+) ", told))) >= 5 and "timed out" in told
            asked = Counter(question(body) for _, body, _ in server.requests)
            assert all(asked["Answer 0.", fault] > 1 for fault in FAULTS)  # retried
            assert asked["Answer 0.", "fine"] == 1
            server.requests.clear()
            well = True
            status, printed, _ = await megarubric(*arguments)
            asked = Counter(question(body) for _, body, _ in server.requests)
            assert status == 0 and json.loads(printed)["unread"] == 0
            assert asked == {("Answer 0.", fault): 1 for fault in FAULTS}
        first = out.read_bytes()
        status, _, _ = await megarubric(*arguments, "--replay-only")  # the server is gone
        assert status == 0 and out.read_bytes() == first

    asyncio.run(main())


def test_ended_twice_in_the_middle_of_2000_judgements_and_gone_on_with(tmp_path: Path) -> None:
    """SIGTERM, then SIGKILL, then to the end: the output is whole and right, and only what was under way when the
    process was ended is asked again."""
    criteria = [f"c{i}" for i in range(8)]
    arguments = files(tmp_path, criteria, 250)
    out = tmp_path / "out.jsonl"

    def handler(server: HttpJudge, path: str, body: dict[str, Any]) -> Reply:
        answer, criterion = question(body)
        share = (int(answer[7:-1]) * 8 + int(criterion[1:])) / 2000
        return chat_reply([("1", {"0": math.log(1 - 0.9 * share), "1": math.log(0.9 * share + 1e-9)})])

    async def main() -> None:
        async with http_judge(handler) as server:

            def end(number: int, after: int) -> Callable[[Any], Any]:
                async def meanwhile(process: Any) -> None:
                    while len(server.requests) < after and process.returncode is None:
                        await asyncio.sleep(0.002)
                    process.send_signal(number)

                return meanwhile

            kept = [*arguments, "--judge", f"{server.url}#m", "--cache", str(tmp_path / "judge.db"), "--out", str(out)]
            status, _, errors = await megarubric(*kept, meanwhile=end(signal.SIGTERM, 400))
            assert status == 3 and "goes on from there" in errors and "Traceback" not in errors
            assert sorted(p.name for p in tmp_path.glob("*out*")) == []  # no output, nor half of one
            stopped = len(server.requests)
            assert 400 <= stopped < 1000
            status, _, _ = await megarubric(*kept, meanwhile=end(signal.SIGKILL, stopped + 600))
            assert status == -signal.SIGKILL
            assert (await megarubric(*kept))[0] == 0
            asked = Counter(question(body) for _, body, _ in server.requests)
            again = sum(asked.values()) - 2000
            assert len(asked) == 2000 and max(asked.values()) <= 3
            assert 0 <= again <= 2 * 16  # what two interruptions found under way, at most 16 requests each
            rows = [json.loads(x) for x in out.read_text().splitlines()]
            assert [row["id"] for row in rows] == [str(i) for i in range(250)]
            for i, row in enumerate(rows):
                assert list(row["scores"].values()) == pytest.approx(
                    [0.9 * (8 * i + c) / 2000 for c in range(8)], abs=1e-6
                )

    asyncio.run(main())


@pytest.mark.engine
def test_a_training_run_goes_on_with_a_bad_judge_and_is_replayed_without_any(tmp_path: Path) -> None:
    """One of four judged criteria gets replies that cannot be used: its judgements are unread and counted, and the step
    is trained. From the cache alone, the judge gone, the step's answers have the same judgements to the last bit."""

    def handler(server: HttpJudge, path: str, body: dict[str, Any]) -> Reply:
        text = body["messages"][1]["content"]
        return list(FAULTS.values())[len(text) % 4 + 1] if "moral" in text.rpartition("Criterion")[2] else GOOD

    small = [
        "train.steps=1",
        "data.heldout=null",
        "checkpoint.export_hf=false",
        "judge.timeout_s=2",
        "judge.retries=0",
        f"runs_dir={tmp_path}",
    ]
    small += ["judge.kind=url", f"judge.cache={tmp_path}/judge.db", "judge.template=tier", "name=bad"]
    url: list[str] = []

    async def main() -> None:
        async with http_judge(handler) as server:
            url.extend([f"judge.url={server.url}", "judge.url_model=m"])
            status, _, errors = await megarubric("train", "configs/smoke.yaml", *small, *url)
            assert status == 0, errors

    asyncio.run(main())
    lines = (tmp_path / "bad/rollouts/step_1.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        scores = {name: j["score"] for name, j in row["judgements"].items() if j["source"] == "judge"}
        assert scores.pop("no-moral") is None and row["valid"]
        assert all(score == pytest.approx(7 / 9) for score in scores.values()) and len(scores) == 3
    metrics = [json.loads(x) for x in (tmp_path / "bad/metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["judge/unread_fraction"] == 0.25 and metrics[-1]["judge/unread"] == len(lines)

    c = load_train(ROOT / "configs/smoke.yaml", [*small, *url, "judge.replay_only=true"])
    rubrics = {r.id: r for r in load_rubrics(ROOT / "rubrics/quickstart/train.jsonl")}

    async def replay() -> None:  # the server is gone
        system = System(Supervisor(tmp_path / "logs"), tmp_path / "ipc")
        judge = await make_judge(c, system)
        rows = list(map(json.loads, lines))
        items = [JudgeItem(rubrics[row["rubric"]], row["prompt"], row["response"]) for row in rows]
        for row, judged in zip(rows, await judge.judge(items)):
            for name, j in judged.items():
                was = row["judgements"][name]
                assert (j.value, j.score, j.read, j.entropy) == (
                    was["value"], was["score"], was.get("read", True), was.get("entropy")
                )  # fmt: skip
        await system.close()

    asyncio.run(replay())
