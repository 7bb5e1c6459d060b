"""The two ways of asking in which the judge writes text: reasons before the verdict, or one call for all criteria.

The default way, one tier sign a criterion, is cheaper and gives a distribution. Reasoning first helps on criteria that
need work (counting, comparing with a reference); one call for all helps where calls cost more than tokens. Either can
be drawn several times; the median of the draws that could be read counts.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from math import log
from typing import Literal, NamedTuple

import msgspec

from megarubric.judging.parser import parse_all, parse_reasoned
from megarubric.judging.prompt import Part, Template, plain_text, render_all, render_tier, tier_tokens
from megarubric.judging.types import JudgeItem, TextQuery, TextReply, TierQuery, TierReply, content_hash
from megarubric.rubrics import Criterion

Mode = Literal["tier", "reason", "all"]


class Due(NamedTuple):
    """A criterion of an item that the judge model is to judge; `at` is the item's place in the call."""

    at: int
    item: JudgeItem
    criterion: Criterion


class Way(NamedTuple):
    """A way of asking the same: which draw, and whether the tiers are listed highest first."""

    draw: int = 0
    highest_first: bool = False

    def draws(self, count: int) -> list[Way]:
        """The `count` draws that this one is made up of."""
        return [self._replace(draw=self.draw * count + k) for k in range(count)]

    def order[T](self, texts: Sequence[T]) -> list[T]:
        return list(reversed(texts)) if self.highest_first else list(texts)

    def lowest_first(self, reply: TierReply, tiers: int) -> TierReply:
        """`reply` as if the tiers had been listed lowest first."""
        if not self.highest_first:
            return reply
        logprobs = None if reply.logprobs is None else tuple(reversed(reply.logprobs))
        return TierReply(logprobs, self.tier(reply.verdict, tiers), reply.error)

    def tier(self, listed: int | None, tiers: int) -> int | None:
        """The tier, counted from the lowest, that was listed at this place."""
        return tiers - 1 - listed if self.highest_first and listed is not None else listed


class Drawn(msgspec.Struct, frozen=True):
    """What several draws amount to: the median tier value, the entropy (nats) of the draws' tiers when there are
    several, or the reason why there is no value."""

    value: float | None
    entropy: float | None = None
    reason: str | None = None


def tier_texts(criterion: Criterion) -> list[str]:
    """What the judge reads for each tier, lowest first; a criterion without tiers is a no or a yes."""
    if not criterion.tiers:
        return ["No.", "Yes."]
    return [tier.text or f"(worth {tier.value:g})" for tier in criterion.tiers]


def tier_query(template: Template, due: Due, way: Way) -> TierQuery:
    """The question for one tier sign."""
    texts = way.order(tier_texts(due.criterion))
    reference = _reference(due)
    parts = render_tier(template, due.item.prompt, due.item.response, due.criterion.description, texts, reference)
    content = _content("tier", template, due, way, parts, due.criterion.id)
    return TierQuery(tuple(parts), tier_tokens(len(texts)), content, way.draw)


def reason_query(template: Template, due: Due, way: Way, max_tokens: int, temperature: float) -> TextQuery:
    """The question for reasons and then a verdict."""
    texts = way.order(tier_texts(due.criterion))
    reference = _reference(due)
    parts = render_tier(template, due.item.prompt, due.item.response, due.criterion.description, texts, reference)
    content = _content("reason", template, due, way, parts, due.criterion.id)
    return TextQuery(tuple(parts), content, max_tokens, temperature, way.draw)


def all_query(template: Template, dues: Sequence[Due], way: Way, max_tokens: int, temperature: float) -> TextQuery:
    """The question for all `dues`, which are criteria of one item."""
    first = dues[0]
    criteria = [(due.criterion.description, way.order(tier_texts(due.criterion))) for due in dues]
    reference = next((r for due in dues if (r := _reference(due)) is not None), None)
    parts = render_all(template, first.item.prompt, first.item.response, criteria, reference)
    content = _content("all", template, first, way, parts, *(due.criterion.id for due in dues))
    return TextQuery(tuple(parts), content, max_tokens, temperature, way.draw)


def read_reasoned(criterion: Criterion, replies: Sequence[TextReply], way: Way) -> Drawn:
    """The verdict of reasoned replies, one a draw."""
    signs = tier_tokens(len(criterion.tier_values))
    listed = [None if r.text is None else parse_reasoned(r.text, signs) for r in replies]
    tiers = [way.tier(place, len(signs)) for place in listed]
    return _median(criterion, tiers, replies)


def read_all(criteria: Sequence[Criterion], replies: Sequence[TextReply], way: Way) -> list[Drawn]:
    """One verdict a criterion of one-for-all replies, one reply a draw."""
    signs = [tier_tokens(len(c.tier_values)) for c in criteria]
    rows = [[None] * len(criteria) if r.text is None else parse_all(r.text, signs) for r in replies]
    return [_median(c, [way.tier(row[k], len(signs[k])) for row in rows], replies) for k, c in enumerate(criteria)]


def _median(criterion: Criterion, tiers: Sequence[int | None], replies: Sequence[TextReply]) -> Drawn:
    read = [tier for tier in tiers if tier is not None]
    if 2 * len(read) <= len(tiers):  # a majority must be readable: one lucky draw in five is no judgement
        error = next((r.error for r in replies if r.error is not None), None)
        said = next((r.text for r in replies if r.text is not None), "")
        return Drawn(None, reason=error or f"no verdict in the agreed form: {said[-80:]!r}")
    counts = Counter(read).values()
    entropy = -sum(n / len(read) * log(n / len(read)) for n in counts) + 0.0 if len(read) > 1 else None
    return Drawn(float(statistics.median(criterion.tier_values[tier] for tier in read)), entropy)


def _reference(due: Due) -> str | None:
    return due.item.rubric.reference if due.criterion.needs_reference else None


def _content(mode: Mode, template: Template, due: Due, way: Way, parts: Sequence[Part], *criteria: str) -> str:
    """The rendered prompt is hashed too: a later version that renders the same material otherwise asks anew."""
    item, order = due.item, "highest first" if way.highest_first else "lowest first"
    rendered = plain_text(parts)
    return content_hash(mode, order, template.hash, item.rubric.hash, item.prompt, item.response, rendered, *criteria)
