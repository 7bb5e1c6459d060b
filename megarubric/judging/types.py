"""What goes into a judge and what comes out, and the one interface that every judge model stands behind."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import msgspec

from megarubric.judging.prompt import Part

if TYPE_CHECKING:
    from megarubric.rubrics import Rubric

Source = Literal["check", "judge", "stored", "none"]


class Judgement(msgspec.Struct, frozen=True):
    """The judgement of one criterion.

    `value` is on the tier scale, `score` the same normalised to [0, 1]; both None when masked. `read` is False when the
    criterion should have a judgement and has none that can be used (`reason` says why); it is True for a stored "not
    applicable". `entropy` (nats) and `tier_mass` come from a tier distribution and are None otherwise.
    """

    criterion: str
    value: float | None
    score: float | None
    source: Source
    read: bool
    entropy: float | None = None
    tier_mass: float | None = None
    reason: str | None = None


class JudgeItem(msgspec.Struct, frozen=True):
    """One answer to judge by one rubric. `stored` holds judgements that are already there, on the criterion's own tier
    scale (None: judged and not applicable); `kept` those of an earlier run, whole, the unread ones included. Both are
    used as given and never judged again."""

    rubric: Rubric
    prompt: str
    response: str
    stored: Mapping[str, float | None] | None = None
    kept: Mapping[str, Judgement] | None = None


class TierQuery(msgspec.Struct, frozen=True):
    """A question for one tier sign: the prompt, which ends right before the sign, and the signs (lowest tier first).

    `content` is the hash of what the prompt was made from (rubric, criterion, prompt, response, template) and `draw`
    numbers repeated draws; together with the backend's identity they name the reply in a cache.
    """

    parts: tuple[Part, ...]
    tiers: tuple[str, ...]
    content: str
    draw: int = 0


class TierReply(msgspec.Struct, frozen=True):
    """A backend's answer to a `TierQuery`.

    `logprobs`: natural-log probabilities of the tier signs under the unrestricted distribution, one a tier (-inf for a
    sign the server did not list). `verdict`: index of the tier that was spelled out, from a server that gives no
    log-probabilities. `error`: why there is neither.
    """

    logprobs: tuple[float, ...] | None = None
    verdict: int | None = None
    error: str | None = None


class TextQuery(msgspec.Struct, frozen=True):
    """A question that is answered in text: reasons before a verdict, or all criteria at once. `draw` numbers repeated
    draws at a `temperature` above 0 and seeds them. `schema` is a JSON schema that the reply is held to where the
    backend can; it is a help to the model, and no promise to the reader of the reply."""

    parts: tuple[Part, ...]
    content: str
    max_tokens: int
    temperature: float = 0.0
    draw: int = 0
    schema: dict[str, Any] | None = None


class TextReply(msgspec.Struct, frozen=True):
    """The judge's text, or why there is none."""

    text: str | None = None
    error: str | None = None


class TierBackend(Protocol):
    """A judge model. One reply a query, in order. A backend may raise (the judge masks what it asked for and counts
    it), but reports what concerns a single query as that query's `TierReply.error`."""

    @property
    def identity(self) -> str:
        """The model and its version: replies under one identity are interchangeable."""
        ...

    @property
    def grain(self) -> int:
        """How many queries belong in one call: many for an engine that batches, 1 for HTTP, where each has its own
        time and is worth keeping at once."""
        ...

    @property
    def concurrency(self) -> int:
        """How many calls may be under way at a time."""
        ...

    async def tier_logprobs(self, queries: Sequence[TierQuery]) -> list[TierReply]: ...


@runtime_checkable
class TextBackend(Protocol):
    """A judge model that can write; what `TierBackend` says holds here too."""

    async def complete(self, queries: Sequence[TextQuery]) -> list[TextReply]: ...


def content_hash(*fields: str | None) -> str:
    """SHA-256 hex digest of a sequence of strings, unambiguous in where one ends and the next begins."""
    return hashlib.sha256(msgspec.json.encode(fields)).hexdigest()
