"""Dynamic sampling: rounds, what is used of them, and what the rest still counts for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarubric.config.rollout import Rollout
from megarubric.config.schema import Algorithm, Reward
from megarubric.judging.judge import Judge
from megarubric.recipe.experience import Answer, RolloutError, make_batch, score, write_and_judge
from megarubric.recipe.records import read_rollouts, write_rollouts
from megarubric.recipe.rounds import Rounds, chosen
from megarubric.recipe.statistics import step_metrics
from megarubric.reward.advantages import CriterionMeans
from megarubric.rollout.data import Prompt, PromptOrder
from megarubric.rollout.messages import Completion, GenerateRequest, Race
from megarubric.rollout.partial import PartialSampler
from megarubric.rollout.sampler import Sampler, SamplingSettings
from megarubric.rubrics import parse_rubric

RUBRIC = parse_rubric(
    {
        "id": "t.short", "version": 1, "title": "t", "scope": "instance", "family": "style", "prompt": "Say it.",
        "provenance": {"author": "human", "source": "test", "licence": "Apache-2.0"},
        "criteria": [{"id": "short", "description": "Short.", "weight": 1.0, "check": {
            "kind": "length_constraints:number_words", "relation": "between", "min": 1, "max": 3}}],
    },
    "test",
)  # fmt: skip
ORDER = 6  # its first four prompts are two odd and two even ones
SHORT, LONG = 2, 5  # words, one token each: reward 1 and 0


class Words:
    """A tokenizer whose tokens are words."""

    def decode(self, ids: np.ndarray) -> str:
        return " ".join(["word"] * len(ids))


class Writer:
    """An engine that writes as many tokens as `lengths` says for a prompt's number and the how-many-th request for it;
    in a race the groups that write most are cut short after one token."""

    def __init__(self, lengths: Callable[[int, int], int]) -> None:
        self.lengths, self.asked, self.seeds = lengths, dict[int, int](), list[int]()
        self.fails = False
        self._held: list[tuple[list[GenerateRequest], asyncio.Future]] = []

    def write(self, r: GenerateRequest) -> Completion:
        number = int(r.prompt_ids[0])
        self.asked[number] = nth = self.asked.get(number, -1) + 1
        self.seeds.append(r.seed)
        n = self.lengths(number, nth)
        if self.fails:
            return Completion(np.empty(0, np.int32), np.empty(0, np.float32), "error", 0, 0, error="no room")
        return Completion(np.full(n, 9, np.int32), np.full(n, -0.5, np.float32), "stop", 0, 0)

    async def generate(self, requests: list[GenerateRequest], race: Race | None = None) -> list[Completion]:
        if race is None:
            return [self.write(r) for r in requests]
        future = asyncio.get_running_loop().create_future()
        self._held.append((requests, future))
        if len(self._held) == race.calls:
            for k, (own, waiting) in enumerate(self._held):
                cut = Completion(np.full(1, 9, np.int32), np.full(1, -0.5, np.float32), "abort", 0, 0)
                waiting.set_result([self.write(r) if k < race.enough else cut for r in own])
            self._held = []
        return await future


def prompts(n: int) -> list[Prompt]:
    return [Prompt(f"p{i}", "Say it.", RUBRIC, np.array([i, 70, 70], np.int32)) for i in range(n)]


class Setup:
    def __init__(self, writer: Writer, n_prompts: int = 20, advantage: str = "standardize", **rollout) -> None:
        self.rollout = Rollout(prompts_per_step=4, samples_per_prompt=2, max_new_tokens=8, **rollout)
        self.reward, self.means = Reward(advantage=advantage), CriterionMeans()
        self.order = PromptOrder(prompts(n_prompts), seed=ORDER)
        draw = SamplingSettings(2, 8, (), seed=3)
        self.sampler = Sampler([writer], draw)
        self.partial = PartialSampler([writer], draw, self.rollout.oversample, self.rollout.max_staleness)
        parts = self.sampler, self.partial, Judge(None), Words(), self.order
        self.rounds = Rounds(*parts, self.rollout, self.reward, self.means)

    def step(self, step: int = 1) -> list[Answer]:
        answers, self.times = asyncio.run(self.rounds.step(step, step - 1))
        answers, self.degenerate = score(answers, self.reward, self.means)
        return answers

    def drawn(self) -> int:
        return self.order.state_dict()["position"]


def alike(number: int, nth: int) -> int:
    """Prompts with an even number have two equal answers, the others a short and a long one."""
    return SHORT if number % 2 == 0 or nth % 2 == 0 else LONG


def numbers(answers: list[Answer]) -> list[int]:
    return [int(a.sample.prompt.token_ids[0]) for a in answers[::2]]


def test_off_it_is_what_write_and_judge_gives() -> None:
    plain = Setup(Writer(alike))
    answers, times = asyncio.run(plain.rounds.step(1, 0))
    order = PromptOrder(prompts(20), seed=ORDER)
    again, _ = asyncio.run(write_and_judge(Setup(Writer(alike)).sampler, Judge(None), Words(), 1, order.take(4)))
    assert [(a.sample.group, a.sample.index, a.sample.prompt.id, a.sample.seed, a.text, a.used) for a in answers] == [
        (a.sample.group, a.sample.index, a.sample.prompt.id, a.sample.seed, a.text, True) for a in again
    ]
    assert times.counts == {} and plain.drawn() == 4


def test_groups_that_say_nothing_are_replaced_by_as_many_further_prompts() -> None:
    s = Setup(Writer(alike), dynamic_rounds=20)
    answers = s.step()
    order = [int(p.token_ids[0]) for p in PromptOrder(prompts(20), seed=ORDER).take(20)]
    expected, odd = [], 0
    while odd < 4:  # a round takes what is missing
        expected += order[len(expected) : len(expected) + 4 - odd]
        odd = sum(n % 2 for n in expected)
    assert numbers(answers) == expected and s.drawn() == len(expected) > 4
    assert [a.used for a in answers[::2]] == [n % 2 == 1 for n in expected]
    assert [a.sample.group for a in answers] == [g for g in range(len(expected)) for _ in range(2)]
    assert s.times.counts["rollout/dropped_groups"] == len(expected) - 4 and s.times.counts["rollout/rounds"] >= 2
    batch = make_batch(answers, Algorithm(kl_coef=0.1), 8)
    assert batch is not None and len(batch.lengths) == 8
    assert batch.tokens.tolist().count(70) == 16  # the prompts of four groups
    assert s.degenerate == pytest.approx(1 - 4 / len(expected))


def test_when_the_rounds_are_done_the_batch_is_filled_with_what_there_is() -> None:
    s = Setup(Writer(lambda number, nth: SHORT), dynamic_rounds=3)
    answers = s.step()
    assert len(answers) == 3 * 4 * 2 and sum(a.used for a in answers) == 8
    assert all(a.used for a in answers[:8]) and s.times.counts["rollout/rounds"] == 3
    assert make_batch(answers, Algorithm(), 8) is None


def test_what_is_left_out_changes_no_weight_but_counts_for_means_and_metrics() -> None:
    s = Setup(Writer(alike), dynamic_rounds=20)
    answers = s.step()
    used = [a for a in answers if a.used]
    one, two = make_batch(answers, Algorithm(name="dapo"), 8), make_batch(used, Algorithm(name="dapo"), 8)
    for name in ("tokens", "lengths", "loss_mask", "advantages", "weights", "rollout_logprobs"):
        assert getattr(one, name).tobytes() == getattr(two, name).tobytes(), name
    scores = [float(a.judgements["short"].score) for a in answers]
    assert s.means.mean("short") == pytest.approx(np.mean(scores)) != np.mean([a.reward for a in used])
    metrics = step_metrics(answers, s.degenerate, s.times, None)
    assert metrics["reward/mean"] == pytest.approx(np.mean(scores))
    assert metrics["rollout/dropped_groups"] == len(answers) / 2 - 4


def test_objective_wise_groups_are_judged_by_their_own_rule() -> None:
    s = Setup(Writer(alike), advantage="objective_wise", dynamic_rounds=20)
    answers = s.step()
    assert sum(a.used for a in answers) == 8 and all(a.advantage != 0 for a in answers if a.used)


def test_a_prompt_that_comes_again_in_a_later_round_draws_other_samples() -> None:
    """Three prompts, all of whose groups say nothing, over and over in one step."""
    writer = Writer(lambda number, nth: SHORT)
    s = Setup(writer, n_prompts=3, dynamic_rounds=5)
    s.step()
    assert len(writer.seeds) == len(set(writer.seeds)) == 5 * 4 * 2


def test_a_step_repeats() -> None:
    def found() -> list[tuple]:
        s = Setup(Writer(alike), dynamic_rounds=4, oversample=1.5)
        return [(a.sample.group, a.sample.prompt.id, a.sample.seed, a.text, a.used) for n in (1, 2) for a in s.step(n)]

    assert found() == found()


def test_with_both_a_later_round_goes_on_with_what_was_cut_short() -> None:
    """Round 1 begins 6 groups and cuts 2; a round that misses 2 begins 3: the 2 that were cut and one more."""
    s = Setup(Writer(alike), dynamic_rounds=2, oversample=1.5)
    order = [int(p.token_ids[0]) for p in PromptOrder(prompts(20), seed=ORDER).take(20)]
    answers = s.step()
    missing = 4 - sum(n % 2 for n in order[:4])
    assert missing == 2 and numbers(answers) == order[:6] and s.drawn() == 7
    assert [g.prompt.token_ids[0] for g in s.partial.open] == [order[6]]
    assert s.times.counts["rollout/aborted_tokens"] == 2 and s.times.counts["rollout/carried_samples"] == 0
    lengths = [len(a.sample.completion.token_ids) for a in answers]
    assert set(lengths[:8]) <= {SHORT, LONG} and set(lengths[8:]) <= {1 + SHORT, 1 + LONG}


def test_what_was_left_open_is_gone_on_with_when_the_option_is_off_again() -> None:
    s = Setup(Writer(alike), oversample=1.5)
    s.step(1)
    left = [g.prompt.id for g in s.partial.open]
    s.partial.oversample = 1.0
    s.rounds.rollout = Rollout(prompts_per_step=4, samples_per_prompt=2)
    assert [a.sample.prompt.id for a in s.step(2)[::2]][:2] == left and s.partial.open == [] and s.drawn() == 8


def test_carried_answers_are_not_fresh() -> None:
    s = Setup(Writer(lambda number, nth: SHORT if nth % 2 else LONG), oversample=1.5)
    assert make_batch(s.step(1), Algorithm(), 8, version=0).fresh is None
    answers = s.step(2)
    batch = make_batch(answers, Algorithm(kl_coef=0.1), 8, version=0)
    assert batch.fresh is None  # this engine always says version 0
    later = make_batch(answers, Algorithm(kl_coef=0.1), 8, version=1)
    assert later.fresh.shape == later.tokens.shape and not later.fresh.any()


def test_records_say_what_was_used_and_replay_it(tmp_path: Path) -> None:
    s = Setup(Writer(alike), dynamic_rounds=20)
    answers = s.step()
    write_rollouts(tmp_path, 1, answers)
    samples, texts, items, used = read_rollouts(tmp_path, 1, {p.id: p for p in prompts(20)})
    assert used == [a.used for a in answers] and not all(used)
    judged = asyncio.run(Judge(None).judge(items))
    means = CriterionMeans()
    parts = zip(samples, texts, judged, used)
    again, degenerate = score([Answer(x, t, j, used=u) for x, t, j, u in parts], Reward(), means)
    assert degenerate == s.degenerate and means.state_dict() == s.means.state_dict()
    one, two = make_batch(answers, Algorithm(), 8), make_batch(again, Algorithm(), 8)
    assert one.weights.tobytes() == two.weights.tobytes() and one.tokens.tobytes() == two.tokens.tobytes()


@pytest.mark.parametrize("oversample", [1.0, 1.5])
def test_an_answer_that_cannot_be_written_ends_the_step(oversample: float) -> None:
    writer = Writer(alike)
    writer.fails = True
    with pytest.raises(RolloutError, match=r"prompt p\d+, sample \d: no room"):
        Setup(writer, oversample=oversample).step()


@given(st.lists(st.booleans(), max_size=12), st.integers(0, 8))
def test_informative_groups_are_chosen_first(informative: list[bool], most: int) -> None:
    used = chosen(informative, most)
    assert len(used) == min(most, len(informative))
    assert sum(informative[g] for g in used) == min(most, sum(informative))
    for kind in (True, False):  # of either kind the earliest
        own = [g for g, says in enumerate(informative) if says == kind]
        assert [g for g in own if g in used] == own[: sum(g in used for g in own)]
