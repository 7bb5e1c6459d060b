"""Races in a real engine: enough groups end, the others are cut short and can be gone on with."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from tiny_moe import VOCABULARY, token_logprobs

from megarubric.exchange.rpc import RemoteError
from megarubric.rollout.messages import GenerateRequest, Race

pytestmark = pytest.mark.engine


def prompt(n: int, start: int = 5) -> np.ndarray:
    return (np.arange(start, start + n) * 7 % VOCABULARY).astype(np.int32)


def greedy(ids: np.ndarray, n: int) -> GenerateRequest:
    return GenerateRequest(ids, n, seed=1, temperature=0.0)


def race(run, client, calls, spec):
    async def all_of_them():
        return await asyncio.gather(*(client.generate(requests, spec) for requests in calls))

    return run(all_of_them())


def test_a_sample_cut_short_and_continued_is_the_uninterrupted_one(engine, run):
    """Greedy: the same tokens; log-probabilities are those of one model reading the whole; routing covers it all."""
    (whole,) = run(engine.client.generate([greedy(prompt(40), 60)]))
    short = [greedy(prompt(12, 50), 20)]
    ended, (cut, other) = race(
        run, engine.client, [short, [greedy(prompt(40), 60), greedy(prompt(30), 60)]], Race(1, 2, 1)
    )
    assert ended[0].finish_reason == "length" and len(ended[0].token_ids) == 20 and ended[0].routing is not None
    for sample in (cut, other):
        assert sample.finish_reason == "abort" and 15 <= len(sample.token_ids) <= 20
        assert len(sample.logprobs) == len(sample.token_ids) and sample.routing is None
        assert sample.first_version == sample.weight_version == engine.version
    n = len(cut.token_ids)
    going_on = np.concatenate([prompt(40), cut.token_ids])
    (rest,) = run(engine.client.generate([greedy(going_on, 60 - n)]))
    assert np.concatenate([cut.token_ids, rest.token_ids]).tolist() == whole.token_ids.tolist()
    joined = np.concatenate([cut.logprobs, rest.logprobs])
    assert np.abs(joined - whole.logprobs).max() < 1e-4
    assert rest.routing.shape == whole.routing.shape == (100, 4, 2)
    assert (rest.routing != whole.routing).mean() < 1e-3
    assert (rest.routing[:-1] != 255).all()  # the written tokens were read again, or their record was kept


def test_nothing_of_a_cut_sample_is_left_in_the_engine(engine, run):
    before = run(engine.client.stats())
    race(run, engine.client, [[greedy(prompt(9), 4)], [greedy(prompt(9, i), 90) for i in range(6)]], Race(2, 2, 1))
    after = run(engine.client.stats())
    assert after.running == after.waiting == 0 and after.finished - before.finished == 7
    ids = prompt(33)
    (again,) = run(engine.client.generate([greedy(ids, 30)]))
    want = token_logprobs(engine.model_dir, np.concatenate([ids, again.token_ids]))[len(ids) - 1 :]
    assert np.abs(want - again.logprobs).max() < 1e-4
    assert run(engine.client.stats()).steps - after.steps == 30  # one sequence a step: no ghost is computed beside it


def test_what_is_cut_where_does_not_depend_on_when_messages_come(engine, run):
    def sample(n: int, seed: int) -> GenerateRequest:
        return GenerateRequest(prompt(10 + seed), n, seed=seed)

    calls = [[sample(n, 3 * g + i) for i in range(3)] for g, n in enumerate((40, 12, 25, 12, 60))]

    async def with_pauses(pause: float, number: int):
        async def one(place: int):
            await asyncio.sleep(pause * place)
            return await engine.client.generate(calls[place], Race(number, 5, 3))

        return await asyncio.gather(*(one(i) for i in range(5)))

    at_once, slowly = run(with_pauses(0, 3)), run(with_pauses(0.05, 4))
    assert [[c.token_ids.tolist() for c in a] for a in at_once] == [[c.token_ids.tolist() for c in a] for a in slowly]
    assert [a[0].finish_reason for a in at_once] == ["abort", "length", "length", "length", "abort"]


def test_an_impossible_race_is_refused_and_one_that_never_fills_gives_way(engine, run):
    with pytest.raises(RemoteError, match="a race of 2 calls cannot end when 3 have ended"):
        run(engine.client.generate([greedy(prompt(9), 2)], Race(5, 2, 3)))

    async def abandoned():
        lonely = asyncio.create_task(engine.client.generate([greedy(prompt(9), 2)], Race(6, 2, 1)))
        await asyncio.sleep(0.05)
        ((done,), _) = await asyncio.gather(
            engine.client.generate([greedy(prompt(9), 2)], Race(7, 1, 1)),
            asyncio.gather(lonely, return_exceptions=True),
        )
        return done, lonely.exception()

    done, refused = run(abandoned())
    assert done.finish_reason == "length" and "never had all its calls" in str(refused)
