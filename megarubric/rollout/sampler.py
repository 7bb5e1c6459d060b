"""Groups of samples from one or several policy engines, each sample with a seed of its own."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megarubric.rollout.client import EngineClient
from megarubric.rollout.data import Prompt
from megarubric.rollout.messages import Completion, GenerateRequest


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How a group is drawn: `samples_per_prompt` answers of at most `max_new_tokens` tokens, the stop token counted."""

    samples_per_prompt: int
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """The `index`-th answer to the prompt at `group` in the batch."""

    group: int
    index: int
    prompt: Prompt
    seed: int
    completion: Completion


def sample_seed(run_seed: int, step: int, prompt_id: str, index: int) -> int:
    """Seed in [0, 2^63) of one sample: the same on every machine and in every process, a different one a sample."""
    return seed_from(run_seed, step, index, prompt_id)


def seed_from(*parts: int | str) -> int:
    """Seed in [0, 2^63), another for any other parts."""
    key = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def request_of(s: SamplingSettings, prompt_ids: NDArray[np.int32], max_tokens: int, seed: int) -> GenerateRequest:
    return GenerateRequest(prompt_ids, max_tokens, seed, s.temperature, s.top_p, s.stop_token_ids)


def group_seeds(s: SamplingSettings, step: int, prompts: Sequence[Prompt], seen: Counter[str]) -> list[list[int]]:
    """Seeds of the groups of `prompts`. A prompt that comes again in a step (the end of one pass and the start of the
    next, or a later round) draws other samples: `seen` counts how often each came, and goes on counting."""
    groups = []
    for prompt in prompts:
        offset = seen[prompt.id] * s.samples_per_prompt
        seen[prompt.id] += 1
        groups.append([sample_seed(s.seed, step, prompt.id, offset + i) for i in range(s.samples_per_prompt)])
    return groups


class Sampler:
    """Draws groups from `engines`, which must serve the same weights.

    A group stays on one engine, where its samples share the prompt's KV cache; each engine takes the next group when
    fewer than `window` of its samples are under way, so an engine with short answers takes more groups.
    """

    def __init__(self, engines: Sequence[EngineClient], settings: SamplingSettings, window: int = 512) -> None:
        if not engines:
            raise ValueError("a sampler needs at least one engine")
        self.engines, self.settings, self.window = tuple(engines), settings, window

    async def stream(
        self, step: int, prompts: Sequence[Prompt], seen: Counter[str] | None = None
    ) -> AsyncGenerator[Sample]:
        """All samples of `prompts`, each as soon as it has ended, so that judging can overlap with sampling. `seen`
        counts the prompts of the step's earlier rounds (`group_seeds`).

        A sample that the engine could not draw is yielded too, with `completion.error`. Raises ProcessDied or
        RemoteError when an engine as a whole fails.
        """
        waiting = deque(self._requests(step, prompts, Counter() if seen is None else seen))
        events: asyncio.Queue[Sample | asyncio.Task[None]] = asyncio.Queue()
        workers = [asyncio.create_task(self._work(engine, waiting, events)) for engine in self.engines]
        for worker in workers:
            worker.add_done_callback(events.put_nowait)
        try:
            busy = len(workers)
            while busy:
                event = await events.get()
                if isinstance(event, Sample):
                    yield event
                else:
                    event.result()  # raises what ended the worker
                    busy -= 1
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def sample(self, step: int, prompts: Sequence[Prompt]) -> list[list[Sample]]:
        """The groups of `prompts`, in their order, each with its samples in order."""
        groups: list[list[Sample]] = [[] for _ in prompts]
        async for sample in self.stream(step, prompts):
            groups[sample.group].append(sample)
        return [sorted(group, key=lambda s: s.index) for group in groups]

    def _requests(
        self, step: int, prompts: Sequence[Prompt], seen: Counter[str]
    ) -> list[list[tuple[int, int, Prompt, GenerateRequest]]]:
        s = self.settings
        return [
            [
                (group, index, prompt, request_of(s, prompt.token_ids, s.max_new_tokens, seed))
                for index, seed in enumerate(seeds)
            ]
            for group, (prompt, seeds) in enumerate(zip(prompts, group_seeds(s, step, prompts, seen)))
        ]

    async def _work(
        self,
        engine: EngineClient,
        waiting: deque[list[tuple[int, int, Prompt, GenerateRequest]]],
        events: asyncio.Queue[Sample | asyncio.Task[None]],
    ) -> None:
        """Keep one engine busy until no group waits and all its samples have ended."""

        async def draw(group: int, index: int, prompt: Prompt, request: GenerateRequest) -> Sample:
            (completion,) = await engine.generate([request])
            return Sample(group, index, prompt, request.seed, completion)

        running: set[asyncio.Task[Sample]] = set()
        done: set[asyncio.Task[Sample]] = set()
        try:
            while waiting or running:
                while waiting and (not running or len(running) + len(waiting[0]) <= self.window):
                    running |= {asyncio.create_task(draw(*request)) for request in waiting.popleft()}
                    await asyncio.sleep(0)  # let the other engines take theirs
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    events.put_nowait(task.result())
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, *done, return_exceptions=True)
