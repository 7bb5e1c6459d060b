"""From prompts to a training batch: answers are written, judged, aggregated into rewards and advantages.

Each function is one of the loop's verbs and can be used alone. Judging overlaps with writing: a group is sent to the
judge as soon as its last answer ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from megarubric.config.schema import Algorithm as AlgorithmConfig
from megarubric.config.schema import Reward
from megarubric.errors import MegarubricError
from megarubric.judging.judge import Judge
from megarubric.judging.types import JudgeItem, Judgement
from megarubric.megatron.messages import TrainBatch
from megarubric.recipe.algorithms import algorithm
from megarubric.reward.advantages import CriterionMeans, group_advantages, objective_wise
from megarubric.reward.batch import aggregate_batch
from megarubric.reward.reference import RewardResult
from megarubric.rollout.data import ChatTokenizer, Prompt
from megarubric.rollout.sampler import Sample, Sampler


class RolloutError(MegarubricError):
    """An engine could not write an answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One sample with what became of it. `result` and `advantage` are set by `score`; an answer that is not `used` was
    drawn and judged, and left out of the batch (recipe/rounds.py)."""

    sample: Sample
    text: str
    judgements: dict[str, Judgement]
    result: RewardResult | None = None
    advantage: float = 0.0
    used: bool = True

    @property
    def valid(self) -> bool:
        return self.result is not None and self.result.valid

    @property
    def reward(self) -> float | None:
        return self.result.reward if self.result is not None else None


@dataclass(slots=True)
class WritingTimes:
    """Seconds: until the last answer ended; from then until the last judgement; with a judgement under way at all.
    `counts` are further metrics of the writing, by name."""

    rollout: float = 0.0
    judge_tail: float = 0.0
    judge_busy: float = 0.0
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, other: WritingTimes) -> None:
        """The seconds of a later round."""
        self.rollout += other.rollout
        self.judge_tail += other.judge_tail
        self.judge_busy += other.judge_busy


async def write_and_judge(
    sampler: Sampler,
    judge: Judge,
    tokenizer: ChatTokenizer,
    step: int,
    prompts: Sequence[Prompt],
    seen: Counter[str] | None = None,
) -> tuple[list[Answer], WritingTimes]:
    """Answers to `prompts` in order (group by group, sample by sample), judged. `seen` as in `Sampler.stream`.

    Raises RolloutError when an answer could not be written (the engine's reason), ProcessDied when a process ended.
    """
    return await judge_as_written(whole_groups(sampler, step, prompts, seen), judge, tokenizer)


async def whole_groups(
    sampler: Sampler, step: int, prompts: Sequence[Prompt], seen: Counter[str] | None = None
) -> AsyncGenerator[list[Sample]]:
    """The groups of `prompts`, each when its last sample has ended. Raises RolloutError at the first that has not."""
    groups: list[list[Sample]] = [[] for _ in prompts]
    async with contextlib.aclosing(sampler.stream(step, prompts, seen)) as samples:
        async for sample in samples:
            check_written(sample)
            groups[sample.group].append(sample)
            if len(groups[sample.group]) == sampler.settings.samples_per_prompt:
                yield groups[sample.group]


def check_written(sample: Sample) -> None:
    if sample.completion.error is not None:
        raise RolloutError(f"prompt {sample.prompt.id}, sample {sample.index}: {sample.completion.error}")


async def judge_as_written(
    groups: AsyncGenerator[list[Sample]], judge: Judge, tokenizer: ChatTokenizer
) -> tuple[list[Answer], WritingTimes]:
    """The answers of `groups`, each group sent to the judge as it comes; sorted by group and sample.

    Raises RolloutError when one of them could not be written.
    """
    began, times = time.perf_counter(), WritingTimes()
    judging: list[asyncio.Task[list[Answer]]] = []
    first_judged = None
    try:
        async with contextlib.aclosing(groups):
            async for group in groups:
                for sample in group:
                    check_written(sample)
                first_judged = first_judged or time.perf_counter()
                judging.append(asyncio.create_task(judge_samples(judge, tokenizer, group)))
        written = time.perf_counter()
        answers = [answer for task in judging for answer in await task]
    finally:
        for task in judging:
            task.cancel()
        await asyncio.gather(*judging, return_exceptions=True)
    ended = time.perf_counter()
    times.rollout, times.judge_tail = written - began, ended - written
    times.judge_busy = ended - (first_judged or ended)
    return sorted(answers, key=lambda a: (a.sample.group, a.sample.index)), times


async def judge_samples(judge: Judge, tokenizer: ChatTokenizer, samples: Sequence[Sample]) -> list[Answer]:
    """Decode and judge finished samples."""
    texts = [tokenizer.decode(s.completion.token_ids) for s in samples]
    items = [JudgeItem(s.prompt.rubric, s.prompt.text, text) for s, text in zip(samples, texts)]
    judged = await judge.judge(items)
    return [Answer(s, text, j) for s, text, j in zip(samples, texts, judged)]


def reward_answers(answers: Sequence[Answer]) -> list[Answer]:
    """Criterion scores to rewards (spec/reward.md), on the compiled op when it is there."""
    rubrics = list({a.sample.prompt.rubric.hash: a.sample.prompt.rubric for a in answers}.values())
    place = {rubric.hash: i for i, rubric in enumerate(rubrics)}
    index = [place[a.sample.prompt.rubric.hash] for a in answers]
    scores = [{name: j.score for name, j in a.judgements.items()} for a in answers]
    results = aggregate_batch(rubrics, index, scores).results()
    return [replace(a, result=r) for a, r in zip(answers, results)]


def score(answers: Sequence[Answer], reward: Reward, means: CriterionMeans) -> tuple[list[Answer], float]:
    """Answers with rewards and advantages, and the share of groups that say nothing (degenerate).

    `means` is updated with this step's criterion scores; objective-wise advantages use what it held before. All answers
    count there, used or not: it says how well the policy meets a criterion, and the groups that are left out are
    mostly those in which it always does, or never.
    """
    scored, degenerate = rate(answers, reward, means)
    for a in answers:
        for name, j in a.judgements.items():
            means.update(name, [j.score])
    return scored, float(np.mean(degenerate))


def rate(answers: Sequence[Answer], reward: Reward, means: CriterionMeans) -> tuple[list[Answer], NDArray[np.bool_]]:
    """Answers with rewards and advantages, and whether each group is degenerate, bool [groups]."""
    answers = reward_answers(answers)
    group = np.array([a.sample.group for a in answers])
    valid = np.array([a.valid for a in answers])
    if reward.advantage == "objective_wise":
        advantages, degenerate = _objective_wise(answers, group, valid, reward.gamma, means)
    else:
        rewards = np.array([np.nan if a.reward is None else a.reward for a in answers], np.float32)
        advantages, degenerate = group_advantages(rewards, valid, group, reward.advantage)
    return [replace(a, advantage=float(x)) for a, x in zip(answers, advantages)], degenerate


def _objective_wise(
    answers: Sequence[Answer], group: np.ndarray, valid: np.ndarray, gamma: float, means: CriterionMeans
) -> tuple[np.ndarray, np.ndarray]:
    """Columns are criterion ids over all rubrics of the step; a group's weights are its own rubric's. A vetoed answer
    counts its reward as one more objective, so that a veto is felt whatever its criterion's weight."""
    names = sorted({name for a in answers for name in a.judgements})
    column = {name: k for k, name in enumerate(names)}
    scores = np.zeros((len(answers), len(names) + 1), np.float32)
    mask = np.zeros_like(scores, dtype=bool)
    weights = np.zeros((int(group.max()) + 1, len(names) + 1), np.float32)
    sbar = np.zeros_like(weights)
    for i, a in enumerate(answers):
        for name, j in a.judgements.items():
            if j.score is not None:
                scores[i, column[name]], mask[i, column[name]] = j.score, True
        scores[i, -1], mask[i, -1] = float(not (a.result and a.result.vetoed)), True
        for criterion in a.sample.prompt.rubric.criteria:
            weights[group[i], column[criterion.id]] = criterion.weight
            sbar[group[i], column[criterion.id]] = means.mean(criterion.id)
        weights[group[i], -1] = sum(abs(c.weight) for c in a.sample.prompt.rubric.criteria)
    return objective_wise(scores, mask, group, weights, sbar if gamma > 0 else None, gamma, valid)


def make_batch(
    answers: Sequence[Answer], c: AlgorithmConfig, max_new_tokens: int, version: int | None = None
) -> TrainBatch | None:
    """The trainer's batch: prompt and answer tokens exactly as the engine had them, token advantages and weights.
    Answers that weights before `version` wrote, wholly or in part, are marked as not fresh.

    Weights are made over all valid answers that are used; then answers that cannot move the policy (advantage 0, and
    neither a KL nor an entropy term) are left out, which changes no gradient. None when nothing is left. Raises
    RolloutError when routing is to be replayed and an answer came without it.
    """
    kept = [a for a in answers if a.used and a.valid and len(a.sample.completion.token_ids)]
    if not kept:
        return None
    if c.routing_replay and any(a.sample.completion.routing is None for a in kept):
        raise RolloutError("algorithm.routing_replay is on, and an answer has no recorded routing")
    lengths = np.array([len(a.sample.prompt.token_ids) + len(a.sample.completion.token_ids) for a in kept], np.int32)
    starts = np.array([len(a.sample.prompt.token_ids) for a in kept])
    mask = np.concatenate([(np.arange(n) >= s).astype(np.float32) for n, s in zip(lengths, starts)])
    updates = None
    if c.updates_per_step > 1:
        groups = {g: i for i, g in enumerate(sorted({a.sample.group for a in kept}))}
        split = min(c.updates_per_step, len(groups))
        updates = np.array([groups[a.sample.group] * split // len(groups) for a in kept], np.int32)
    weights = algorithm(c.name).token_weights(mask, lengths, max_new_tokens, updates)
    if updates is None and not c.kl_coef and not c.entropy_coef:
        moves = np.array([a.advantage != 0 for a in kept])
        if not moves.any():
            return None
        token_moves = np.repeat(moves, lengths)
        kept = [a for a in kept if a.advantage != 0]
        lengths, starts = lengths[moves], starts[moves]
        mask, weights = mask[token_moves], weights[token_moves]
    samples = [a.sample for a in kept]
    tokens = [t for s in samples for t in (s.prompt.token_ids, s.completion.token_ids)]
    engine = [x for s, n in zip(samples, starts) for x in (np.zeros(n, np.float32), s.completion.logprobs)]
    fresh = [version is None or s.completion.first_version == s.completion.weight_version == version for s in samples]
    advantages = np.repeat(np.array([a.advantage for a in kept], np.float32), lengths)
    routing = [s.completion.routing for s in samples]
    return TrainBatch(
        tokens=np.concatenate(tokens).astype(np.int32),
        lengths=lengths,
        loss_mask=mask,
        advantages=advantages * mask,
        weights=weights,
        rollout_logprobs=np.concatenate(engine).astype(np.float32),
        updates=updates,
        fresh=None if all(fresh) else np.repeat(np.array(fresh, np.float32), lengths),
        routing=np.concatenate([r for r in routing if r is not None]) if c.routing_replay else None,
    )
