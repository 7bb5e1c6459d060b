"""The answers of a step, in one round or several: plain, dynamic sampling, partial rollouts, or both.

Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2 and eq. 11): a group whose answers all have the same reward has
no gradient, and a batch of many such groups is a small one. So further prompts are drawn in their place, until
`prompts_per_step` groups say something or `dynamic_rounds` rounds are done. A later round draws as many as are missing,
so no group that says something is ever left over. Partial rollouts are in `rollout.partial`; with both, a later round
first goes on with what the round before cut short.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from megarubric.config.rollout import Rollout
from megarubric.config.schema import Reward
from megarubric.judging.judge import Judge
from megarubric.recipe.experience import Answer, WritingTimes, judge_as_written, rate, whole_groups
from megarubric.reward.advantages import CriterionMeans
from megarubric.rollout.data import ChatTokenizer, PromptOrder
from megarubric.rollout.partial import PartialSampler
from megarubric.rollout.sampler import Sample, Sampler


class Rounds:
    """Draws and judges the answers of a step.

    `partial` is used instead of `sampler` when more groups are begun than needed, or when it still holds some. Prompts
    are taken from `order`; that, the carry in `partial` and `means` are the state, and they are the run's to save.
    """

    def __init__(
        self,
        sampler: Sampler,
        partial: PartialSampler,
        judge: Judge,
        tokenizer: ChatTokenizer,
        order: PromptOrder,
        rollout: Rollout,
        reward: Reward,
        means: CriterionMeans,
    ) -> None:
        self.sampler, self.partial, self.judge, self.tokenizer, self.order = sampler, partial, judge, tokenizer, order
        self.rollout, self.reward, self.means = rollout, reward, means

    async def step(self, step: int, version: int) -> tuple[list[Answer], WritingTimes]:
        """Answers of step `step`, written by weight version `version` or begun by an earlier one, in order (group by
        group, sample by sample; a later round's groups after those before). Those that belong in the batch are `used`.

        Raises RolloutError when an answer could not be written, ProcessDied when a process ended.
        """
        seen: Counter[str] = Counter()
        answers: list[Answer] = []
        informative: list[bool] = []
        times = WritingTimes()
        rounds = restarts = 0
        missing = self.rollout.prompts_per_step
        while missing and rounds < self.rollout.dynamic_rounds:
            groups = self._groups(step, version, missing, seen)
            written, spent = await judge_as_written(groups, self.judge, self.tokenizer)
            written = renumbered(written, len(informative))
            answers += written
            times.add(spent)
            rounds += 1
            restarts += self.partial.stale_restarts
            if self.rollout.dynamic_rounds > 1:
                _, degenerate = rate(renumbered(written, 0), self.reward, self.means)
                informative += (~degenerate).tolist()
                missing = self.rollout.prompts_per_step - sum(informative)
            else:
                informative += [True] * missing
        used = chosen(informative, self.rollout.prompts_per_step)
        if self.rollout.dynamic_rounds > 1:
            times.counts["rollout/rounds"] = float(rounds)
            times.counts["rollout/dropped_groups"] = float(len(informative) - len(used))
        if self.rollout.oversample > 1:
            older = sum(a.sample.completion.first_version < version for a in answers)
            times.counts["rollout/carried_samples"] = float(older)
            times.counts["rollout/stale_restarts"] = float(restarts)
            times.counts["rollout/aborted_tokens"] = float(self.partial.aborted_tokens)
        return [replace(a, used=a.sample.group in used) for a in answers], times

    def _groups(self, step: int, version: int, enough: int, seen: Counter[str]) -> AsyncGenerator[list[Sample]]:
        if self.rollout.oversample == 1 and not self.partial.open:
            return whole_groups(self.sampler, step, self.order.take(enough), seen)
        prompts = self.order.take(self.partial.wanted(enough))
        return self.partial.stream(step, version, prompts, enough, seen)


def renumbered(answers: Sequence[Answer], first: int) -> list[Answer]:
    """The same answers, in order, with their groups numbered `first`, `first` + 1, ..."""
    number = {g: first + i for i, g in enumerate(sorted({a.sample.group for a in answers}))}
    return [replace(a, sample=replace(a.sample, group=number[a.sample.group])) for a in answers]


def chosen(informative: Sequence[bool], most: int) -> set[int]:
    """Which groups go into a batch of at most `most`: informative ones before others, each in their order."""
    return set(sorted(range(len(informative)), key=lambda g: not informative[g])[:most])
