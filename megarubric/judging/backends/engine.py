"""The run's own judge: a vLLM engine process asked over ZeroMQ for the log-probabilities of the tier tokens.

The prompt is tokenised here (`PromptEncoder`), so the engine never sees text and no judged text can become a control
token. Nothing is decoded: one prefill a criterion, sharing the prefix of its answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from megarubric.errors import BadInput
from megarubric.judging.prompt import PromptEncoder
from megarubric.judging.types import TextQuery, TextReply, TierQuery, TierReply
from megarubric.rollout.messages import Completion, GenerateRequest, TokenScores, TokenTierQuery


class TierEngine(Protocol):
    """The part of `megarubric.rollout.client.EngineClient` that judging uses."""

    async def tier_logprobs(self, queries: Sequence[TokenTierQuery]) -> Sequence[TokenScores]: ...

    async def generate(self, requests: Sequence[GenerateRequest]) -> Sequence[Completion]: ...


class EngineBackend:
    """`engine` is an `EngineClient`, or an `EnginePool` of several; `tokenizer` the judge model's (transformers fast or
    `tokenizers.Tokenizer`).

    `identity` names the model and its weights; pass a callable for a judge whose weights change (the policy itself).
    `max_prompt_tokens` is the engine's context length less one: longer prompts are answered with an error, unasked.
    `schemas`: the engine was started with structured output, so text queries are held to the schema they bring.
    """

    grain = 64  # the engine batches across calls; a call is only as large as its time-out should cover

    def __init__(
        self,
        engine: TierEngine,
        tokenizer: Any,
        identity: str | Callable[[], str],
        max_prompt_tokens: int | None = None,
        schemas: bool = False,
    ) -> None:
        self.concurrency = 16
        self._engine = engine
        self._encoder = PromptEncoder(tokenizer)
        self._identity = identity
        self._max_prompt_tokens = max_prompt_tokens
        self._schemas = schemas
        self._tier_ids: dict[tuple[str, ...], NDArray[np.int32]] = {}
        self.requests = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0

    @property
    def identity(self) -> str:
        return self._identity if isinstance(self._identity, str) else self._identity()

    async def tier_logprobs(self, queries: Sequence[TierQuery]) -> list[TierReply]:
        prompts = await asyncio.to_thread(self._encode, queries)
        replies: list[TierReply] = [TierReply(error="not asked")] * len(queries)
        due: list[int] = []
        asked: list[TokenTierQuery] = []
        for i, (query, prompt) in enumerate(zip(queries, prompts)):
            if self._max_prompt_tokens is not None and len(prompt) > self._max_prompt_tokens:
                reason = f"prompt too long: {len(prompt)} tokens, the judge reads {self._max_prompt_tokens}"
                replies[i] = TierReply(error=reason)
                continue
            due.append(i)
            asked.append(TokenTierQuery(prompt, self._tier_token_ids(query.tiers), _prefix(query)))
        rows = await self._engine.tier_logprobs(asked) if asked else []
        self._count([query.prompt_ids for query, row in zip(asked, rows) if row.logprobs is not None])
        if len(rows) != len(due):
            return replies[: len(rows)]  # a wrong number of answers: the judge sees it and repeats the call
        for i, row in zip(due, rows):
            if row.logprobs is None:
                replies[i] = TierReply(error=row.error or "the engine gave no log-probabilities")
            else:
                replies[i] = TierReply(logprobs=tuple(row.logprobs.tolist()))
        return replies

    async def complete(self, queries: Sequence[TextQuery]) -> list[TextReply]:
        prompts = await asyncio.to_thread(self._encode, queries)
        stop = (self._encoder.control_id("<|im_end|>"),)
        requests = [
            GenerateRequest(
                prompt,
                q.max_tokens,
                seed=q.draw,
                temperature=q.temperature,
                stop_token_ids=stop,
                json_schema=msgspec.json.encode(q.schema).decode() if self._schemas and q.schema is not None else "",
                prefix=_prefix(q),
            )
            for prompt, q in zip(prompts, queries)
        ]
        replies = []
        for prompt, done in zip(prompts, await self._engine.generate(requests)):
            if done.error is not None:
                replies.append(TextReply(error=done.error))
            else:
                self._count([prompt])
                self.completion_tokens += len(done.token_ids)
                replies.append(TextReply(text=self._encoder.decode(done.token_ids.tolist())))
        return replies

    def _count(self, prompts: Sequence[NDArray[np.int32]]) -> None:
        """Prompts that were answered; what the engine refused cost nothing."""
        self.requests += len(prompts)
        self.prompt_tokens += sum(map(len, prompts))

    def _encode(self, queries: Sequence[TierQuery | TextQuery]) -> list[NDArray[np.int32]]:
        return [np.array(ids, dtype=np.int32) for ids in self._encoder.encode_all([q.parts for q in queries])]

    def _tier_token_ids(self, tiers: tuple[str, ...]) -> NDArray[np.int32]:
        if tiers not in self._tier_ids:
            ids = [self._encoder.token_id(sign) for sign in tiers]
            if len(set(ids)) != len(ids):
                raise BadInput("tokenizer", " ".join(tiers), "two tier signs share one token")
            self._tier_ids[tiers] = np.array(ids, dtype=np.int32)
        return self._tier_ids[tiers]


def _prefix(query: TierQuery | TextQuery) -> int:
    """Names what the prompt shares with the other criteria of its answer; never 0."""
    return hash(tuple(part.text for part in query.parts if part.shared)) or 1
