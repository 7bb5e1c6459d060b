"""An engine process seen from the controller: typed, asynchronous calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from megarubric.exchange.buckets import Bucket, DeviceBuffers, TensorSpec
from megarubric.exchange.rpc import Client, CurveKeys, Frames
from megarubric.rollout import messages as m
from megarubric.rollout.messages import Completion, GenerateRequest, TokenScores, TokenTierQuery


class EngineClient:
    """Calls one engine process. Any number of calls may be under way at once; the engine batches them.

    Every call raises RemoteError when the engine answers with an error, ProcessDied when its process ended
    (`peer_status`, see `rpc.Client`). A single sequence that cannot be served does not fail its call: its result
    carries `error`.
    """

    def __init__(
        self,
        endpoint: str,
        keys: CurveKeys | None = None,
        peer_status: Callable[[], str | None] = lambda: None,
        host: int = 0,
    ) -> None:
        """`host`: on which of the run's hosts the engine is, whose shared memory it reads."""
        self.host = host
        self._rpc = Client(endpoint, m.Reply, keys, peer_status)

    async def ready(self, timeout_s: float | None = None) -> m.EngineStats:
        """Wait until the engine answers. Raises TimeoutError after `timeout_s` seconds."""
        return await self._call(m.Stats(), timeout_s)

    async def generate(self, requests: Sequence[GenerateRequest], race: m.Race | None = None) -> list[Completion]:
        """Draw one sample for each request; returns when all have ended, in the order given. In a `race` with other
        calls of this client they may be cut short, with finish_reason "abort"."""
        frames = Frames()
        prompts = m.pack_ragged(frames, [r.prompt_ids for r in requests], np.int32)
        sampling = tuple(
            m.Sampling(r.max_tokens, r.seed, r.temperature, r.top_p, r.stop_token_ids, r.json_schema) for r in requests
        )
        reply, raw = await self._rpc.call(m.Generate(prompts, sampling, race), frames.buffers)
        tokens, logprobs = m.unpack_ragged(reply.token_ids, raw), m.unpack_ragged(reply.logprobs, raw)
        lengths = [
            0 if e.finish_reason in ("error", "abort") else len(r.prompt_ids) + len(ids)
            for r, ids, e in zip(requests, tokens, reply.ends)
        ]
        routing = [rows if n else None for rows, n in zip(m.unpack_routing(reply.routing, lengths, raw), lengths)]
        return [
            Completion(ids, lp, e.finish_reason, e.weight_version, e.first_version, e.cached_tokens, e.error, where)
            for ids, lp, e, where in zip(tokens, logprobs, reply.ends, routing, strict=True)
        ]

    async def stream(self, requests: Sequence[GenerateRequest]) -> AsyncIterator[tuple[int, Completion]]:
        """Like `generate`, but yields (index of the request, sample) as each ends."""

        async def one(index: int) -> tuple[int, Completion]:
            return index, (await self.generate([requests[index]]))[0]

        tasks = [asyncio.create_task(one(i)) for i in range(len(requests))]
        try:
            for task in asyncio.as_completed(tasks):
                yield await task
        finally:
            for task in tasks:
                task.cancel()

    async def tier_logprobs(self, queries: Sequence[TokenTierQuery]) -> list[TokenScores]:
        """Unrestricted log-softmax after each prompt, at its tier tokens: float32 [T] in their order."""
        frames = Frames()
        prompts = m.pack_ragged(frames, [q.prompt_ids for q in queries], np.int32)
        tiers = m.pack_ragged(frames, [q.tier_token_ids for q in queries], np.int32)
        return self._scores(*await self._rpc.call(m.TierLogprobs(prompts, tiers), frames.buffers))

    async def score_tokens(self, sequences: Sequence[NDArray[np.int32]]) -> list[TokenScores]:
        """Log-probability of every token of each sequence int32 [n] given those before it: float32 [n-1]."""
        frames = Frames()
        ragged = m.pack_ragged(frames, sequences, np.int32)
        return self._scores(*await self._rpc.call(m.ScoreTokens(ragged), frames.buffers))

    @staticmethod
    def _scores(reply: m.Scored, raw: list[bytes]) -> list[TokenScores]:
        return [
            TokenScores(None if e.error else lp, e.weight_version, e.cached_tokens, e.error)
            for lp, e in zip(m.unpack_ragged(reply.logprobs, raw), reply.ends, strict=True)
        ]

    async def begin_update(
        self, version: int, manifest: Sequence[TensorSpec], devices: DeviceBuffers | None = None
    ) -> m.Weights:
        """Announce weight version `version`, made of the tensors in `manifest`, in shared memory or in the trainer's
        buffers on `devices`."""
        return await self._call(m.BeginUpdate(version, tuple(manifest), devices))

    async def load_bucket(self, version: int, bucket: Bucket) -> m.Weights:
        """Have a filled bucket taken in; when this returns its segment may be filled again."""
        return await self._call(m.LoadBucket(version, bucket))

    async def finish_update(
        self, version: int, checksum: str, in_flight: Literal["wait", "keep"] = "wait"
    ) -> m.Weights:
        """Put `version` in service; its reply carries the checksum of what is now served."""
        return await self._call(m.FinishUpdate(version, checksum, in_flight))

    async def abort_update(self) -> m.Weights:
        """Forget the update under way."""
        return await self._call(m.AbortUpdate())

    async def checksum(self) -> m.Weights:
        """Version and checksum (`buckets.WeightDigest`) of the weights in service."""
        return await self._call(m.Checksum())

    async def sleep(self, level: Literal[1, 2] = 1) -> m.Slept:
        """Free device memory when running requests have ended; `outcome` says whether anything was freed."""
        return await self._call(m.Sleep(level))

    async def wake(self, tags: Sequence[Literal["weights", "kv_cache"]] = ()) -> m.Slept:
        """Take device memory again, all of it or what is tagged."""
        return await self._call(m.Wake(tuple(tags)))

    async def reset_prefix_cache(self) -> None:
        await self._call(m.ResetPrefixCache())

    async def stats(self) -> m.EngineStats:
        return await self._call(m.Stats())

    async def shutdown(self) -> None:
        """Tell the process to end."""
        await self._call(m.Shutdown())

    async def close(self) -> None:
        await self._rpc.close()

    async def _call[R](self, body: msgspec.Struct, timeout_s: float | None = None) -> R:
        return (await self._rpc.call(body, timeout_s=timeout_s))[0]  # type: ignore[no-any-return]
