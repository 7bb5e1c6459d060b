from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from megarubric.errors import BadInput
from megarubric.judging.cache import CachedBackend, JudgeCache
from megarubric.judging.types import TierQuery, TierReply


def query(n: int, draw: int = 0) -> TierQuery:
    return TierQuery((), ("0", "1"), f"content {n}", draw)


class CountingJudge:
    """Answers every question with a reply of its own, one question in `fail` with an error, and writes down what it was
    asked, one line a question, in `journal`. `die_at` such lines end the process by SIGKILL before the next."""

    concurrency = 8

    def __init__(
        self,
        identity: str = "judge",
        fail: Sequence[str] = (),
        journal: Path | None = None,
        grain: int = 64,
        die_at: int = 0,
    ) -> None:
        self.identity, self.grain, self._die_at = identity, grain, die_at
        self.asked: Counter[str] = Counter()
        self._fail, self._journal = fail, journal

    async def tier_logprobs(self, queries: Sequence[TierQuery]) -> list[TierReply]:
        await asyncio.sleep(0.001)
        replies = []
        for q in queries:
            self.asked[q.content] += 1
            serial = self.asked.total()
            replies.append(
                TierReply(error="no") if q.content in self._fail else TierReply(logprobs=(-math.inf, -1 / (serial + 2)))
            )
        if self._die_at and self.asked.total() > self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._journal is not None:
            with self._journal.open("a") as f:
                f.writelines(q.content + "\n" for q in queries)
        return replies


def run(backend: CachedBackend, queries: Sequence[TierQuery]) -> list[TierReply]:
    return asyncio.run(backend.tier_logprobs(queries))  # type: ignore[arg-type]


def test_a_question_is_asked_once_and_answered_the_same_in_every_process(tmp_path: Path) -> None:
    judge = CountingJudge()
    cache = JudgeCache(tmp_path / "judge.db")
    first = run(CachedBackend(judge, cache), [query(i % 5) for i in range(10)])
    cache.close()
    again = JudgeCache(tmp_path / "judge.db")
    assert run(CachedBackend(judge, again), [query(i % 5) for i in range(10)]) == first
    assert set(judge.asked.values()) == {1} and first[0].logprobs == (-math.inf, -1 / 3)
    stats = again.stats()
    assert (stats.entries, stats.hits, stats.misses, stats.hit_rate) == (5, 5, 0, 1.0)
    assert stats.bytes > 0
    again.close()


def test_what_decides_a_reply_is_in_its_name(tmp_path: Path) -> None:
    cache = JudgeCache(tmp_path / "judge.db")
    a, b = CountingJudge("judge a"), CountingJudge("judge b")
    run(CachedBackend(a, cache), [query(1), query(1, draw=1), query(2), TierQuery((), ("0", "1", "2"), "content 1")])
    run(CachedBackend(b, cache), [query(1)])
    assert a.asked == {"content 1": 3, "content 2": 1} and b.asked == {"content 1": 1}
    assert cache.judges() == ["judge a", "judge b"]
    cache.close()


def test_errors_are_not_kept(tmp_path: Path) -> None:
    cache = JudgeCache(tmp_path / "judge.db")
    assert run(CachedBackend(CountingJudge(fail=["content 1"]), cache), [query(1), query(2)])[0].error == "no"
    assert run(CachedBackend(CountingJudge(), cache), [query(1), query(2)])[0].error is None
    cache.close()


def test_replay_asks_nobody_and_reports_what_is_missing(tmp_path: Path) -> None:
    cache = JudgeCache(tmp_path / "judge.db")
    kept = run(CachedBackend(CountingJudge(), cache), [query(1)])
    replayed = run(CachedBackend(None, cache, identity="judge"), [query(1), query(2)])
    assert replayed[0] == kept[0] and "replay" in (replayed[1].error or "")
    with pytest.raises(ValueError, match="identity"):
        CachedBackend(None, cache)
    cache.close()


@pytest.mark.parametrize("grain", [1, 3])
def test_overlapping_calls_share_a_question_under_way(tmp_path: Path, grain: int) -> None:
    judge = CountingJudge(grain=grain)
    cache = JudgeCache(tmp_path / "judge.db")
    backend = CachedBackend(judge, cache)

    async def main() -> list[list[TierReply]]:
        return list(await asyncio.gather(*(backend.tier_logprobs([query(i) for i in range(20)]) for _ in range(5))))

    results = asyncio.run(main())
    assert set(judge.asked.values()) == {1} and all(r == results[0] for r in results)
    cache.close()


def test_a_failed_group_keeps_its_neighbours_replies(tmp_path: Path) -> None:
    class Failing(CountingJudge):
        async def tier_logprobs(self, queries: Sequence[TierQuery]) -> list[TierReply]:
            if any(q.content == "content 3" for q in queries):
                return []
            return await super().tier_logprobs(queries)

    cache = JudgeCache(tmp_path / "judge.db")
    with pytest.raises(RuntimeError, match="wrong number of answers"):
        run(CachedBackend(Failing(grain=1), cache), [query(i) for i in range(6)])
    assert cache.stats().entries == 5
    cache.close()


def test_a_cancelled_call_keeps_what_had_come_and_leaves_nothing_under_way(tmp_path: Path) -> None:
    class Slow(CountingJudge):
        async def tier_logprobs(self, queries: Sequence[TierQuery]) -> list[TierReply]:
            if queries[0].content == "content 3":
                await asyncio.sleep(60)
            return await super().tier_logprobs(queries)

    cache = JudgeCache(tmp_path / "judge.db")

    async def main() -> None:
        backend = CachedBackend(Slow(grain=1), cache)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(backend.tier_logprobs([query(i) for i in range(4)]), 0.3)
        assert not backend._asking
        assert len(await backend.tier_logprobs([query(i) for i in range(3)])) == 3

    asyncio.run(main())
    assert cache.stats().entries == 3
    cache.close()


def _work(path: Path, journal: Path, numbers: range, grain: int, die_at: int = 0) -> None:
    cache = JudgeCache(path)
    backend = CachedBackend(CountingJudge(journal=journal, grain=grain, die_at=die_at), cache)
    for start in range(0, len(numbers), 50):
        run(backend, [query(i) for i in numbers[start : start + 50]])
    cache.close()


def test_processes_share_one_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_work, args=(tmp_path / "judge.db", tmp_path / f"journal{w}", range(w, 400), 1))
        for w in range(3)
    ]
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
    assert [w.exitcode for w in workers] == [0, 0, 0]
    cache = JudgeCache(tmp_path / "judge.db")
    assert cache.stats().entries == 400
    cache.close()


@pytest.mark.parametrize("grain", [1, 16])
def test_killed_in_the_middle_of_2000_judgements_nothing_is_lost_and_nothing_is_judged_twice(
    tmp_path: Path, grain: int
) -> None:
    """Killed from within, when half of the questions are answered and others are under way: every reply that had come
    was kept, and exactly the rest is asked again."""
    path, journal = tmp_path / "judge.db", tmp_path / "journal"
    arguments = (path, journal, range(2000), grain, 1000)
    worker = multiprocessing.get_context("spawn").Process(target=_work, args=arguments)
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    answered = journal.read_text().splitlines()
    assert 1000 - grain <= len(answered) <= 1000

    cache = JudgeCache(path)
    assert cache.stats().entries == len(answered)
    judge = CountingJudge(grain=grain)
    replies = run(CachedBackend(judge, cache), [query(i) for i in range(2000)])
    assert all(r.error is None for r in replies) and cache.stats().entries == 2000
    assert set(judge.asked.values()) == {1}
    assert set(judge.asked) == {f"content {i}" for i in range(2000)} - set(answered)
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)
    cache.close()


def test_killed_from_outside_at_any_moment_at_most_the_reply_just_being_read_is_asked_again(tmp_path: Path) -> None:
    path, journal = tmp_path / "judge.db", tmp_path / "journal"
    worker = multiprocessing.get_context("spawn").Process(target=_work, args=(path, journal, range(2000), 1))
    worker.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and journal.read_text().count("\n") > 300):
        time.sleep(0.01)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    answered = journal.read_text().splitlines()
    assert 300 < len(answered) < 2000
    cache = JudgeCache(path)
    judge = CountingJudge()
    run(CachedBackend(judge, cache), [query(i) for i in range(2000)])
    assert len(set(answered) & set(judge.asked)) <= 1 and cache.stats().entries == 2000
    cache.close()


def test_a_write_waits_for_another_process_without_holding_up_the_rest(tmp_path: Path) -> None:
    cache = JudgeCache(tmp_path / "judge.db")
    other = sqlite3.connect(tmp_path / "judge.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    async def main() -> list[TierReply]:
        backend = CachedBackend(CountingJudge(), cache)
        asking = asyncio.create_task(backend.tier_logprobs([query(1)]))
        await asyncio.sleep(0.3)  # the loop runs on
        assert not asking.done()
        other.execute("COMMIT")
        return await asking

    assert asyncio.run(main())[0].error is None
    assert cache.stats().entries == 1 and cache.stats().failed_writes == 0
    other.close()
    cache.close()


def test_files_that_are_no_cache_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello, this is not a database, it is only a text file of some length" * 20)
    with pytest.raises(BadInput, match="not a database"):
        JudgeCache(tmp_path / "text")
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE x (y)")
    other.commit()
    other.close()
    with pytest.raises(BadInput, match="another program"):
        JudgeCache(tmp_path / "other.db")
    JudgeCache(tmp_path / "new.db").close()
    newer = sqlite3.connect(tmp_path / "new.db")
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(BadInput, match="version 99"):
        JudgeCache(tmp_path / "new.db")
    with pytest.raises(BadInput):
        JudgeCache(tmp_path / "text" / "judge.db")


def test_a_cache_that_cannot_be_written_costs_the_cache_and_not_the_judgements(tmp_path: Path) -> None:
    cache = JudgeCache(tmp_path / "judge.db")
    cache._thread.submit(lambda: cache._db.execute("PRAGMA query_only = 1")).result()
    cache._now.execute("PRAGMA query_only = 1")
    replies = run(CachedBackend(CountingJudge(), cache), [query(i) for i in range(3)])
    assert all(r.logprobs for r in replies) and cache.stats().failed_writes == 3
    cache.close()
