"""Partial rollouts: a step ends when enough groups are complete; what the others have is kept, and gone on with.

Answers have a long tail, and a step that waits for the last of them leaves the engines idle (Kimi k1.5, arXiv
2501.12599, section 2.6.2; APRIL, arXiv 2509.18521). Here a step begins more groups than it needs. When as many as it
needs have ended, the engines cut the others short (`messages.Race`), so that nothing runs while the trainer does. The
next step's first requests go on where those ended: prompt and written tokens are the prompt, and each token keeps the
log-probability it was drawn with, under the version that drew it. An engine that records routing records it anew for
the whole, under the version that goes on: the routing of an answer is always that of one pass over it.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megarubric.rollout.client import EngineClient
from megarubric.rollout.data import Prompt
from megarubric.rollout.messages import Completion, GenerateRequest, Race
from megarubric.rollout.sampler import Sample, SamplingSettings, group_seeds, request_of, seed_from


@dataclass(slots=True, eq=False)
class OpenGroup:
    """A group that was begun and not used yet. `completions[i]` is None where sample i has no token yet, or has what
    was written (finish_reason "abort"), or is finished. `seeds[i]` is that of its first token."""

    prompt: Prompt
    seeds: list[int]
    completions: list[Completion | None]

    @property
    def unfinished(self) -> list[int]:
        return [i for i, c in enumerate(self.completions) if c is None or c.finish_reason == "abort"]

    def samples(self, group: int) -> list[Sample]:
        """All samples of a finished group, numbered `group`."""
        found = [c for c in self.completions if c is not None]
        return [Sample(group, i, self.prompt, *pair) for i, pair in enumerate(zip(self.seeds, found, strict=True))]


def later_seed(seed: int, step: int, written: int) -> int:
    """Seed in [0, 2^63) of the request that goes on with a sample after `written` tokens in `step`, or begins it anew:
    never that of an earlier request of the sample, whose random numbers would come again."""
    return seed_from(seed, step, written)


def join(before: Completion | None, after: Completion) -> Completion | None:
    """A sample's tokens so far, and those of the request that went on with it; None when there is none at all."""
    if after.error is not None:
        return after
    if after.finish_reason == "abort" and not len(after.token_ids):
        return before
    if before is None:
        return after
    return replace(
        after,
        token_ids=np.concatenate([before.token_ids, after.token_ids]),
        logprobs=np.concatenate([before.logprobs, after.logprobs]),
        first_version=before.first_version,
    )


class PartialSampler:
    """Draws groups from `engines`, which must serve the same weights, and keeps between calls what was not used.

    `open` are the groups that the next call goes on with, oldest first; it is part of the run's state. A sample whose
    first token is more than `max_staleness` versions old is begun anew, so no older token gets into a batch.

    The groups of a call are dealt to the engines in turn, and each engine ends when it has its share of those that are
    needed. What is written and what is cut short is then the same whenever the call is made with the same weights, as
    long as the engines do nothing else meanwhile.
    """

    def __init__(
        self, engines: Sequence[EngineClient], settings: SamplingSettings, oversample: float, max_staleness: int
    ) -> None:
        self.engines, self.settings = tuple(engines), settings
        self.oversample, self.max_staleness = oversample, max_staleness
        self.open: list[OpenGroup] = []
        self.stale_restarts = 0  # of the last call
        self._races = itertools.count(1)

    @property
    def aborted_tokens(self) -> int:
        """Tokens of the unfinished samples in `open`."""
        return sum(
            len(c.token_ids) for g in self.open for c in g.completions if c is not None and c.finish_reason == "abort"
        )

    def wanted(self, enough: int) -> int:
        """How many new prompts a call that needs `enough` groups takes, beside the open ones."""
        return max(0, self._begun(enough) - len(self.open))

    def _begun(self, enough: int) -> int:
        """How many groups such a call begins."""
        return math.ceil(self.oversample * enough - 1e-9)

    async def stream(
        self, step: int, version: int, prompts: Sequence[Prompt], enough: int, seen: Counter[str]
    ) -> AsyncGenerator[list[Sample]]:
        """`enough` groups, each when its last sample has ended. Those that were open are begun first, then new ones for
        `prompts`; a sample's `group` is the group's place in that order. When the stream ends, nothing runs on the
        engines.

        `version` is that of the weights in service. A sample that an engine could not draw ends its group, with
        `completion.error`. Raises ProcessDied or RemoteError when an engine as a whole fails.
        """
        seeds = group_seeds(self.settings, step, prompts, seen)
        self.open += [OpenGroup(p, s, [None] * len(s)) for p, s in zip(prompts, seeds)]
        self.stale_restarts = sum(self._restart_stale(group, step, version) for group in self.open)
        begun = self.open[: max(enough, self._begun(enough))]
        place = {id(group): i for i, group in enumerate(begun)}
        whole = [group for group in begun if not group.unfinished][:enough]
        for group in whole:
            self.open.remove(group)
            yield group.samples(place[id(group)])
        groups = [group for group in begun if group.unfinished]
        if len(whole) == enough:
            return
        events: asyncio.Queue[OpenGroup | asyncio.Task[None]] = asyncio.Queue()
        tasks = self._start(step, groups, enough - len(whole), events)
        try:
            busy = len(tasks)
            while busy:
                event = await events.get()
                if isinstance(event, asyncio.Task):
                    event.result()  # raises what ended it
                    busy -= 1
                    continue
                self.open.remove(event)
                yield event.samples(place[id(event)])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _restart_stale(self, group: OpenGroup, step: int, version: int) -> int:
        stale = [
            i
            for i, c in enumerate(group.completions)
            if c is not None and version - c.first_version > self.max_staleness
        ]
        for i in stale:
            group.seeds[i], group.completions[i] = later_seed(group.seeds[i], step, 0), None
        return len(stale)

    def _start(
        self,
        step: int,
        groups: Sequence[OpenGroup],
        enough: int,
        events: asyncio.Queue[OpenGroup | asyncio.Task[None]],
    ) -> list[asyncio.Task[None]]:
        """One task a group, on the engine it is dealt to; the first groups to end there go to `events`, and every task
        when it is over."""
        engines = self.engines[:enough]
        tasks = []
        for k, engine in enumerate(engines):
            dealt = groups[k :: len(engines)]
            share = enough // len(engines) + (k < enough % len(engines))
            race, left = Race(next(self._races), len(dealt), share), itertools.count(1)

            async def one(group: OpenGroup, engine: EngineClient, race: Race, ended: itertools.count[int]) -> None:
                at = group.unfinished
                replies = await engine.generate([self._request(group, i, step) for i in at], race)
                for i, reply in zip(at, replies, strict=True):
                    group.completions[i] = join(group.completions[i], reply)
                if not group.unfinished and next(ended) <= race.enough:
                    events.put_nowait(group)

            for group in dealt:
                task = asyncio.create_task(one(group, engine, race, left))
                task.add_done_callback(events.put_nowait)
                tasks.append(task)
        return tasks

    def _request(self, group: OpenGroup, index: int, step: int) -> GenerateRequest:
        s, seed, before = self.settings, group.seeds[index], group.completions[index]
        if before is None:
            return request_of(s, group.prompt.token_ids, s.max_new_tokens, seed)
        written = len(before.token_ids)
        ids = np.concatenate([group.prompt.token_ids, before.token_ids])
        return request_of(s, ids, s.max_new_tokens - written, later_seed(seed, step, written))
