from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from megarubric.errors import BadInput, ProcessDied
from megarubric.judging.judge import Judge
from megarubric.judging.prompt import plain_text
from megarubric.judging.settings import JudgeSettings
from megarubric.judging.types import JudgeItem, Judgement, TierQuery, TierReply
from megarubric.rubrics import Rubric, parse_rubric

PEAKED = TierReply(logprobs=(math.log(0.1), math.log(0.2), math.log(0.6)))


def rubric(**changes: Any) -> Rubric:
    plain: dict[str, Any] = {
        "id": "r",
        "criteria": [
            {"id": "calm", "description": "Calm.", "tiers": [{"value": v, "text": f"t{v}"} for v in (0, 1, 4)]},
            {
                "id": "short",
                "check": {"kind": "length_constraints:number_words", "relation": "less than", "num_words": 5},
            },
            {"id": "plain", "description": "Plain."},
        ],
    }
    return parse_rubric(plain | changes, "test")


class Backend:
    """Answers with `reply` (a reply, a list for the whole call, an exception, or a function of the queries)."""

    identity = "test"

    def __init__(self, *replies: Any, grain: int = 64, concurrency: int = 8) -> None:
        self.replies = replies
        self.grain, self.concurrency = grain, concurrency
        self.calls: list[list[TierQuery]] = []

    async def tier_logprobs(self, queries: Sequence[TierQuery]) -> list[TierReply]:
        self.calls.append(list(queries))
        reply = self.replies[min(len(self.calls), len(self.replies)) - 1]
        if isinstance(reply, Callable):  # type: ignore[arg-type]
            reply = reply(queries)
            if asyncio.iscoroutine(reply):
                reply = await reply
        if isinstance(reply, BaseException):
            raise reply
        return reply if isinstance(reply, list) else [reply for _ in queries]


def fitting(queries: Sequence[TierQuery]) -> list[TierReply]:
    """Certain of the highest tier."""
    return [TierReply(logprobs=(-math.inf,) * (len(q.tiers) - 1) + (0.0,)) for q in queries]


def judge(
    backend: Backend | None, items: list[JudgeItem] | None = None, **settings: Any
) -> tuple[list[dict[str, Judgement]], Judge]:
    async def main() -> tuple[list[dict[str, Judgement]], Judge]:
        j = Judge(backend, JudgeSettings(**({"timeout_s": 5.0} | settings)))
        return await j.judge(items or [JudgeItem(rubric(), "Say hi.", "Hi there.")]), j

    return asyncio.run(main())


def test_the_score_is_the_expectation_over_the_tiers_and_keeps_entropy_and_mass() -> None:
    rows, j = judge(Backend(lambda qs: [PEAKED if len(q.tiers) == 3 else fitting([q])[0] for q in qs]))
    calm = rows[0]["calm"]
    assert calm.value == pytest.approx((0 * 0.1 + 1 * 0.2 + 4 * 0.6) / 0.9)
    assert calm.score == pytest.approx(calm.value / 4) and calm.tier_mass == pytest.approx(0.9)
    p = [1 / 9, 2 / 9, 6 / 9]
    assert calm.entropy == pytest.approx(-sum(x * math.log(x) for x in p))
    assert list(rows[0]) == ["calm", "short", "plain"]
    assert (rows[0]["short"].source, rows[0]["short"].value) == ("check", 1.0)
    assert (j.stats.asked, j.stats.read, j.stats.checks) == (2, 2, 1)


def test_the_prompt_holds_question_answer_and_the_one_criterion() -> None:
    backend = Backend(fitting)
    judge(backend)
    text = plain_text(backend.calls[0][0].parts)
    assert "Say hi." in text and "Hi there." in text and "Calm." in text and "Plain." not in text and "2: t4" in text


def test_stored_judgements_are_used_as_given_and_null_is_not_unread() -> None:
    backend = Backend(fitting)
    rows, j = judge(backend, [JudgeItem(rubric(), "q", "a", {"calm": 1, "plain": None, "short": 0})])
    row = rows[0]
    assert (row["calm"].value, row["calm"].score, row["calm"].source) == (1, 0.25, "stored")
    assert row["plain"].value is None and row["plain"].read and row["short"].score == 0.0
    assert not backend.calls and j.stats.stored == 3


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        ({"calm": 5}, "calm.*not between 0 and 4"),
        ({"calm": -0.1}, "not between"),
        ({"calm": math.nan}, "not between"),
        ({"calm": math.inf}, "not between"),
        ({"calm": True}, "not between"),
        ({"calm": "1"}, "not between"),
        ({"calmness": 1}, "no such criterion"),
    ],
)
def test_stored_judgements_that_do_not_fit_are_bad_input(stored: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        judge(None, [JudgeItem(rubric(), "q", "a", stored)])


def test_without_a_backend_judged_criteria_are_masked() -> None:
    row = judge(None)[0][0]
    assert row["calm"].value is None and not row["calm"].read and row["calm"].source == "none"
    assert row["short"].value == 1.0


FAILURES: dict[str, tuple[Any, str]] = {
    "exception": (RuntimeError("boom"), "RuntimeError: boom"),
    "error reply": (TierReply(error="HTTP 500"), "HTTP 500"),
    "too few answers": ([PEAKED], "wrong number of answers: 1 for 2"),
    "no answers": ([], "wrong number of answers: 0 for 2"),
    "too many answers": ([PEAKED] * 3, "wrong number of answers: 3 for 2"),
    "nothing": (TierReply(), "wrong number of tier log-probabilities"),
    "one tier too few": (TierReply(logprobs=(0.0,)), "wrong number of tier log-probabilities"),
    "NaN": (lambda qs: [TierReply(logprobs=(math.nan,) * len(q.tiers)) for q in qs], "not log-probabilities"),
    "logits": (lambda qs: [TierReply(logprobs=(3.0,) * len(q.tiers)) for q in qs], "not log-probabilities"),
    "all -inf": (lambda qs: [TierReply(logprobs=(-math.inf,) * len(q.tiers)) for q in qs], "low tier mass"),
    "low mass": (lambda qs: [TierReply(logprobs=(-3.0,) * len(q.tiers)) for q in qs], "low tier mass"),
    "verdict out of range": (TierReply(verdict=7), "verdict out of range"),
    "negative verdict": (TierReply(verdict=-1), "verdict out of range"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_whatever_the_judge_does_is_masked_counted_and_never_zero(name: str) -> None:
    reply, reason = FAILURES[name]
    rows, j = judge(Backend(reply))
    for criterion in ("calm", "plain"):
        judgement = rows[0][criterion]
        assert judgement.value is None and judgement.score is None and not judgement.read
        assert reason in (judgement.reason or "") and judgement.source == "judge"
    assert rows[0]["short"].value == 1.0
    assert j.stats.unread == 2 and j.stats.unread_fraction == 1.0 and j.stats.failures.total() == 2


def test_a_judge_that_hangs_is_timed_out() -> None:
    rows, j = judge(Backend(lambda qs: asyncio.sleep(60)), timeout_s=0.05, retries=1)
    assert "timed out after 0.05 s" in (rows[0]["calm"].reason or "") and j.stats.calls == 2 and j.stats.retried == 1


def test_a_failed_call_is_repeated() -> None:
    rows, j = judge(Backend(RuntimeError("once"), [], fitting), retries=2)
    assert rows[0]["calm"].value == 4 and j.stats.retried == 2 and j.stats.unread == 0


def test_the_death_of_the_judges_process_is_not_hidden() -> None:
    with pytest.raises(ProcessDied):
        judge(Backend(ProcessDied("judge engine: killed by signal 9")))


def test_a_verdict_without_log_probabilities_counts_as_its_tier() -> None:
    assert judge(Backend(TierReply(verdict=1)))[0][0]["calm"].value == 1


def test_references_are_shown_only_to_criteria_that_need_them_and_missed_where_absent() -> None:
    criteria = [
        {"id": "with", "description": "w", "needs_reference": True},
        {"id": "without", "description": "w"},
    ]
    backend = Backend(fitting)
    judge(backend, [JudgeItem(rubric(criteria=criteria, reference="The model answer."), "q", "a")])
    assert ["The model answer." in plain_text(q.parts) for q in backend.calls[0]] == [True, False]
    row = judge(backend, [JudgeItem(rubric(criteria=criteria), "q", "a")])[0][0]
    assert row["with"].value is None and "reference" in (row["with"].reason or "") and row["without"].value == 1


def test_equal_answers_are_judged_once() -> None:
    backend = Backend(fitting)
    rows, j = judge(backend, [JudgeItem(rubric(), "q", "a")] * 5 + [JudgeItem(rubric(), "q", "b")])
    assert sum(map(len, backend.calls)) == 4 and j.stats.asked == 12 and rows[0] == rows[4]


def test_eleven_tiers_use_letters_and_more_than_26_are_masked() -> None:
    def tiers(n: int) -> list[dict[str, Any]]:
        return [{"id": "c", "description": "d", "tiers": [{"value": i, "text": "t"} for i in range(n)]}]

    backend = Backend(fitting)
    assert judge(backend, [JudgeItem(rubric(criteria=tiers(11)), "q", "a")])[0][0]["c"].value == 10
    assert backend.calls[0][0].tiers == tuple("ABCDEFGHIJK")
    row = judge(backend, [JudgeItem(rubric(criteria=tiers(27)), "q", "a")])[0][0]
    assert row["c"].value is None and "at most 26" in (row["c"].reason or "")


def test_calls_are_chunked_and_overlap_up_to_the_limit() -> None:
    active = most = 0

    async def slow(queries: Sequence[TierQuery]) -> list[TierReply]:
        nonlocal active, most
        active += 1
        most = max(most, active)
        await asyncio.sleep(0.005)
        active -= 1
        return fitting(queries)

    backend = Backend(slow, grain=4, concurrency=3)
    items = [JudgeItem(rubric(), "q", f"answer {i}") for i in range(20)]
    rows, _ = judge(backend, items)
    assert len(backend.calls) == 10 and most == 3 and all(r["calm"].value == 4 for r in rows)


def test_judging_overlaps_with_what_streams_in() -> None:
    async def main() -> list[float]:
        j = Judge(Backend(fitting), JudgeSettings())
        tasks = []
        for i in range(10):
            tasks.append(asyncio.create_task(j.judge([JudgeItem(rubric(), "q", f"answer {i}")])))
            await asyncio.sleep(0)
        return [(await t)[0]["calm"].value or 0.0 for t in tasks]

    assert asyncio.run(main()) == [4.0] * 10


def test_a_broken_check_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    import megarubric.judging.judge as module

    def broken(*args: object) -> float:
        raise ZeroDivisionError("odd text")

    monkeypatch.setattr(module, "run_check", broken)
    row = judge(None)[0][0]
    assert row["short"].value is None and not row["short"].read and "odd text" in (row["short"].reason or "")
