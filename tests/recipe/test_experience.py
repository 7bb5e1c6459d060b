"""From judged answers to a training batch: masks, weights, what is left out, and records that replay."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megarubric.config.schema import Algorithm, Reward, Train
from megarubric.errors import BadInput
from megarubric.judging.judge import Judge
from megarubric.judging.types import JudgeItem, Judgement
from megarubric.recipe.experience import Answer, RolloutError, WritingTimes, make_batch, score
from megarubric.recipe.learning import learning_rate
from megarubric.recipe.records import read_rollouts, write_rollouts
from megarubric.recipe.statistics import step_metrics
from megarubric.reward.advantages import CriterionMeans
from megarubric.rollout.data import Prompt
from megarubric.rollout.messages import Completion
from megarubric.rollout.sampler import Sample
from megarubric.rubrics import parse_rubric

RUBRIC = parse_rubric(
    {
        "id": "t.r",
        "version": 1,
        "title": "t",
        "scope": "instance",
        "family": "style",
        "provenance": {"author": "human", "source": "test", "licence": "Apache-2.0"},
        "prompt": "Say it.",
        "criteria": [
            {"id": "good", "description": "Good.", "weight": 1.0},
            {"id": "short", "description": "Short.", "weight": 1.0, "check": {
                "kind": "length_constraints:number_words", "relation": "between", "min": 1, "max": 3}},
        ],
    },
    "test",
)  # fmt: skip


def answer(group: int, index: int, good: float | None, tokens: int, text: str = "one two") -> Answer:
    rng = np.random.default_rng([group, index])
    prompt = Prompt(f"p{group}", "Say it.", RUBRIC, np.array([5, 6, 7], np.int32))
    logprobs = -rng.random(tokens).astype(np.float32)
    completion = Completion(rng.integers(0, 99, tokens).astype(np.int32), logprobs, "stop", 3, 3)
    item = JudgeItem(RUBRIC, prompt.text, text, {"good": good})
    (judged,) = asyncio.run(Judge(None).judge([item]))
    return Answer(Sample(group, index, prompt, 11 * index, completion), text, judged)


def scored(rows: list[Answer], **reward) -> list[Answer]:
    return score(rows, Reward(**reward), CriterionMeans())[0]


def test_rewards_and_advantages() -> None:
    answers, degenerate = score(
        [answer(0, 0, 1, 4), answer(0, 1, 0, 4), answer(1, 0, 1, 4), answer(1, 1, 1, 4)], Reward(), CriterionMeans()
    )
    assert [a.reward for a in answers] == [1.0, 0.5, 1.0, 1.0]
    assert degenerate == 0.5
    np.testing.assert_allclose([a.advantage for a in answers], [1, -1, 0, 0], atol=1e-4)


def test_an_unjudged_criterion_is_masked_not_zero() -> None:
    (a, _) = scored([answer(0, 0, None, 4), answer(0, 1, 1, 4)])
    assert a.reward == 1.0 and a.judgements["good"].score is None


def test_batch_is_the_engines_tokens_with_the_prompt_masked() -> None:
    rows = scored([answer(0, 0, 1, 4), answer(0, 1, 0, 2)])
    batch = make_batch(rows, Algorithm(name="dapo"), 8)
    assert batch is not None and batch.loss_mask is not None and batch.weights is not None
    assert batch.lengths.tolist() == [7, 5]
    assert batch.loss_mask.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1]
    np.testing.assert_array_equal(batch.tokens[3:7], rows[0].sample.completion.token_ids)
    np.testing.assert_array_equal(batch.rollout_logprobs[3:7], rows[0].sample.completion.logprobs)
    np.testing.assert_allclose(batch.weights, batch.loss_mask / 6, rtol=1e-6)


def test_answers_that_move_nothing_are_left_out_without_changing_the_weights() -> None:
    rows = scored([answer(0, 0, 1, 4), answer(0, 1, 0, 2), answer(1, 0, 1, 3), answer(1, 1, 1, 3)])
    batch = make_batch(rows, Algorithm(name="grpo"), 8)
    whole = make_batch(rows, Algorithm(name="grpo", kl_coef=0.1), 8)
    assert batch is not None and whole is not None
    assert len(batch.lengths) == 2 and len(whole.lengths) == 4
    n = len(batch.tokens)
    np.testing.assert_array_equal(batch.weights, whole.weights[:n])
    np.testing.assert_array_equal(batch.advantages, whole.advantages[:n])
    assert not whole.advantages[n:].any()


def test_nothing_to_learn_from_is_no_batch() -> None:
    assert make_batch(scored([answer(0, 0, 1, 4), answer(0, 1, 1, 4)]), Algorithm(), 8) is None


def test_updates_split_whole_groups() -> None:
    rows = scored([answer(g, i, i, 3) for g in range(4) for i in range(2)])
    batch = make_batch(rows, Algorithm(updates_per_step=2), 8)
    assert batch is not None and batch.updates is not None
    assert batch.updates.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_objective_wise_feels_a_veto() -> None:
    rows = scored([answer(0, 0, 1, 4), answer(0, 1, 0, 4)], advantage="objective_wise", gamma=1.0)
    assert rows[0].advantage > 0 > rows[1].advantage


def test_records_replay_to_the_same_batch_and_rewards(tmp_path: Path) -> None:
    rows = scored([answer(0, 0, 1, 4), answer(0, 1, None, 2), answer(0, 2, 0, 5)])
    write_rollouts(tmp_path, 7, rows)
    prompts = {a.sample.prompt.id: a.sample.prompt for a in rows}
    samples, texts, items, _ = read_rollouts(tmp_path, 7, prompts)
    judged = asyncio.run(Judge(None).judge(items))
    again = scored([Answer(s, t, j) for s, t, j in zip(samples, texts, judged)])
    assert [a.result for a in again] == [a.result for a in rows]
    one, two = make_batch(rows, Algorithm(), 8), make_batch(again, Algorithm(), 8)
    for name in ("tokens", "lengths", "loss_mask", "advantages", "weights", "rollout_logprobs"):
        assert getattr(one, name).tobytes() == getattr(two, name).tobytes(), name
    first = (tmp_path / "step_7.jsonl").read_bytes()
    write_rollouts(tmp_path, 7, again)
    assert (tmp_path / "step_7.jsonl").read_bytes() == first  # no judge at all, the same bytes


def test_what_was_unread_is_unread_and_counted_in_a_replay(tmp_path: Path) -> None:
    late = Judgement("good", None, None, "judge", False, reason="timed out after 1 s")
    sure = Judgement("good", 0.75, 0.75, "judge", True, entropy=0.25, tier_mass=0.75)
    one, two = answer(0, 0, 1, 4), answer(0, 1, 1, 4)
    rows = scored([replace(a, judgements=a.judgements | {"good": j}) for a, j in ((one, late), (two, sure))])
    write_rollouts(tmp_path, 1, rows)
    samples, texts, items, _ = read_rollouts(tmp_path, 1, {a.sample.prompt.id: a.sample.prompt for a in rows})
    judged = asyncio.run(Judge(None).judge(items))
    again = scored([Answer(s, t, j) for s, t, j in zip(samples, texts, judged)])
    assert [a.judgements["good"] for a in again] == [late, sure] and again[0].reward == 1.0  # the check alone
    assert step_metrics(again, 0.0, WritingTimes(), None)["judge/unread_fraction"] == 0.5


def routed(rows: list[Answer]) -> list[Answer]:
    """The same answers with a record of routing: 3 prompt tokens and the answer's, 2 layers, 2 experts a token."""
    out = []
    for a in rows:
        n = 3 + len(a.sample.completion.token_ids)
        record = np.random.default_rng(n).integers(0, 8, (n, 2, 2)).astype(np.uint8)
        completion = replace(a.sample.completion, routing=record)
        out.append(replace(a, sample=replace(a.sample, completion=completion)))
    return out


def test_routing_goes_into_the_batch_and_replays(tmp_path: Path) -> None:
    rows = routed(scored([answer(0, 0, 1, 4), answer(0, 1, None, 2), answer(0, 2, 0, 5)]))
    assert make_batch(rows, Algorithm(), 8).routing is None
    batch = make_batch(rows, Algorithm(routing_replay=True), 8)
    assert batch.routing.shape == (7 + 5 + 8, 2, 2)
    assert np.array_equal(batch.routing[7 + 5 :], rows[2].sample.completion.routing)
    write_rollouts(tmp_path, 1, rows)
    samples, *_ = read_rollouts(tmp_path, 1, {a.sample.prompt.id: a.sample.prompt for a in rows})
    for sample, a in zip(samples, rows, strict=True):
        assert np.array_equal(sample.completion.routing, a.sample.completion.routing)
    with pytest.raises(RolloutError, match="an answer has no recorded routing"):
        make_batch(scored([answer(0, 0, 1, 4), answer(0, 1, 0, 2)]), Algorithm(routing_replay=True), 8)
    (tmp_path / "step_1.routing.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(BadInput, match=r"step_1\.routing\.safetensors: is not a record of routing"):
        read_rollouts(tmp_path, 1, {a.sample.prompt.id: a.sample.prompt for a in rows})


def test_replay_refuses_other_rubrics_and_missing_steps(tmp_path: Path) -> None:
    rows = scored([answer(0, 0, 1, 4), answer(0, 1, 0, 4)])
    write_rollouts(tmp_path, 1, rows)
    with pytest.raises(BadInput, match=r"step_2\.jsonl: no recorded rollouts"):
        read_rollouts(tmp_path, 2, {})
    with pytest.raises(BadInput, match=r"line 1 \(p0\): its prompt or rubric is not this run's"):
        read_rollouts(tmp_path, 1, {})
    (tmp_path / "step_3.jsonl").write_text("{}\n")
    with pytest.raises(BadInput, match=r"step_3\.jsonl: line 1: .*missing required field"):
        read_rollouts(tmp_path, 3, {})


def test_metrics_of_a_step_without_update() -> None:
    values = step_metrics(scored([answer(0, 0, 1, 4), answer(0, 1, 1, 4)]), 1.0, WritingTimes(), None)
    assert values["reward/mean"] == 1.0 and values["train/skipped"] == 1.0
    assert values["criterion/short/mean"] == 1.0 and "train/loss" not in values


def test_learning_rate_schedules() -> None:
    warm = Train(steps=10, lr=1.0, warmup_steps=2)
    assert [learning_rate(warm, s) for s in (1, 2, 3, 10)] == [0.5, 1.0, 1.0, 1.0]
    cosine = Train(steps=10, lr=1.0, schedule="cosine", min_lr_ratio=0.1)
    rates = [learning_rate(cosine, s) for s in range(1, 11)]
    assert rates[0] == 1.0 and rates == sorted(rates, reverse=True) and rates[-1] >= 0.1
    linear = Train(steps=4, lr=1.0, schedule="linear")
    np.testing.assert_allclose([learning_rate(linear, s) for s in (1, 2, 3, 4)], [1, 0.75, 0.5, 0.25])
