"""The judge: from answers and rubrics to one judgement a criterion.

Checks run in this process, stored judgements are used as given, everything else is asked of a judge model as a
distribution over tier signs (spec/reward.md). A judgement that fails, times out or cannot be read is masked and
counted: it never becomes a zero, and it never ends the run.
"""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Mapping, Sequence

import msgspec

from megarubric.errors import BadInput, ProcessDied
from megarubric.judging.prompt import Template, load_template, render_tier, tier_tokens
from megarubric.judging.types import JudgeItem, Judgement, TierBackend, TierQuery, TierReply, content_hash
from megarubric.reward.tiers import tier_expectation
from megarubric.rubrics import Criterion, Rubric
from megarubric.rubrics.checks import run_check

log = logging.getLogger(__name__)


class JudgeSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a judge is asked.

    `timeout_s` bounds one call to the backend (the backend says how many queries that is), counted from when it is its
    turn; `retries` says how often a failed call is repeated.
    """

    template: str = "tier"
    min_tier_mass: float = 0.5
    timeout_s: float = 120.0
    retries: int = 1


class JudgeStats(msgspec.Struct):
    """Running counts over a judge's life. `asked` = `read` + `unread`; `failures` counts the reasons of the unread."""

    checks: int = 0
    stored: int = 0
    asked: int = 0
    read: int = 0
    unread: int = 0
    calls: int = 0
    retried: int = 0
    failures: collections.Counter[str] = msgspec.field(default_factory=collections.Counter)

    @property
    def unread_fraction(self) -> float:
        """Share of the judge's judgements that could not be read, 0 when it was asked nothing."""
        return self.unread / self.asked if self.asked else 0.0


class Judge:
    """Judges answers with `backend`, or without one (None): then only checks and stored judgements count.

    Any number of `judge` calls may overlap on one event loop.
    """

    def __init__(self, backend: TierBackend | None, settings: JudgeSettings | None = None) -> None:
        self.backend = backend
        self.settings = settings or JudgeSettings()
        self.template: Template = load_template(self.settings.template)
        self.stats = JudgeStats()
        self._slots = asyncio.Semaphore(backend.concurrency if backend is not None else 1)

    async def judge(self, items: Sequence[JudgeItem]) -> list[dict[str, Judgement]]:
        """One judgement a criterion for every item, keyed by criterion id in the rubric's order.

        Raises BadInput for a stored judgement that does not fit the rubric, and ProcessDied when the judge's own engine
        process has ended; a judge that merely fails is masked.
        """
        results: list[dict[str, Judgement]] = []
        queries: dict[str, TierQuery] = {}  # by content: equal answers are judged once
        askers: dict[str, list[tuple[int, Criterion]]] = {}
        for i, item in enumerate(items):
            check_stored(item.rubric, item.stored)
            row: dict[str, Judgement] = {}
            for criterion in item.rubric.criteria:
                judgement = self._without_model(item, criterion)
                if judgement is None:
                    query = self._query(item, criterion)
                    queries[query.content] = query
                    askers.setdefault(query.content, []).append((i, criterion))
                    judgement = _masked(criterion, "not answered")  # keeps the place; replaced below
                row[criterion.id] = judgement
            results.append(row)
        for content, reply in zip(queries, await self._ask(list(queries.values()))):
            for i, criterion in askers[content]:
                results[i][criterion.id] = self._read(criterion, reply)
        return results

    def _without_model(self, item: JudgeItem, criterion: Criterion) -> Judgement | None:
        """The judgement when no judge model is needed for it, or cannot be asked; None when the model is due."""
        if item.stored is not None and criterion.id in item.stored:
            self.stats.stored += 1
            return judgement_of(criterion, item.stored[criterion.id], "stored")
        if criterion.check is not None:
            self.stats.checks += 1
            try:
                value = run_check(criterion.check, item.prompt, item.response, item.rubric)
            except Exception as error:  # a check that breaks on an odd text must not end the run
                log.warning("check %s of %s/%s failed: %s", criterion.check.kind, item.rubric.id, criterion.id, error)
                self.stats.failures["check failed"] += 1
                return _masked(criterion, f"check failed: {type(error).__name__}: {error}")
            return judgement_of(criterion, value, "check")
        if criterion.needs_reference and item.rubric.reference is None:
            return _masked(criterion, "needs a reference and the rubric has none")
        if self.backend is None:
            return _masked(criterion, "no judge")
        if len(criterion.tier_values) > 26:
            return _masked(criterion, f"{len(criterion.tier_values)} tiers, a judge is asked for at most 26")
        return None

    def _query(self, item: JudgeItem, criterion: Criterion) -> TierQuery:
        rubric = item.rubric
        reference = rubric.reference if criterion.needs_reference else None
        texts = tier_texts(criterion)
        parts = render_tier(self.template, item.prompt, item.response, criterion.description, texts, reference)
        content = content_hash(
            "tier", self.template.hash, rubric.hash, criterion.id, item.prompt, item.response, reference
        )
        return TierQuery(tuple(parts), tier_tokens(len(texts)), content)

    async def _ask(self, queries: list[TierQuery]) -> list[TierReply]:
        if not queries:
            return []
        assert self.backend is not None
        size = self.backend.grain
        chunks = [queries[i : i + size] for i in range(0, len(queries), size)]
        answered = await asyncio.gather(*(self._call(chunk) for chunk in chunks))
        return [reply for replies in answered for reply in replies]

    async def _call(self, queries: list[TierQuery]) -> list[TierReply]:
        """One reply a query whatever the backend does; ProcessDied passes."""
        assert self.backend is not None
        reason = ""
        for attempt in range(self.settings.retries + 1):
            self.stats.calls += 1
            self.stats.retried += attempt > 0
            try:
                async with self._slots:
                    replies = await asyncio.wait_for(self.backend.tier_logprobs(queries), self.settings.timeout_s)
            except ProcessDied:
                raise
            except TimeoutError:
                reason = f"timed out after {self.settings.timeout_s:g} s"
            except Exception as error:  # whatever a judge does, the run goes on
                reason = f"{type(error).__name__}: {error}"
            else:
                if len(replies) == len(queries):
                    return list(replies)
                reason = f"wrong number of answers: {len(replies)} for {len(queries)} questions"
            log.warning("judge call failed (attempt %d of %d): %s", attempt + 1, self.settings.retries + 1, reason)
        return [TierReply(error=reason)] * len(queries)

    def _read(self, criterion: Criterion, reply: TierReply) -> Judgement:
        """A reply as a judgement, masked when it cannot be read; counted either way."""
        judgement = self._interpret(criterion, reply)
        self.stats.asked += 1
        self.stats.read += judgement.read
        self.stats.unread += not judgement.read
        if judgement.reason is not None:
            self.stats.failures[judgement.reason.partition(":")[0]] += 1
        return judgement

    def _interpret(self, criterion: Criterion, reply: TierReply) -> Judgement:
        values = criterion.tier_values
        if reply.error is not None:
            return _masked(criterion, reply.error, "judge")
        if reply.verdict is not None:
            if not 0 <= reply.verdict < len(values):
                return _masked(criterion, f"verdict out of range: {reply.verdict}", "judge")
            return judgement_of(criterion, values[reply.verdict], "judge")
        logprobs = reply.logprobs
        if logprobs is None or len(logprobs) != len(values):
            return _masked(criterion, "wrong number of tier log-probabilities", "judge")
        low, high = values[0], values[-1]
        scores = [(value - low) / (high - low) for value in values]
        try:
            reading = tier_expectation(logprobs, scores, self.settings.min_tier_mass)
        except BadInput as error:
            return _masked(criterion, f"not log-probabilities: {error}", "judge")
        score, mass = reading.value.item(), reading.mass.item()
        if not reading.read:
            return _masked(criterion, f"low tier mass: {mass:.3g}", "judge", None, mass)
        value = low + score * (high - low)
        return Judgement(criterion.id, value, score, "judge", True, reading.entropy.item(), mass)


def tier_texts(criterion: Criterion) -> list[str]:
    """What the judge reads for each tier, lowest first; a criterion without tiers is a no or a yes."""
    if not criterion.tiers:
        return ["No.", "Yes."]
    return [tier.text or f"(worth {tier.value:g})" for tier in criterion.tiers]


def judgement_of(
    criterion: Criterion,
    value: float | None,
    source: str,
    entropy: float | None = None,
    tier_mass: float | None = None,
) -> Judgement:
    """A judgement that was read: `value` on the tier scale, None for not applicable."""
    score = None if value is None else normalise(criterion, value)
    return Judgement(criterion.id, value, score, source, True, entropy, tier_mass)  # type: ignore[arg-type]


def normalise(criterion: Criterion, value: float) -> float:
    """s = (v - vmin) / (vmax - vmin), spec/reward.md."""
    low, high = criterion.tier_values[0], criterion.tier_values[-1]
    return (value - low) / (high - low)


def check_stored(rubric: Rubric, stored: Mapping[str, float | None] | None) -> None:
    """Raises BadInput (naming rubric and criterion) unless every stored value is null or a finite number on the tier
    scale of a criterion of `rubric`."""
    if not stored:
        return
    criteria = {c.id: c for c in rubric.criteria}
    for name, value in stored.items():
        criterion = criteria.get(name)
        if criterion is None:
            raise BadInput(
                f"rubric {rubric.id}", name, "a judgement is stored for it, but the rubric has no such criterion"
            )
        if value is None:
            continue
        low, high = criterion.tier_values[0], criterion.tier_values[-1]
        slack = 1e-6 * (high - low)  # spec/reward.md: outside [0,1] by more than 1e-6 after normalising
        if isinstance(value, bool) or not isinstance(value, int | float) or not low - slack <= value <= high + slack:
            raise BadInput(
                f"rubric {rubric.id}", name, f"stored judgement {value!r} is not between {low:g} and {high:g}"
            )


def _masked(
    criterion: Criterion,
    reason: str,
    source: str = "none",
    entropy: float | None = None,
    tier_mass: float | None = None,
) -> Judgement:
    return Judgement(criterion.id, None, None, source, False, entropy, tier_mass, reason)  # type: ignore[arg-type]
