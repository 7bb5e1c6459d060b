"""A judge that only repeats what is stored: no model, no network, the same replies to the byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megarubric.judging.types import TierQuery, TierReply


class ReplayBackend:
    """Answers from `replies`, keyed by `TierQuery.content` and draw number; a query that is not there is an error."""

    grain = 256
    concurrency = 8

    def __init__(self, replies: Mapping[tuple[str, int], TierReply], identity: str) -> None:
        self._replies = replies
        self._identity = identity

    @property
    def identity(self) -> str:
        return self._identity

    async def tier_logprobs(self, queries: Sequence[TierQuery]) -> list[TierReply]:
        missing = TierReply(error="not in the stored judgements")
        return [self._replies.get((query.content, query.draw), missing) for query in queries]
