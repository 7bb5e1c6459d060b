"""What an engine process has under way: calls, answered when all their sequences have ended, and races of calls."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from megarubric.errors import MegarubricError
from megarubric.exchange.rpc import Call, Frames
from megarubric.rollout import messages as m

_NO_TOKENS = np.empty(0, np.int32)
_NO_LOGPROBS = np.empty(0, np.float32)


class EngineRefused(MegarubricError):
    """A request that this engine cannot serve, or not now."""


class Job:
    """A call that asks for several sequences; answered when the last of them has ended."""

    def __init__(self, call: Call, reply_type: type[m.Generated] | type[m.Scored], size: int) -> None:
        self.call, self.reply_type, self.left = call, reply_type, size
        self.tokens: list[NDArray[np.int32]] = [_NO_TOKENS] * size
        self.logprobs: list[NDArray[np.float32]] = [_NO_LOGPROBS] * size
        self.routing: list[NDArray[Any] | None] = [None] * size
        self.ends: list[m.SampleEnd | None] = [None] * size

    def end(self, index: int, end: m.SampleEnd) -> None:
        self.ends[index] = end
        self.left -= 1
        if self.left == 0:
            self.reply()

    def reply(self) -> None:
        frames = Frames()
        ends = tuple(e for e in self.ends if e is not None)
        logprobs = m.pack_ragged(frames, self.logprobs, np.float32)
        if self.reply_type is m.Generated:
            rows = [r for r in self.routing if r is not None]
            routing = frames.add(np.concatenate(rows)) if rows else None
            body: msgspec.Struct = m.Generated(m.pack_ragged(frames, self.tokens, np.int32), logprobs, ends, routing)
        else:
            body = m.Scored(logprobs, ends)
        self.call.reply(body, frames.buffers)


class Race:
    """The calls of one `messages.Race`: held until all have come, then under way."""

    def __init__(self, spec: m.Race) -> None:
        if not 1 <= spec.enough <= spec.calls:
            raise EngineRefused(f"a race of {spec.calls} calls cannot end when {spec.enough} have ended")
        self.spec = spec
        self.held: list[Call] = []
        self.jobs: list[Job] = []

    @property
    def under_way(self) -> bool:
        return any(job.left for job in self.jobs)

    @property
    def decided(self) -> bool:
        """Enough calls have ended, or there is none that could."""
        return not self.under_way or sum(job.left == 0 for job in self.jobs) >= self.spec.enough
