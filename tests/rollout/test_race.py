"""Races in a real engine: enough groups end, the others are cut short and can be gone on with."""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np
import pytest
from tiny_moe import VOCABULARY, experts_chosen, token_logprobs
from tiny_prompts import make_prompts
from weights import publish

from megarubric.exchange.rpc import RemoteError
from megarubric.rollout.messages import GenerateRequest, Race, TokenTierQuery
from megarubric.rollout.partial import PartialSampler
from megarubric.rollout.sampler import SamplingSettings

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


def test_others_requests_are_not_cut(engine, run):
    """The judge may be the same engine: its queries and written replies end as they would alone."""
    query = TokenTierQuery(prompt(50), np.array([3, 5], np.int32))
    (alone,) = run(engine.client.tier_logprobs([query]))

    async def together():
        short, long = [greedy(prompt(9), 4)], [greedy(prompt(20), 80)]
        calls = [engine.client.generate(requests, Race(8, 2, 1)) for requests in (short, long)]
        other = engine.client.generate([greedy(prompt(11), 30)])
        return await asyncio.gather(*calls, other, engine.client.tier_logprobs([query]))

    _, (cut,), (whole,), (score,) = run(together())
    assert cut.finish_reason == "abort" and whole.finish_reason == "length" and len(whole.token_ids) == 30
    assert score.error is None and np.abs(score.logprobs - alone.logprobs).max() < 1e-4


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


def test_samples_that_two_versions_wrote(engine, run, tiny_models):
    """Cut short, gone on with after a weight update: each token has the log-probability of the version that drew it,
    and the routing of the whole answer is that of the version that ended it."""
    stop = tuple(range(24))  # of 512 tokens: answers have a long tail
    sampler = PartialSampler([engine.client], SamplingSettings(3, 60, stop, seed=11), 2.0, max_staleness=4)
    first_model, first = engine.model_dir, engine.version

    def step(number: int, prompts):
        async def all_of_it():
            stream = sampler.stream(number, engine.version, prompts, 3, Counter())
            return [sample async for group in stream for sample in group]

        return run(all_of_it())

    step(1, make_prompts(6))
    written = {
        (g.prompt.id, i): len(c.token_ids) for g in sampler.open for i in g.unfinished if (c := g.completions[i])
    }
    assert len(sampler.open) == 3 and written and sampler.aborted_tokens == sum(written.values())
    second_model = next(m for m in tiny_models if m != first_model)
    run(publish(engine.client, second_model, first + 1))
    engine.model_dir, engine.version = second_model, first + 1
    samples = [s for s in step(2, make_prompts(9)[6:]) if (s.prompt.id, s.index) in written]
    assert samples
    for s in samples:
        c, n, p = s.completion, written[s.prompt.id, s.index], len(s.prompt.token_ids)
        assert (c.first_version, c.weight_version) == (first, first + 1) and len(c.token_ids) > n
        ids = np.concatenate([s.prompt.token_ids, c.token_ids])
        drawn = [token_logprobs(model, ids)[p - 1 :] for model in (first_model, second_model)]
        assert np.abs(np.concatenate([drawn[0][:n], drawn[1][n:]]) - c.logprobs).max() < 1e-4
        assert np.abs(drawn[1][:n] - c.logprobs[:n]).max() > 1e-2
        routing = np.sort(c.routing[:-1], -1)
        assert (routing != experts_chosen(second_model, ids[:-1])).mean() < 1e-2
