"""Partial rollouts over several steps, on an engine made of arithmetic; and the file of the open groups."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_prompts import make_prompts
from toy_engine import STOP, ToyEngine, toy_logprob

from megarubric.errors import BadInput
from megarubric.rollout.carry import read_carry, write_carry
from megarubric.rollout.data import PromptOrder
from megarubric.rollout.messages import Completion
from megarubric.rollout.partial import OpenGroup, PartialSampler, join, later_seed
from megarubric.rollout.sampler import Sample, SamplingSettings, sample_seed

MOST = 30


def sampler(engines: list[ToyEngine], oversample: float = 1.5, max_staleness: int = 4, size: int = 3) -> PartialSampler:
    return PartialSampler(engines, SamplingSettings(size, MOST, (STOP,), seed=7), oversample, max_staleness)


def one_step(s: PartialSampler, order: PromptOrder, step: int, enough: int) -> list[list[Sample]]:
    """A step at version step - 1, and the groups it gave, in order."""
    for engine in s.engines:
        engine.version = step - 1

    async def run() -> list[list[Sample]]:
        prompts = order.take(s.wanted(enough))
        return [group async for group in s.stream(step, step - 1, prompts, enough, Counter())]

    return sorted(asyncio.run(run()), key=lambda group: group[0].group)


def versions(c: Completion) -> list[int]:
    """Which version drew each token, read from its log-probability."""
    return [int(-lp + 1e-4) for lp in c.logprobs]


@given(
    engines=st.integers(1, 3),
    enough=st.integers(1, 5),
    oversample=st.sampled_from([1.0, 1.1, 1.25, 1.5, 2.0, 3.0]),
    max_staleness=st.integers(0, 3),
    rare=st.integers(2, 40),
)
def test_what_holds_in_every_step(engines: int, enough: int, oversample: float, max_staleness: int, rare: int) -> None:
    s = sampler([ToyEngine(rare) for _ in range(engines)], oversample, max_staleness)
    order = PromptOrder(make_prompts(40), 1)
    used: Counter[str] = Counter()
    for step in range(1, 7):
        before = {id(g): [None if c is None else c.token_ids for c in g.completions] for g in s.open}
        groups = one_step(s, order, step, enough)
        assert len(groups) == enough
        assert len(s.open) == math.ceil(oversample * enough - 1e-9) - enough
        assert all(engine.running == 0 for engine in s.engines), "nothing runs while the trainer does"
        used.update(group[0].prompt.id for group in groups)
        for sample in (sample for group in groups for sample in group):
            c = sample.completion
            assert c.finish_reason == ("stop" if c.token_ids[-1] == STOP else "length")
            assert len(c.token_ids) == MOST or c.finish_reason == "stop"
            assert STOP not in c.token_ids[:-1] and len(c.logprobs) == len(c.token_ids) <= MOST
            wrote = versions(c)
            assert wrote == sorted(wrote), "later tokens by later weights"
            assert (wrote[0], wrote[-1]) == (c.first_version, c.weight_version)
            assert wrote[0] >= step - 1 - max_staleness
            assert [np.float32(lp) for lp in c.logprobs] == [toy_logprob(v, t) for v, t in zip(wrote, c.token_ids)]
            assert c.routing is not None and len(c.routing) == len(sample.prompt.token_ids) + len(c.token_ids)
            assert (c.routing == c.weight_version).all(), "all of it recorded by the version that went on"
        for group in s.open:  # what was kept is what was there, and more
            for old, c in zip(before.get(id(group), []), group.completions):
                if old is not None and c is not None and not s.stale_restarts:
                    assert c.token_ids[: len(old)].tolist() == old.tolist()
    begun = used + Counter(group.prompt.id for group in s.open)
    assert sum(begun.values()) <= 40 and set(begun.values()) == {1}, "no prompt is lost or used twice"
    first = PromptOrder(make_prompts(40), 1).take(sum(begun.values()))
    assert {p.id for p in first} == set(begun)


def test_a_step_repeats_from_its_saved_state(tmp_path: Path) -> None:
    """Saved after every step and read back, the groups are the same bits."""
    prompts = make_prompts(30)

    def steps(saved: bool) -> list[tuple]:
        s, order, found = sampler([ToyEngine(20), ToyEngine(20)]), PromptOrder(prompts, 3), []
        for step in range(1, 8):
            for group in one_step(s, order, step, 4):
                for x in group:
                    c = x.completion
                    found.append((x.prompt.id, x.seed, c.token_ids.tobytes(), c.logprobs.tobytes(), c.first_version))
            if saved:
                path = tmp_path / f"step_{step}.safetensors"
                digest, state = write_carry(path, s.open), order.state_dict()
                s, order = sampler([ToyEngine(20), ToyEngine(20)]), PromptOrder(prompts, 3)
                order.load_state_dict(state)
                s.open = read_carry(path, digest, {p.id: p for p in prompts})
        return found

    plain = steps(False)
    assert steps(True) == plain and len(plain) == 7 * 4 * 3
    assert any(row[4] < 6 for row in plain[-12:]), "the last step goes on with older samples"


def test_with_enough_engines_each_has_a_share_and_idle_ones_none() -> None:
    engines = [ToyEngine(10) for _ in range(3)]
    s = sampler(engines, 2.0)
    assert len(one_step(s, PromptOrder(make_prompts(9), 1), 1, 2)) == 2
    assert [len(e.requests) for e in engines] == [6, 6, 0]


def test_a_later_call_with_less_to_do_leaves_the_youngest_alone() -> None:
    """A second round that misses one group goes on with the oldest open ones, as many as it takes."""
    s = sampler([ToyEngine(60)], 1.5)
    order = PromptOrder(make_prompts(30), 1)
    one_step(s, order, 1, 4)
    older, younger = s.open
    at = [0 if c is None else len(c.token_ids) for c in younger.completions]
    s.oversample = 1.0
    assert s.wanted(1) == 0
    (group,) = one_step(s, order, 1, 1)
    assert group[0].prompt is older.prompt and s.open == [younger]
    assert [0 if c is None else len(c.token_ids) for c in younger.completions] == at


def test_groups_that_are_whole_already_need_no_engine() -> None:
    """All end in the same step of the engine: those that are not needed are kept whole."""
    engine = ToyEngine(10**9)  # never stops: every answer has the full length
    s, order = sampler([engine], 2.0), PromptOrder(make_prompts(30), 1)
    one_step(s, order, 1, 3)
    assert len(s.open) == 3 and not any(group.unfinished for group in s.open)
    asked, kept = len(engine.requests), [g.prompt for g in s.open]
    groups = one_step(s, order, 2, 3)
    assert [g[0].prompt for g in groups] == kept and len(engine.requests) == asked
    assert {x.completion.weight_version for g in groups for x in g} == {0}


def test_a_continued_request_is_the_rest_of_the_sample_with_other_random_numbers() -> None:
    engine = ToyEngine(6)
    s, order = sampler([engine]), PromptOrder(make_prompts(30), 1)
    one_step(s, order, 1, 4)
    group, i, written = next(
        (g, i, g.completions[i].token_ids) for g in s.open for i in g.unfinished if g.completions[i] is not None
    )
    asked = len(engine.requests)
    one_step(s, order, 2, 4)
    seed = later_seed(group.seeds[i], 2, len(written))
    (request,) = (r for r in engine.requests[asked:] if r.seed == seed)
    assert request.prompt_ids.tolist() == [*group.prompt.token_ids.tolist(), *written.tolist()]
    assert request.max_tokens == MOST - len(written)
    assert group.seeds[i] == sample_seed(7, 1, group.prompt.id, i) != seed


def test_what_is_too_old_is_begun_anew() -> None:
    engine = ToyEngine(30)
    s, order = sampler([engine], max_staleness=1), PromptOrder(make_prompts(30), 1)
    one_step(s, order, 1, 4)
    begun = sum(c is not None for group in s.open for c in group.completions)
    seeds = [list(group.seeds) for group in s.open]
    groups = one_step(s, order, 3, 4)  # version 2: what version 0 began is two versions old
    assert s.stale_restarts == begun > 0
    assert {x.completion.first_version for group in groups for x in group} == {2}
    assert not {x.seed for group in groups for x in group} & {seed for group in seeds for seed in group}


def test_joining() -> None:
    def part(n: int, version: int, reason: str, error: str | None = None) -> Completion:
        return Completion(np.arange(n, dtype=np.int32), np.full(n, -1, np.float32), reason, version, version, 0, error)

    assert join(None, part(0, 3, "abort")) is None
    first = part(4, 3, "abort")
    assert join(None, first) is first and join(first, part(0, 4, "abort")) is first
    both = join(first, part(2, 5, "stop"))
    assert both is not None and both.token_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert (both.first_version, both.weight_version, both.finish_reason) == (3, 5, "stop")
    assert join(first, part(0, 5, "error", "no room")).error == "no room"


def test_seeds_of_later_requests_are_fixed_for_all_time() -> None:
    assert later_seed(476660476597950501, 3, 17) == 5574158783553860274
    seeds = {later_seed(seed, step, n) for seed in range(20) for step in range(10) for n in range(10)}
    assert len(seeds) == 2000 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_file_of_open_groups_that_is_not_the_checkpoints_is_refused(tmp_path: Path) -> None:
    prompts = make_prompts(3)
    path = tmp_path / "open.safetensors"
    routing = np.arange(2 * (12 + 4), dtype=np.uint16).reshape(16, 2, 1)
    done = Completion(np.arange(4, dtype=np.int32), np.full(4, -0.1, np.float32), "stop", 3, 2, 1, routing=routing)
    cut = Completion(np.arange(2, dtype=np.int32), np.full(2, -0.1, np.float32), "abort", 3, 3)
    digest = write_carry(path, [OpenGroup(prompts[0], [5, 2**63 - 1, 7], [done, cut, None])])
    (group,) = read_carry(path, digest, {p.id: p for p in prompts})
    assert group.prompt is prompts[0] and group.seeds == [5, 2**63 - 1, 7] and group.completions[2] is None
    again = group.completions[0]
    assert again is not None and np.array_equal(again.routing, routing) and again.routing.dtype == np.uint16
    assert (again.finish_reason, again.weight_version, again.first_version) == ("stop", 3, 2)
    assert group.completions[1].routing is None and group.unfinished == [1, 2]
    with pytest.raises(BadInput, match=r"open\.safetensors: p0: this prompt of an open group is not among"):
        read_carry(path, digest, {"p0": prompts[1]})
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BadInput, match="is not the file that was saved with its checkpoint"):
        read_carry(path, digest, {p.id: p for p in prompts})
    path.unlink()
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        read_carry(path, digest, {p.id: p for p in prompts})
    assert read_carry(tmp_path / "empty", write_carry(tmp_path / "empty", []), {}) == []
