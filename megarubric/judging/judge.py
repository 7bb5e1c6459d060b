"""The judge: from answers and rubrics to one judgement a criterion.

Checks run in this process, stored judgements are used as given, everything else is asked of a judge model, by default
as a distribution over tier signs (spec/reward.md). A judgement that fails, times out or cannot be read is masked and
counted: it never becomes a zero, and it never ends the run.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import groupby

import msgspec

from megarubric.errors import BadInput, ProcessDied
from megarubric.judging.cache import JudgeCache
from megarubric.judging.calibration import Calibration
from megarubric.judging.modes import Drawn, Due, Mode, Way, all_query, read_all, read_reasoned, reason_query, tier_query
from megarubric.judging.prompt import Template, load_template
from megarubric.judging.settings import JudgeSettings
from megarubric.judging.types import (
    JudgeItem,
    Judgement,
    Source,
    TextBackend,
    TextQuery,
    TextReply,
    TierBackend,
    TierReply,
    content_hash,
)
from megarubric.reward.tiers import tier_expectation
from megarubric.rubrics import Criterion, Rubric
from megarubric.rubrics.checks import run_check
from megarubric.rubrics.parse import shown

log = logging.getLogger(__name__)
_MAX_TIERS = 26
_TOLD = ("asked", "unread", "calls", "retried", "escalated")


class JudgeStats(msgspec.Struct):
    """Running counts over a judge's life. `asked` = `read` + `unread`; `failures` counts the reasons of the unread."""

    checks: int = 0
    stored: int = 0
    asked: int = 0
    read: int = 0
    unread: int = 0
    calls: int = 0
    retried: int = 0
    escalated: int = 0
    failures: collections.Counter[str] = msgspec.field(default_factory=collections.Counter)

    @property
    def unread_fraction(self) -> float:
        """Share of the judge's judgements that could not be read, 0 when it was asked nothing."""
        return self.unread / self.asked if self.asked else 0.0


class Judge:
    """Judges answers with `backend`, or without one (None): then only checks and stored judgements count.

    `second` is asked again where `backend` is unsure; `calibration` corrects the scores of `backend` and leaves those
    of `second`, for which it was not fitted, as they are. The modes that write need a backend that can
    (`TextBackend`). Any number of `judge` calls may overlap on one event loop. Raises BadInput when a template or a
    backend does not fit what the settings ask of it.
    """

    def __init__(
        self,
        backend: TierBackend | None,
        settings: JudgeSettings | None = None,
        *,
        second: TierBackend | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        self.backend = backend
        self.second = second
        self.calibration = calibration
        self.settings = settings or JudgeSettings()
        self.cache: JudgeCache | None = None  # where the backends keep replies; looked at for its hit rate only
        self.stats = JudgeStats()
        self._told = dict.fromkeys(_TOLD, 0)
        self.templates = load_templates(self.settings)
        self._slots = {id(b): asyncio.Semaphore(b.concurrency) for b in (backend, second) if b is not None}
        for b in (backend, second):
            if b is not None and self.settings.writes and not isinstance(b, TextBackend):
                raise BadInput("judge", b.identity, f"cannot write text, which mode {min(self.settings.writes)} needs")

    @property
    def asked(self) -> str:
        """Digest of how the first judge is asked: templates, modes, draws, sampling. A calibration holds for one."""
        s = self.settings
        templates = [self.templates[mode].hash for mode in sorted({s.mode, *s.modes.values()})]
        modes = [f"{glob} {mode}" for glob, mode in s.modes.items()]
        return content_hash(*templates, s.mode, *modes, str(s.draws), repr(s.temperature), str(s.max_tokens))[:16]

    def metrics(self) -> dict[str, float]:
        """What has happened since this was last called, by the names of metrics.jsonl; the cache's hit rate is that of
        the whole process."""
        now = {name: getattr(self.stats, name) for name in _TOLD}
        values = {f"judge/{name}": float(now[name] - self._told[name]) for name in _TOLD}
        self._told = now
        if self.cache is not None:
            values |= {"judge/cache_hit_rate": self.cache.hit_rate, "judge/cache_mb": self.cache.size / 1e6}
        return values

    async def judge(
        self, items: Sequence[JudgeItem], *, draw: int = 0, highest_first: bool = False
    ) -> list[dict[str, Judgement]]:
        """One judgement a criterion for every item, keyed by criterion id in the rubric's order.

        `draw` asks the same anew (a cache holds every draw by itself); `highest_first` lists the tiers the other way
        round, which should change nothing. Both are for examining a judge.

        Raises BadInput for a stored judgement that does not fit the rubric, and ProcessDied when the judge's own engine
        process has ended; a judge that merely fails is masked.
        """
        results: list[dict[str, Judgement]] = []
        due: dict[Mode, list[Due]] = {"tier": [], "reason": [], "all": []}
        for i, item in enumerate(items):
            check_stored(item.rubric, item.stored)
            check_stored(item.rubric, None if item.kept is None else {k: j.value for k, j in item.kept.items()})
            row: dict[str, Judgement] = {}
            for criterion in item.rubric.criteria:
                judgement = self._without_model(item, criterion)
                if judgement is None:
                    due[self.settings.mode_of(item.rubric, criterion)].append(Due(i, item, criterion))
                    judgement = _masked(criterion, "not answered")  # keeps the place; replaced below
                row[criterion.id] = judgement
            results.append(row)
        way = Way(draw, highest_first)
        answered = await asyncio.gather(*(self._judged(mode, dues, way) for mode, dues in due.items()))
        for d, judgement in (pair for pairs in answered for pair in pairs):
            results[d.at][d.criterion.id] = self._counted(judgement)
        return results

    def _without_model(self, item: JudgeItem, criterion: Criterion) -> Judgement | None:
        """The judgement when no judge model is needed for it, or cannot be asked; None when the model is due."""
        if item.kept is not None and criterion.id in item.kept:
            self.stats.stored += 1
            return item.kept[criterion.id]
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
        if len(criterion.tier_values) > _MAX_TIERS:
            return _masked(criterion, f"{len(criterion.tier_values)} tiers, a judge is asked for at most {_MAX_TIERS}")
        return None

    # --- the three ways of asking -------------------------------------------------------------------------------

    async def _judged(self, mode: Mode, due: Sequence[Due], way: Way) -> list[tuple[Due, Judgement]]:
        """The judgements of `due` by the first judge, or by the second where the first is unsure."""
        ask = {"tier": self._by_tier, "reason": self._by_reason, "all": self._by_all}[mode]
        if not due or self.backend is None:
            return []
        judged = await ask(self.backend, due, way)
        again: dict[tuple[int, str], Judgement] = {}
        if self.second is not None and (unsure := [d for d, j in judged if self._unsure(d.criterion, mode, j)]):
            self.stats.escalated += len(unsure)
            again = {(d.at, d.criterion.id): j for d, j in await ask(self.second, unsure, way) if j.read}
        return [(d, again.get((d.at, d.criterion.id)) or self._calibrated(d, j)) for d, j in judged]

    async def _by_tier(self, backend: TierBackend, due: Sequence[Due], way: Way) -> list[tuple[Due, Judgement]]:
        template = self.templates["tier" if backend is self.backend else "second"]
        asked = [tier_query(template, d, way) for d in due]
        distinct = {q.content: q for q in asked}  # equal answers are judged once
        replies = await self._ask(backend, list(distinct.values()), backend.tier_logprobs, lambda e: TierReply(error=e))
        by_content = dict(zip(distinct, replies))
        return [
            (d, self._read_tier(d.criterion, way.lowest_first(by_content[q.content], len(q.tiers))))
            for d, q in zip(due, asked)
        ]

    async def _by_reason(self, backend: TierBackend, due: Sequence[Due], way: Way) -> list[tuple[Due, Judgement]]:
        s, template = self.settings, self.templates["reason"]
        draws = [[reason_query(template, d, w, s.max_tokens, s.temperature) for w in way.draws(s.draws)] for d in due]
        replies = await self._ask_text(backend, draws)
        return [(d, _drawn(d.criterion, read_reasoned(d.criterion, r, way))) for d, r in zip(due, replies)]

    async def _by_all(self, backend: TierBackend, due: Sequence[Due], way: Way) -> list[tuple[Due, Judgement]]:
        s, template = self.settings, self.templates["all"]
        groups = [list(group) for _, group in groupby(due, key=lambda d: d.at)]
        draws = [[all_query(template, g, w, s.max_tokens, s.temperature) for w in way.draws(s.draws)] for g in groups]
        out = []
        for group, replies in zip(groups, await self._ask_text(backend, draws)):
            criteria = [d.criterion for d in group]
            out += [(d, _drawn(d.criterion, drawn)) for d, drawn in zip(group, read_all(criteria, replies, way))]
        return out

    async def _ask_text(self, backend: TierBackend, draws: Sequence[Sequence[TextQuery]]) -> list[list[TextReply]]:
        """The replies to each list of draws."""
        assert isinstance(backend, TextBackend)
        distinct = {(q.content, q.draw): q for row in draws for q in row}
        replies = await self._ask(backend, list(distinct.values()), backend.complete, lambda e: TextReply(error=e))
        by_content = dict(zip(distinct, replies))
        return [[by_content[q.content, q.draw] for q in row] for row in draws]

    async def _ask[Q, R](
        self,
        backend: TierBackend,
        queries: Sequence[Q],
        method: Callable[[Sequence[Q]], Awaitable[list[R]]],
        failed: Callable[[str], R],
    ) -> list[R]:
        """One reply a query whatever the backend does. Only ProcessDied passes, and BadInput: a judge that cannot be
        asked at all (its vocabulary has no such sign) would otherwise be a run without a single judgement."""
        chunks = [queries[i : i + backend.grain] for i in range(0, len(queries), backend.grain)]

        async def call(chunk: Sequence[Q]) -> list[R]:
            reason = ""
            for attempt in range(self.settings.retries + 1):
                self.stats.calls += 1
                self.stats.retried += attempt > 0
                try:
                    async with self._slots[id(backend)]:
                        replies = await asyncio.wait_for(_as_coroutine(method(chunk)), self.settings.timeout_s)
                except (ProcessDied, BadInput):
                    raise
                except TimeoutError:
                    reason = f"timed out after {self.settings.timeout_s:g} s"
                except Exception as error:  # whatever a judge does, the run goes on
                    reason = f"{type(error).__name__}: {error}"
                else:
                    if len(replies) == len(chunk):
                        return list(replies)
                    reason = f"wrong number of answers: {len(replies)} for {len(chunk)} questions"
                log.warning("judge call failed (attempt %d of %d): %s", attempt + 1, self.settings.retries + 1, reason)
            return [failed(reason) for _ in chunk]

        return [reply for replies in await asyncio.gather(*map(call, chunks)) for reply in replies]

    # --- from replies to judgements -----------------------------------------------------------------------------

    def _read_tier(self, criterion: Criterion, reply: TierReply) -> Judgement:
        values = criterion.tier_values
        if reply.error is not None:
            return _masked(criterion, reply.error, "judge")
        if reply.verdict is not None:
            if not 0 <= reply.verdict < len(values):
                return _masked(criterion, f"verdict out of range: {reply.verdict}", "judge")
            return judgement_of(criterion, values[reply.verdict], "judge")
        if reply.logprobs is None or len(reply.logprobs) != len(values):
            return _masked(criterion, "wrong number of tier log-probabilities", "judge")
        low, high = values[0], values[-1]
        scores = [normalise(criterion, value) for value in values]
        try:
            reading = tier_expectation(reply.logprobs, scores, self.settings.min_tier_mass)
        except BadInput as error:
            return _masked(criterion, f"not log-probabilities: {error}", "judge")
        score, mass = reading.value.item(), reading.mass.item()
        if not reading.read:
            return _masked(criterion, f"low tier mass: {mass:.3g}", "judge", mass)
        value = low + score * (high - low)
        return Judgement(criterion.id, value, score, "judge", True, reading.entropy.item(), mass)

    def _unsure(self, criterion: Criterion, mode: Mode, judgement: Judgement) -> bool:
        if judgement.score is None:
            return True
        outcomes = len(criterion.tier_values)
        if mode != "tier":
            outcomes = min(outcomes, self.settings.draws)  # so many draws cannot be spread wider
        return judgement.entropy is not None and judgement.entropy > self.settings.escalate_above * math.log(outcomes)

    def _calibrated(self, due: Due, judgement: Judgement) -> Judgement:
        if self.calibration is None or judgement.score is None:
            return judgement
        score = self.calibration.score(due.item.rubric.id, due.criterion.id, judgement.score)
        low, high = due.criterion.tier_values[0], due.criterion.tier_values[-1]
        return msgspec.structs.replace(judgement, score=score, value=low + score * (high - low))

    def _counted(self, judgement: Judgement) -> Judgement:
        self.stats.asked += 1
        self.stats.read += judgement.read
        self.stats.unread += not judgement.read
        if judgement.reason is not None:
            self.stats.failures[_kind(judgement.reason)] += 1
        return judgement


def load_templates(settings: JudgeSettings) -> dict[str, Template]:
    """The templates by use: ``tier``, ``second``, ``reason``, ``all``. Raises BadInput for a file that is no template,
    or one of the other kind (a list of criteria where one is asked about)."""
    names = {
        "tier": settings.template,
        "second": settings.second_template or settings.template,
        "reason": settings.reason_template,
        "all": settings.all_template,
    }
    templates = {use: load_template(name) for use, name in names.items()}
    for use, template in templates.items():
        if template.lists_all != (use == "all"):
            wanted = "{{criteria}}" if use == "all" else "{{criterion}} and {{tiers}}"
            raise BadInput(f"template {names[use]}", None, f"cannot be the template of mode {use}: needs {wanted}")
    return templates


async def _as_coroutine[T](awaitable: Awaitable[T]) -> T:
    return await awaitable


def judgement_of(criterion: Criterion, value: float | None, source: Source, entropy: float | None = None) -> Judgement:
    """A judgement that was read: `value` on the tier scale, None for not applicable."""
    score = None if value is None else normalise(criterion, value)
    return Judgement(criterion.id, None if value is None else float(value), score, source, True, entropy)


def normalise(criterion: Criterion, value: float) -> float:
    """s = (v - vmin) / (vmax - vmin), spec/reward.md."""
    low, high = criterion.tier_values[0], criterion.tier_values[-1]
    return (value - low) / (high - low)


def check_stored(rubric: Rubric, stored: Mapping[str, float | None] | None) -> None:
    """Raises BadInput (naming rubric and criterion) unless every stored value is null or a finite number on the tier
    scale of a criterion of `rubric`."""
    for name, value in (stored or {}).items():
        criterion = next((c for c in rubric.criteria if c.id == name), None)
        if criterion is None:
            raise BadInput(f"rubric {rubric.id}", name, "a stored judgement, but the rubric has no such criterion")
        if value is None:
            continue
        low, high = criterion.tier_values[0], criterion.tier_values[-1]
        slack = 1e-6 * (high - low)  # spec/reward.md: outside [0,1] by more than 1e-6 after normalising
        if isinstance(value, bool) or not isinstance(value, int | float) or not low - slack <= value <= high + slack:
            raise BadInput(
                f"rubric {rubric.id}", name, f"stored judgement {shown(value)} is not between {low:g} and {high:g}"
            )


def _kind(reason: str) -> str:
    """What sort of failure it is: the reason without its particulars."""
    return re.sub(r"\d+", "#", reason.partition(":")[0])


def _drawn(criterion: Criterion, drawn: Drawn) -> Judgement:
    if drawn.value is None:
        return _masked(criterion, drawn.reason or "unread", "judge")
    return judgement_of(criterion, drawn.value, "judge", drawn.entropy)


def _masked(criterion: Criterion, reason: str, source: Source = "none", tier_mass: float | None = None) -> Judgement:
    return Judgement(criterion.id, None, None, source, False, None, tier_mass, reason)
