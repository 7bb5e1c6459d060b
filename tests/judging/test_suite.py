from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from http_judge import HttpJudge, Reply, chat_reply, http_judge

from megarubric.errors import BadInput
from megarubric.judging.judge import Judge
from megarubric.judging.opening import JudgeUse
from megarubric.judging.prompt import plain_text
from megarubric.judging.settings import JudgeSettings
from megarubric.judging.suite import JudgeReport, LabelledAnswer, load_labelled, run_judge_suite
from megarubric.judging.types import JudgeItem, TierQuery, TierReply
from megarubric.judging.verb import run_judge_eval
from megarubric.rubrics import parse_rubric

RUBRIC = {
    "id": "r",
    "criteria": [
        {"id": "calm", "description": "Calm.", "tiers": [{"value": v, "text": f"calm {v}"} for v in (0, 1, 2)]},
        {"id": "plain", "description": "Plain."},
    ],
}


def answers(count: int = 40) -> list[LabelledAnswer]:
    """Answers that say in words how calm and plain they are; the calmer ones are longer."""
    rubric = parse_rubric(RUBRIC, "t")
    out = []
    for i in range(count):
        calm, plain = i % 3, i // 3 % 2
        text = f"Note {i} has calmness {calm} and plainness {plain}. " + "The sea was grey. " * (1 + 5 * calm)
        item = JudgeItem(rubric, "Write.", text.strip())
        author = "me" if i % 2 else "other"
        out.append(LabelledAnswer(item, {"calm": float(calm), "plain": float(plain)}, author))
    return out


class Scripted:
    """Finds the true tier in the answer, then lets `choose(query, true, text)` decide."""

    identity, grain, concurrency = "scripted", 64, 8

    def __init__(self, choose: Callable[[TierQuery, int, str], int | None] = lambda q, true, text: true) -> None:
        self._choose = choose

    async def tier_logprobs(self, queries: Sequence[TierQuery]) -> list[TierReply]:
        return [self._reply(q) for q in queries]

    def _reply(self, q: TierQuery) -> TierReply:
        text = plain_text(q.parts)
        answer, _, question = text.rpartition("Criterion: ")
        true = int(re.findall(rf"{'calm' if 'Calm' in question else 'plain'}ness (\d)", answer)[-1])
        listed_high_first = question.index(": calm 2") < question.index(": calm 0") if "Calm" in question else (
            question.index("Yes.") < question.index("No.")
        )  # fmt: skip
        if listed_high_first:
            true = len(q.tiers) - 1 - true
        tier = self._choose(q, true, answer)
        if tier is None:
            return TierReply(error="no")
        return TierReply(logprobs=tuple(0.0 if i == tier else -math.inf for i in range(len(q.tiers))))


def examine(choose: Any = None, **kwargs: Any) -> JudgeReport:
    backend = Scripted(choose) if choose else Scripted()
    judge = Judge(backend, JudgeSettings(template="tier_compact"))
    return asyncio.run(run_judge_suite(judge, answers(), resamples=50, **({"attacks": 0} | kwargs)))


def test_a_perfect_judge() -> None:
    report = examine()
    assert report.overall.accuracy.value == report.overall.kappa.value == report.overall.alpha.value == 1.0
    assert set(report.criteria) == {"r/calm", "r/plain"} and report.criteria["r/calm"].quadratic_kappa.value == 1.0
    assert report.flip_rate == 0.0 and report.biases.tier_order == 0.0 and report.biases.verbosity == 0.0
    assert report.calibration_error == 0.0 and report.unread == 0.0 and report.attacks is None


def test_a_judge_that_takes_the_tier_listed_last_is_seen_by_its_tier_order() -> None:
    report = examine(lambda q, true, text: len(q.tiers) - 1)
    assert report.biases.tier_order == 1.0 and report.overall.kappa.value == pytest.approx(0.0, abs=1e-9)


def test_a_judge_that_likes_length_is_seen_by_its_errors() -> None:
    report = examine(lambda q, true, text: len(q.tiers) - 1 if text.count("grey") > 5 else 0)
    assert report.biases.length.value > 0.3 and report.biases.length.low > 0


def test_a_judge_that_changes_its_mind_is_seen_by_the_second_draw() -> None:
    report = examine(lambda q, true, text: (true + q.draw) % len(q.tiers))
    assert report.flip_rate == 1.0 and report.overall.accuracy.value == 1.0


def test_a_judge_that_prefers_its_own_answers() -> None:
    def choose(q: TierQuery, true: int, text: str) -> int:
        own = int(re.findall(r"Note (\d+) has", text)[-1]) % 2
        return len(q.tiers) - 1 if own else true

    report = examine(choose, author="me")
    assert report.biases.self_preference.value > 0.3 and report.biases.self_preference.low > 0
    assert math.isnan(examine().biases.self_preference.value)


def test_calibration_mends_an_over_crediting_judge_on_the_other_half() -> None:
    report = examine(lambda q, true, text: max(true, len(q.tiers) - 2) if "Calm" in str(q.parts) else true)
    assert report.calibration_error > 0.05 and report.calibration_error_calibrated < 0.5 * report.calibration_error


def test_unread_judgements_are_counted_and_left_out() -> None:
    report = examine(lambda q, true, text: None if "Note 1" in text else true)
    assert report.unread > 0.2 and report.overall.accuracy.value == 1.0


def test_the_attacks_are_part_of_it() -> None:
    report = examine(attacks=2)
    assert report.attacks is not None and len(report.attacks.results) >= 60


def test_labels_come_in_the_responses_format_and_do_not_reach_the_judge(tmp_path: Path) -> None:
    (tmp_path / "rubrics.json").write_text(json.dumps(RUBRIC))
    line = {
        "id": "a",
        "prompt": "p",
        "rubric": "r",
        "response": "x",
        "judgements": {"calm": 2, "plain": None},
        "author": "m",
    }
    (tmp_path / "labelled.jsonl").write_text(json.dumps(line) + "\n")
    loaded = load_labelled(tmp_path / "rubrics.json", tmp_path / "labelled.jsonl")
    assert loaded[0].labels == {"calm": 2.0} and loaded[0].item.stored is None and loaded[0].author == "m"
    (tmp_path / "labelled.jsonl").write_text(json.dumps(line | {"judgements": {}}) + "\n")
    with pytest.raises(BadInput, match="line 1"):
        load_labelled(tmp_path / "rubrics.json", tmp_path / "labelled.jsonl")


def test_no_answers_are_refused() -> None:
    with pytest.raises(BadInput, match="no labelled answers"):
        asyncio.run(run_judge_suite(Judge(None), []))


def test_the_report_is_written_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rubrics.json").write_text(json.dumps(RUBRIC))
    labelled = [
        {
            "id": "x",
            "prompt": "p",
            "rubric": "r",
            "response": f"Note {i}.",
            "judgements": {"calm": i % 3, "plain": i % 2},
        }
        for i in range(24)
    ]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(x) + "\n" for x in labelled))

    def handler(server: HttpJudge, path: str, body: dict[str, Any]) -> Reply:
        n = int(re.findall(r"Note (\d+)", body["messages"][-1]["content"])[0])
        tier = n % 3 if "Calm." in body["messages"][-1]["content"] else n % 2
        return chat_reply([(str(tier), {str(tier): -0.01})])

    async def main() -> int:
        async with http_judge(handler) as server:
            use = JudgeUse(f"{server.url}#m")
            files = (tmp_path / "rubrics.json", tmp_path / "labelled.jsonl", tmp_path / "report.json")
            return await asyncio.to_thread(run_judge_eval, *files, use, attacks=0)

    assert asyncio.run(main()) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["overall"]["accuracy"]["value"] == 1.0 and report["attacks"] is None
    assert "r/calm" in capsys.readouterr().out
