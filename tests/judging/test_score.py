from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from http_judge import Reply, chat_reply, http_judge

from megarubric.errors import BadInput
from megarubric.judging import score as score_module
from megarubric.judging.judge import Judge
from megarubric.judging.opening import JudgeUse
from megarubric.judging.score import score_file
from megarubric.judging.types import TierQuery, TierReply
from megarubric.judging.verb import run_score
from megarubric.reward.reference import aggregate
from megarubric.rubrics import parse_rubric

RUBRIC: dict[str, Any] = {
    "id": "note",
    "criteria": [
        {"id": "calm", "description": "Calm.", "weight": 2, "tiers": [{"value": v, "text": "t"} for v in (0, 1, 2)]},
        {"id": "short", "check": {"kind": "length_constraints:number_words", "relation": "less than", "num_words": 6}},
        {"id": "clean", "description": "No flattery.", "weight": 0, "veto": {"threshold": 0.5}},
    ],
    "pairs": [{"a": "calm", "b": "short", "weight": 0.5, "kind": "min"}],
}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    (tmp_path / "rubrics.json").write_text(json.dumps(RUBRIC))
    return tmp_path / "rubrics.json", tmp_path / "responses.jsonl", tmp_path / "out" / "scores.jsonl"


def line(**changes: Any) -> dict[str, Any]:
    plain = {"id": "a", "prompt": "Write.", "rubric": "note", "response": "The sea was grey."}
    return {k: v for k, v in (plain | changes).items() if v is not ...}


def score(
    files: tuple[Path, Path, Path], lines: Sequence[dict[str, Any] | str | bytes], **kwargs: Any
) -> tuple[int, list[dict[str, Any]]]:
    rubrics, responses, out = files
    raw = [x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode() for x in lines]
    responses.write_bytes(b"\n".join(raw) + b"\n")
    as_json = kwargs.pop("as_json", False)
    status = run_score(rubrics, responses, out, JudgeUse(**kwargs), as_json=as_json)
    return status, [json.loads(text) for text in out.read_text().splitlines()]


STORED = {"calm": 1, "clean": 1}


def test_stored_judgements_and_checks_give_the_contracts_reward(files: tuple[Path, Path, Path]) -> None:
    status, rows = score(files, [line(judgements=STORED)])
    expected = aggregate(parse_rubric(RUBRIC, "t"), {"calm": 0.5, "short": 1.0, "clean": 1.0})
    assert status == 0 and len(rows) == 1
    assert rows[0] == {
        "id": "a", "reward": expected.reward, "valid": True, "vetoed": False, "veto": None,
        "r0": expected.r0, "r1": expected.r1, "scores": {"calm": 0.5, "short": 1.0, "clean": 1.0},
        "attribution": expected.attribution, "unread": [],
    }  # fmt: skip
    assert rows[0]["reward"] == pytest.approx((2 * 0.5 + 1 + 0.5 * 0.5) / 3.5)


def test_without_a_judge_missing_judgements_are_masked_and_no_error(files: tuple[Path, Path, Path]) -> None:
    status, rows = score(files, [line(judgements={"clean": 1}), line(id="b", judgements={"calm": 2, "clean": None})])
    assert status == 0
    assert rows[0]["valid"] and rows[0]["scores"]["calm"] is None and rows[0]["unread"] == ["calm"]
    assert rows[0]["reward"] == 1.0  # the check alone decides
    # "clean" is a veto that is masked (not applicable): on_missing_veto says unscored, and nothing is unread
    assert rows[1]["valid"] is False and rows[1]["reward"] is None and rows[1]["unread"] == []


def test_a_veto_is_named(files: tuple[Path, Path, Path]) -> None:
    _, rows = score(files, [line(judgements={"calm": 2, "clean": 0})])
    assert (rows[0]["reward"], rows[0]["valid"], rows[0]["vetoed"], rows[0]["veto"]) == (0.0, True, True, "clean")


def test_an_inline_rubric(files: tuple[Path, Path, Path]) -> None:
    inline = RUBRIC | {"id": "other", "veto_reward": -1.0}
    _, rows = score(files, [line(rubric=inline, judgements={"clean": 0})] * 2)
    assert [r["reward"] for r in rows] == [-1.0, -1.0]


BAD = {
    "not JSON": ("{oops", "not JSON"),
    "half a line": ('{"id": "x", "prompt"', "not JSON"),
    "not UTF-8": (b'{"id": "\xff\xfe"}', "not JSON"),
    "NaN": (
        '{"id":"x","prompt":"p","rubric":"note","response":"r","judgements":{"calm":NaN}}',
        "id x.*note: calm.*nan",
    ),
    "Infinity": (
        '{"id":"x","prompt":"p","rubric":"note","response":"r","judgements":{"calm":Infinity}}',
        "id x.*note: calm.*inf",
    ),
    "1e999": (
        '{"id":"x","prompt":"p","rubric":"note","response":"r","judgements":{"calm":1e999}}',
        "id x.*note: calm.*inf",
    ),
    "NaN where nobody reads it": (
        '{"id":"x","prompt":"p","rubric":"note","response":"r","more":NaN}',
        "id x.*not JSON",
    ),
    "NaN in an inline rubric": (
        '{"id":"x","prompt":"p","rubric":{"id":"i","criteria":[{"id":"c","weight":NaN}]},"response":"r"}',
        "id x.*rubric i, criterion c, weight: nan",
    ),
    "half a character": (r'{"id":"x\ud800","prompt":"p","rubric":"note","response":"r"}', "id x.*not JSON"),
    "a list": ("[1, 2]", "object"),
    "null": ("null", "object"),
    "no id": (line(id=...), "id: missing"),
    "no response": (line(response=...), "response: missing"),
    "response is no text": (line(response=["a"]), "response: must be a string"),
    "no prompt": (line(prompt=None), "prompt: must be a string"),
    "no rubric": (line(rubric=...), "rubric: missing"),
    "unknown rubric": (line(rubric="nope"), "nope"),
    "malformed inline rubric": (line(rubric={"id": "x"}), "criteria"),
    "value above the scale": (line(judgements={"calm": 3}), "calm.*not between 0 and 2"),
    "value below the scale": (line(judgements={"calm": -1}), "calm"),
    "text value": (line(judgements={"calm": "1"}), "calm"),
    "boolean value": (line(judgements={"calm": True}), "calm"),
    "unknown criterion": (line(judgements={"calmness": 1}), "calmness.*no such criterion"),
    "judgements are a list": (line(judgements=[1]), "judgements"),
    "misspelt key": (line(judgments={"calm": 1}), "did you mean judgements"),
    "a key twice": (
        '{"id":"x","prompt":"p","rubric":"note","response":"r","response":"s"}',
        "response: the key comes twice",
    ),
    "a criterion twice": (
        '{"id":"x","prompt":"p","rubric":"note","response":"r","judgements":{"calm":0,"calm":2}}',
        "calm: the key comes twice",
    ),
    "deep nesting": ("[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_costs_only_itself(
    name: str, files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bad, reason = BAD[name]
    status, rows = score(files, [line(judgements=STORED), bad, line(id="z", judgements=STORED)])
    assert status == 1 and [r["id"] for r in (rows[0], rows[2])] == ["a", "z"]
    assert rows[0]["valid"] and rows[2]["valid"] and rows[1]["valid"] is False and rows[1]["reward"] is None
    errors = [x for x in capsys.readouterr().err.splitlines() if "line 2" in x]
    assert len(errors) == 1 and str(files[1]) in errors[0]
    import re

    assert re.search(reason, errors[0]) and re.search(reason.removeprefix("id x.*"), rows[1]["error"])
    if reason.startswith("id x"):
        assert rows[1]["id"].startswith("x")
    assert set(rows[1]) == set(rows[0]) | {"error"}


def test_the_bad_lines_id_is_named_where_it_can_be_read(
    files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    twice = '{"id":"story-8","prompt":"p","rubric":"note","response":"r","response":"s"}'
    _, rows = score(files, [line(id="story-7", rubric="nope"), twice, line(id="two\nlines", rubric="nope")])
    error = capsys.readouterr().err
    assert [r["id"] for r in rows] == ["story-7", "story-8", "two\nlines"]
    assert "line 1 (id story-7): " in error and "line 2 (id story-8): " in error and "(id two lines): " in error


def test_a_long_stored_value_is_not_repeated_in_full(
    files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    score(files, [line(judgements={"calm": "x" * 10_000}), line(judgements={"calm": 10**400})])
    assert all(len(x) < 400 for x in capsys.readouterr().err.splitlines())


def test_blank_lines_a_byte_order_mark_and_a_missing_newline_are_no_matter(files: tuple[Path, Path, Path]) -> None:
    text = json.dumps(line(judgements=STORED)).encode()
    status, rows = score(files, [b"\xef\xbb\xbf" + text + b"\r", b"", b"   ", text])
    assert status == 0 and len(rows) == 2


def test_an_empty_file_gives_an_empty_file(files: tuple[Path, Path, Path]) -> None:
    assert score(files, []) == (0, [])


def test_unicode_survives(files: tuple[Path, Path, Path]) -> None:
    _, rows = score(files, [line(id="Ünïcode 🎈 \u2028", judgements=STORED)])
    assert rows[0]["id"] == "Ünïcode 🎈 \u2028"


def test_many_lines_keep_their_order_through_small_chunks(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_module, "CHUNK_LINES", 7)
    lines = [line(id=str(i), judgements={"calm": i % 3, "clean": 1}) if i % 11 else "junk" for i in range(500)]
    status, rows = score(files, lines)
    assert status == 1 and [r["id"] for r in rows] == [str(i) if i % 11 else None for i in range(500)]
    assert [r["scores"]["calm"] for r in rows if r["valid"]] == [(i % 3) / 2 for i in range(500) if i % 11]


def test_a_line_that_is_too_long_is_bad_and_the_rest_goes_on(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_module, "MAX_LINE_BYTES", 1000)
    status, rows = score(files, [line(judgements=STORED), line(response="x" * 5000), line(id="z", judgements=STORED)])
    assert status == 1 and [r["valid"] for r in rows] == [True, False, True] and "longer than" in rows[1]["error"]


def test_only_so_much_is_read_ahead(files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_module, "CHUNK_LINES", 10)
    started = finished = most = 0

    class Slow:
        identity, grain, concurrency = "slow", 64, 1000

        async def tier_logprobs(self, queries: Sequence[TierQuery]) -> list[TierReply]:
            nonlocal started, finished, most
            started += len(queries)
            most = max(most, started - finished)
            await asyncio.sleep(0.002)
            finished += len(queries)
            return [TierReply(verdict=1) for _ in queries]

    rubrics, responses, out = files
    responses.write_text("".join(json.dumps(line(id=str(i), response=f"Text {i}.")) + "\n" for i in range(300)))
    judge = Judge(Slow())
    summary = asyncio.run(score_file(rubrics, responses, out, judge, report=print))
    assert summary.scored == 300 and started == 600 and most <= 2 * 10 * score_module.CHUNKS_UNDER_WAY


def test_nothing_is_left_behind_when_the_job_fails(files: tuple[Path, Path, Path]) -> None:
    class Broken:
        identity, grain, concurrency = "broken", 64, 8

        async def tier_logprobs(self, queries: Sequence[TierQuery]) -> list[TierReply]:
            from megarubric.errors import ProcessDied

            raise ProcessDied("engine gone")

    rubrics, responses, out = files
    responses.write_text(json.dumps(line()) + "\n")
    out.parent.mkdir()
    out.write_text("old\n")
    with pytest.raises(Exception, match="engine gone"):
        asyncio.run(score_file(rubrics, responses, out, Judge(Broken()), report=print))
    assert out.read_text() == "old\n" and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rubrics": "missing.yaml"}, "missing.yaml"),
        ({"responses": "missing.jsonl"}, "missing.jsonl"),
        ({"judge": "no/such/model"}, "neither none, a URL nor a model directory"),
        ({"judge": "http://127.0.0.1:9/v1"}, "does not answer"),
        ({"replay_only": True}, "needs --cache"),
        ({"out": "."}, "is a directory"),
    ],
)
def test_what_makes_the_whole_job_impossible_is_one_line(
    change: dict[str, Any], reason: str, files: tuple[Path, Path, Path]
) -> None:
    rubrics, responses, out = files
    responses.write_text(json.dumps(line()) + "\n")
    arguments: dict[str, Any] = {"rubrics": rubrics, "responses": responses, "out": out}
    use = JudgeUse(**{k: v for k, v in change.items() if k not in arguments})
    arguments |= {k: rubrics.parent / v for k, v in change.items() if k in arguments}
    with pytest.raises(BadInput, match=reason) as caught:
        run_score(**arguments, use=use)
    assert "\n" not in str(caught.value)


def test_a_url_judge_fills_in_what_is_not_stored_and_its_replay_is_the_same_to_the_byte(
    files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    def handler(server: Any, path: str, body: dict[str, Any]) -> Reply:
        if "answer 3" in body["messages"][1]["content"]:
            return Reply(b"", 400)
        return chat_reply([("1", {"0": math.log(0.3), "1": math.log(0.6), "2": math.log(0.05)})])

    rubrics, responses, out = files
    responses.write_text("".join(json.dumps(line(id=str(i), response=f"This is answer {i}.")) + "\n" for i in range(6)))

    @contextlib.asynccontextmanager
    async def run(cache: Path) -> AsyncIterator[int]:
        async with http_judge(handler) as server:
            use = JudgeUse(f"{server.url}#m", cache=cache)
            status = await asyncio.to_thread(run_score, rubrics, responses, out, use)
            assert status == 0
            yield len(server.requests)

    async def main() -> bytes:
        async with run(tmp_path / "judge.db") as requests:
            assert requests == 5 * 2 + 2 * 2  # the refused one is asked a second time without log-probabilities
        return out.read_bytes()

    first = asyncio.run(main())
    rows = [json.loads(x) for x in first.splitlines()]
    assert rows[0]["scores"]["calm"] == pytest.approx((0.6 + 2 * 0.05) / 0.95 / 2)
    assert rows[3]["unread"] == ["calm", "clean"] and rows[3]["reward"] is None
    replay = JudgeUse(cache=tmp_path / "judge.db", replay_only=True)
    assert run_score(rubrics, responses, out, replay) == 0
    assert out.read_bytes() == first
