"""Seeds, groups and load over several engines."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from tiny_prompts import make_prompts

from megarubric.errors import ProcessDied
from megarubric.rollout.client import EngineClient
from megarubric.rollout.sampler import Sampler, SamplingSettings, sample_seed


def test_seeds_are_fixed_for_all_time():
    """A resumed or repeated run draws the same samples: these values may never change."""
    assert sample_seed(1, 2, "letter", 3) == 476660476597950501
    assert sample_seed(0, 0, "", 0) == 3152454771869370541


def test_seeds_differ_in_every_part():
    seeds = [sample_seed(r, s, p, i) for r in range(3) for s in range(5) for p in ("a", "b", "0a") for i in range(8)]
    assert len(set(seeds)) == len(seeds) == 360
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.engine
def test_groups_come_back_in_order_and_repeat_with_the_step(engine, run):
    sampler = Sampler([engine.client], SamplingSettings(4, 12, (), seed=7))
    prompts = make_prompts(5)
    first, again, later = (run(sampler.sample(step, prompts)) for step in (3, 3, 4))
    assert [[(s.group, s.index) for s in group] for group in first] == [[(g, i) for i in range(4)] for g in range(5)]
    assert all(s.prompt is prompts[g] for g, group in enumerate(first) for s in group)

    def tokens(groups):
        return [[s.completion.token_ids.tolist() for s in group] for group in groups]

    assert tokens(first) == tokens(again) != tokens(later)
    assert len({tuple(t) for group in tokens(first) for t in group}) == 20
    assert first[2][1].seed == sample_seed(7, 3, prompts[2].id, 1)


@pytest.mark.engine
def test_a_prompt_twice_in_a_step_draws_other_samples(engine, run):
    prompt = make_prompts(1)[0]
    one, two = run(Sampler([engine.client], SamplingSettings(3, 12, ())).sample(0, [prompt, prompt]))
    assert len({tuple(s.completion.token_ids.tolist()) for s in (*one, *two)}) == 6


@pytest.mark.engine
def test_groups_are_shared_out_over_engines_with_a_small_window(engine, run):
    """Two clients of one process stand for two engines; the samples do not depend on who draws them."""
    prompts = make_prompts(6)
    alone = run(Sampler([engine.client], SamplingSettings(3, 8, ())).sample(0, prompts))

    async def shared():
        other = EngineClient(engine.endpoint, peer_status=engine.status)
        asked = {id(engine.client): 0, id(other): 0}

        class Counting:
            def __init__(self, client: EngineClient) -> None:
                self.client = client

            async def generate(self, requests):
                asked[id(self.client)] += len(requests)
                return await self.client.generate(requests)

        try:
            engines = [Counting(engine.client), Counting(other)]
            groups = await Sampler(engines, SamplingSettings(3, 8, ()), window=3).sample(0, prompts)
            return groups, sorted(asked.values())
        finally:
            await other.close()

    groups, asked = run(shared())
    assert sum(asked) == 18 and asked[0] >= 3
    for a, b in zip(alone, groups, strict=True):
        assert [s.completion.token_ids.tolist() for s in a] == [s.completion.token_ids.tolist() for s in b]


@pytest.mark.engine
def test_samples_stream_before_the_last_group_is_done(engine, run):
    async def first_and_rest():
        sampler = Sampler([engine.client], SamplingSettings(2, 6, ()), window=2)
        seen = []
        async for sample in sampler.stream(0, make_prompts(8)):
            seen.append(((await engine.client.stats()).finished, sample.group))
        return seen

    before = run(engine.client.stats()).finished
    seen = run(first_and_rest())
    assert len(seen) == 16 and seen[0][0] - before < 16
    assert [group for _, group in seen] == sorted(group for _, group in seen)


@pytest.mark.engine
def test_breaking_off_a_stream_leaves_no_task(engine, run):
    async def break_off():
        stream = Sampler([engine.client], SamplingSettings(2, 40, ())).stream(0, make_prompts(4))
        async for _ in stream:
            break
        await stream.aclose()
        return [t for t in asyncio.all_tasks() if "Sampler" in repr(t) or "draw" in repr(t)]

    assert run(break_off()) == []


def test_an_engine_that_dies_ends_the_stream(run, socket_directory):
    async def sample():
        client = EngineClient(f"ipc://{socket_directory}/nobody", peer_status=lambda: "policy-0 was killed by SIGKILL")
        try:
            await Sampler([client], SamplingSettings(2, 4, ())).sample(0, make_prompts(3))
        finally:
            await client.close()

    with pytest.raises(ProcessDied, match="policy-0 was killed by SIGKILL"):
        run(sample())


def test_a_sampler_needs_an_engine():
    with pytest.raises(ValueError, match="at least one engine"):
        Sampler([], SamplingSettings(2, 4, ()))


def test_prompts_are_int32():
    assert all(p.token_ids.dtype == np.int32 for p in make_prompts(2))
