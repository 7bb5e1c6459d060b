"""The engine pool: every question once and in order, an answer's criteria together, work level, failures contained."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarubric.errors import ProcessDied
from megarubric.exchange.rpc import RemoteError
from megarubric.judging.backends.pool import EnginePool
from megarubric.rollout.messages import Completion, GenerateRequest, TokenScores, TokenTierQuery

TIERS = np.array([1, 2], np.int32)


class Engine:
    """Answers each prompt with its own last token, when it may; remembers what it was asked."""

    def __init__(self, failure: Callable[[], Exception | None] = lambda: None) -> None:
        self.failure, self.asked = failure, list[TokenTierQuery | GenerateRequest]()
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def _serve(self, requests: Sequence[TokenTierQuery | GenerateRequest]) -> list[int]:
        self.asked += requests
        await self.may_answer.wait()
        await asyncio.sleep(0)
        if (error := self.failure()) is not None:
            raise error
        return [int(r.prompt_ids[-1]) for r in requests]

    async def tier_logprobs(self, queries: Sequence[TokenTierQuery]) -> list[TokenScores]:
        return [TokenScores(np.full(2, n, np.float32), 0) for n in await self._serve(queries)]

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        none = np.empty(0, np.float32)
        return [Completion(np.array([n], np.int32), none, "stop", 0, 0) for n in await self._serve(requests)]

    @property
    def prefixes(self) -> set[int]:
        return {r.prefix for r in self.asked}


def criteria(answer: int, count: int, length: int = 40) -> list[TokenTierQuery]:
    """The questions about one answer: `length` tokens that are its own, three of each criterion, the last unique."""
    shared = np.full(length, answer, np.int32)
    ends = [np.array([7, k, 1000 * answer + k], np.int32) for k in range(count)]
    return [TokenTierQuery(np.concatenate([shared, end]), TIERS, prefix=answer) for end in ends]


def values(replies: Sequence[TokenScores]) -> list[float | None]:
    return [None if r.logprobs is None else float(r.logprobs[0]) for r in replies]


def last_tokens(queries: Sequence[TokenTierQuery]) -> list[int]:
    return [int(q.prompt_ids[-1]) for q in queries]


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 60)), min_size=1, max_size=24), st.integers(1, 8), st.data()
)
def test_every_question_is_answered_once_in_order_and_prefixes_stay_together(
    answers: list[tuple[int, int]], count: int, data: st.DataObject
) -> None:
    asked = [q for i, (k, length) in enumerate(answers, start=1) for q in criteria(i, k, length)]
    cut = data.draw(st.integers(0, len(asked)))  # a chunk's border may fall between two criteria of an answer
    calls = [data.draw(st.permutations(part)) for part in (asked[:cut], asked[cut:])]

    async def main() -> tuple[list[list[TokenScores]], list[Engine], EnginePool]:
        engines = [Engine() for _ in range(count)]
        pool = EnginePool(engines, timeout_s=60)
        return await asyncio.gather(*map(pool.tier_logprobs, calls)), engines, pool

    replies, engines, pool = asyncio.run(main())
    assert [values(r) for r in replies] == [last_tokens(c) for c in calls]
    assert Counter(last_tokens([q for e in engines for q in e.asked])) == Counter(last_tokens(asked))
    assert sum(len(e.prefixes) for e in engines) == len(answers)
    assert pool.outstanding == [0] * count


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 60)), min_size=1, max_size=24), st.integers(1, 8))
def test_work_is_level_to_within_the_largest_answer(answers: list[tuple[int, int]], count: int) -> None:
    async def main() -> list[int]:
        engines = [Engine() for _ in range(count)]
        for engine in engines:
            engine.may_answer.clear()
        pool = EnginePool(engines, timeout_s=60)
        calls = [
            asyncio.create_task(pool.tier_logprobs(criteria(i, k, n))) for i, (k, n) in enumerate(answers, start=1)
        ]
        await asyncio.sleep(0)
        outstanding = list(pool.outstanding)
        for call in calls:
            call.cancel()
        return outstanding

    costs = [length + 3 * k - (k - 1) for k, length in answers]  # the shared tokens once, and the 7 behind them
    outstanding = asyncio.run(main())
    assert sum(outstanding) == sum(costs)
    assert max(outstanding) - min(outstanding) <= max(costs)


def test_unknown_prefixes_are_spread_one_by_one_and_written_tokens_weigh() -> None:
    async def main() -> tuple[list[Completion], list[Engine]]:
        engines = [Engine(), Engine()]
        pool = EnginePool(engines, timeout_s=60)
        lengths = [500, 20, 20, 20]
        prompts = [np.array([5, i], np.int32) for i in range(4)]
        return await pool.generate([GenerateRequest(p, n, seed=1) for p, n in zip(prompts, lengths)]), engines

    replies, engines = asyncio.run(main())
    assert [r.token_ids.tolist() for r in replies] == [[0], [1], [2], [3]]
    assert sorted(len(e.asked) for e in engines) == [1, 3]


def test_an_engine_that_fails_is_asked_for_by_another_and_then_left_alone() -> None:
    async def main() -> None:
        bad, good = Engine(lambda: RemoteError("Broken: no")), Engine()
        pool = EnginePool([bad, good], timeout_s=60)
        first = criteria(1, 3) + criteria(2, 3)
        assert values(await pool.tier_logprobs(first)) == last_tokens(first)
        assert len(bad.asked) == 3 and len(good.asked) == 6
        later = criteria(1, 4) + criteria(3, 3) + criteria(4, 2)
        assert values(await pool.tier_logprobs(later)) == last_tokens(later)
        assert len(bad.asked) == 3

    asyncio.run(main())


def test_what_fails_twice_is_an_error_and_the_rest_of_the_call_is_not() -> None:
    async def main() -> None:
        broken = [Engine(lambda: RemoteError("Broken: no")) for _ in range(2)]
        pool = EnginePool([*broken, Engine()], timeout_s=60)
        pool.outstanding[2] = 10**6  # so that the good one gets what the others have failed in already
        replies = await pool.tier_logprobs(criteria(1, 2) + criteria(2, 2))
        assert values(replies) == [None, None, 2000, 2001]
        assert [r.error for r in replies] == ["Broken: no", "Broken: no", None, None]
        alone = EnginePool(broken[:1], timeout_s=60)
        (reply,) = await alone.generate([GenerateRequest(np.array([1], np.int32), 4, seed=0)])
        assert (reply.error, reply.finish_reason, len(reply.token_ids)) == ("Broken: no", "error", 0)

    asyncio.run(main())


def test_too_few_answers_are_a_failure() -> None:
    class Short(Engine):
        async def tier_logprobs(self, queries: Sequence[TokenTierQuery]) -> list[TokenScores]:
            return (await super().tier_logprobs(queries))[1:]

    async def main() -> None:
        replies = await EnginePool([Short()], timeout_s=60).tier_logprobs(criteria(1, 3))
        assert [r.error for r in replies] == ["wrong number of answers: 2 for 3 questions"] * 3
        asked = criteria(1, 3)
        assert values(await EnginePool([Short(), Engine()], timeout_s=60).tier_logprobs(asked)) == last_tokens(asked)

    asyncio.run(main())


def test_a_late_engine_keeps_its_load_until_it_answers() -> None:
    async def main() -> None:
        late, good = Engine(), Engine()
        late.may_answer.clear()
        pool = EnginePool([late, good], timeout_s=0.05)
        asked = criteria(1, 3)
        assert values(await pool.tier_logprobs(asked)) == last_tokens(asked)
        assert pool.outstanding[0] > 0 and pool.outstanding[1] == 0
        late.may_answer.set()
        while pool.outstanding[0]:
            await asyncio.sleep(0)

    asyncio.run(main())


def test_a_call_that_is_given_up_leaves_its_load_with_the_engine() -> None:
    async def main() -> None:
        engine = Engine()
        engine.may_answer.clear()
        pool = EnginePool([engine], timeout_s=60)
        call = asyncio.create_task(pool.tier_logprobs(criteria(1, 3)))
        while not engine.asked:
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert pool.outstanding == [40 + 9 - 2]
        engine.may_answer.set()
        while pool.outstanding[0]:
            await asyncio.sleep(0)

    asyncio.run(main())


def test_a_dead_process_ends_the_call_by_name() -> None:
    async def main() -> None:
        engines = [Engine(), Engine(lambda: ProcessDied("judge-1 was killed"))]
        await EnginePool(engines, timeout_s=60).tier_logprobs(criteria(1, 2) + criteria(2, 2))

    with pytest.raises(ProcessDied, match="judge-1 was killed"):
        asyncio.run(main())
