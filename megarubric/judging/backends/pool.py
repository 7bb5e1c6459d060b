"""Several judge engines as one: each prompt goes where those that begin like it went, so that its prefix is there.

What makes a judge cheap is that the criteria of an answer share nearly all of their prompt (docs/judging.md). Two
engines that read half of the criteria each read the answer twice; so an answer's criteria stay together, and whole
answers are what is spread.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megarubric.errors import BadInput, MegarubricError, ProcessDied
from megarubric.exchange.rpc import RemoteError
from megarubric.judging.backends.engine import TierEngine
from megarubric.rollout.messages import Completion, GenerateRequest, TokenScores, TokenTierQuery

log = logging.getLogger(__name__)
_REST_S = 30.0  # an engine that failed is left alone for so long, while there are others
_REMEMBERED = 4096  # prefixes whose engine is known: more answers than are under way, fewer than a KV cache forgets


class _Prompted(Protocol):
    """What `TokenTierQuery` and `GenerateRequest` have in common."""

    @property
    def prompt_ids(self) -> NDArray[np.int32]: ...

    @property
    def prefix(self) -> int: ...


class _Part[R](NamedTuple):
    """The share of a call that one engine has: places in the call, and the answer to come."""

    engine: int
    places: list[int]
    answer: asyncio.Task[Sequence[R]]


class EnginePool:
    """A `TierEngine` over `engines`, which serve the same weights: one reply a request, in order.

    Requests of one `prefix` go to one engine, in a call and from call to call; a new prefix goes to the engine with the
    fewest tokens outstanding, where tokens that a prompt shares with its neighbour count once. All engines are asked
    at once, and any number of calls may overlap.

    An engine that answers with an error, or not within `timeout_s`, is left alone for a while, and its part of the call
    is asked once more, of the others; what fails there too has the reason in each reply's `error`, and the rest of
    the call is as it would have been. Raises ProcessDied when an engine's process has ended.
    """

    def __init__(self, engines: Sequence[TierEngine], timeout_s: float) -> None:
        if not engines:
            raise ValueError("a pool needs at least one engine")
        self.engines, self.timeout_s = tuple(engines), timeout_s
        self.outstanding = [0] * len(engines)  # tokens an engine still works on, also when nobody waits for them
        self._rests_until = [0.0] * len(engines)
        self._home: OrderedDict[int, int] = OrderedDict()  # prefix -> engine, the latest used last

    async def tier_logprobs(self, queries: Sequence[TokenTierQuery]) -> list[TokenScores]:
        def ask(engine: TierEngine, part: Sequence[TokenTierQuery]) -> Coroutine[Any, Any, Sequence[TokenScores]]:
            return engine.tier_logprobs(part)

        return await self._ask(queries, [0] * len(queries), ask, lambda reason: TokenScores(None, 0, error=reason))

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        def ask(engine: TierEngine, part: Sequence[GenerateRequest]) -> Coroutine[Any, Any, Sequence[Completion]]:
            return engine.generate(part)

        def failed(reason: str) -> Completion:
            return Completion(np.empty(0, np.int32), np.empty(0, np.float32), "error", 0, 0, error=reason)

        return await self._ask(requests, [r.max_tokens for r in requests], ask, failed)

    async def _ask[Q: _Prompted, R](
        self,
        requests: Sequence[Q],
        written: Sequence[int],
        ask: Callable[[TierEngine, Sequence[Q]], Coroutine[Any, Any, Sequence[R]]],
        failed: Callable[[str], R],
    ) -> list[R]:
        """`written`: the tokens that each request may add to its prompt."""
        replies: dict[int, R] = {}

        def start(places: Sequence[int], without: int | None = None) -> list[_Part[R]]:
            # Nothing is awaited between the choice of an engine and its charge: calls that overlap see each other's.
            parts = []
            for engine, (mine, cost) in self._split(requests, written, places, without).items():
                answer = asyncio.create_task(
                    _exactly(len(mine), ask(self.engines[engine], [requests[i] for i in mine]))
                )
                answer.add_done_callback(self._discharge(engine, cost))
                parts.append(_Part(engine, mine, answer))
            return parts

        async def finish(part: _Part[R], again: bool) -> None:
            try:
                # Shielded: an engine that is late, or asked by a call that is over, has the work all the same.
                got = await asyncio.wait_for(asyncio.shield(part.answer), self.timeout_s)
            except (ProcessDied, BadInput):
                raise
            except (MegarubricError, TimeoutError) as error:
                reason = f"timed out after {self.timeout_s:g} s" if isinstance(error, TimeoutError) else str(error)
                log.warning("judge engine %d of %d failed: %s", part.engine, len(self.engines), reason)
                self._rests_until[part.engine] = asyncio.get_running_loop().time() + _REST_S
                if again or len(self.engines) == 1:
                    replies.update((i, failed(reason)) for i in part.places)
                else:
                    await asyncio.gather(*(finish(p, True) for p in start(part.places, without=part.engine)))
            else:
                replies.update(zip(part.places, got))

        await asyncio.gather(*(finish(part, False) for part in start(range(len(requests)))))
        return [replies[i] for i in range(len(requests))]

    def _split(
        self, requests: Sequence[_Prompted], written: Sequence[int], places: Sequence[int], without: int | None
    ) -> dict[int, tuple[list[int], int]]:
        """For each engine that gets any of `places`: which, and the tokens they cost, which it is charged with."""
        groups: dict[tuple[int, int], list[int]] = {}
        for i in places:
            prefix = requests[i].prefix
            groups.setdefault((prefix, 0) if prefix else (0, i), []).append(i)
        cost = {key: _cost([requests[i] for i in g]) + sum(written[i] for i in g) for key, g in groups.items()}
        now = asyncio.get_running_loop().time()
        usable = [e for e in range(len(self.engines)) if e != without]
        rested = [e for e in usable if self._rests_until[e] <= now] or usable
        parts: dict[int, tuple[list[int], int]] = {}
        for key in sorted(groups, key=lambda k: -cost[k]):  # the largest first: the small ones level what they leave
            engine = self._home.get(key[0]) if key[0] else None
            if engine not in rested:
                engine = min(rested, key=self.outstanding.__getitem__)
            if key[0]:
                self._home[key[0]] = engine
                self._home.move_to_end(key[0])
            self.outstanding[engine] += cost[key]
            mine, charged = parts.get(engine, ([], 0))
            parts[engine] = ([*mine, *groups[key]], charged + cost[key])
        while len(self._home) > _REMEMBERED:
            self._home.popitem(last=False)
        return parts

    def _discharge(self, engine: int, cost: int) -> Callable[[asyncio.Task[Any]], None]:
        def done(answer: asyncio.Task[Any]) -> None:
            self.outstanding[engine] -= cost
            if not answer.cancelled():
                answer.exception()  # looked at: nobody may be waiting for it any more

        return done


async def _exactly[R](count: int, answer: Coroutine[Any, Any, Sequence[R]]) -> Sequence[R]:
    """`answer`. Raises RemoteError when it has another number of replies."""
    replies = await answer
    if len(replies) != count:
        raise RemoteError(f"wrong number of answers: {len(replies)} for {count} questions")
    return replies


def _cost(group: Sequence[_Prompted]) -> int:
    """Prompt tokens of neighbours, what each shares with the one before left out."""
    prompts = [request.prompt_ids for request in group]
    return sum(map(len, prompts)) - sum(map(_shared, prompts, prompts[1:]))


def _shared(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many tokens `a` and `b` begin with in common."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n
