"""The models of a synthesis run, every reply of theirs written to the journal and counted."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from megarubric.config.judge import is_url
from megarubric.errors import BadInput
from megarubric.judging.backends import backend_for_engine
from megarubric.judging.backends.openai import OpenAIBackend, OpenAISettings, first_model
from megarubric.judging.opening import EngineFactory, template_for
from megarubric.judging.prompt import Part
from megarubric.judging.types import TextQuery, TextReply, TierQuery, TierReply, content_hash
from megarubric.rubrics.synthesis.costs import Spent
from megarubric.rubrics.synthesis.journal import Entry, Journal
from megarubric.rubrics.synthesis.prompts import Segment

# A reply that says this about a single prompt would say it again: asking anew does not help.
HOPELESS = ("prompt of ", "prompt too long", "HTTP 400", "HTTP 413", "HTTP 422")

_EMPTY_REASONING = re.compile(r"<think>\s*</think>\s*\Z")


class Unreached(Exception):
    """A model could not be asked (down, budget spent, time out): the prompt is left for the next run."""


class Refused(Exception):
    """A model cannot answer this prompt, and would not on another day."""


class Backend(Protocol):
    """What both judge backends are: they read tiers, write text, and count."""

    requests: int
    prompt_tokens: int
    completion_tokens: int

    @property
    def identity(self) -> str: ...

    @property
    def grain(self) -> int: ...

    @property
    def concurrency(self) -> int: ...

    async def tier_logprobs(self, queries: Sequence[TierQuery]) -> list[TierReply]: ...

    async def complete(self, queries: Sequence[TextQuery]) -> list[TextReply]: ...


@dataclass(frozen=True, slots=True)
class Model:
    """An open model: `name` is what provenance calls it, `judge_template` what suits it as a judge. `reasons`: its chat
    template knows reasoning, so the empty reasoning that ends our templates is what makes it answer at once."""

    backend: Backend
    name: str
    judge_template: str
    reasons: bool = True


@dataclass(frozen=True, slots=True)
class Limits:
    """Of every endpoint: requests and tokens it may be asked for (0: any number), requests at once, and the seconds one
    request may take, a draft being long."""

    max_requests: int = 0
    max_tokens_total: int = 0
    concurrency: int = 16
    timeout_s: float = 300.0
    retries: int = 4
    backoff_s: float = 0.5


@contextlib.asynccontextmanager
async def open_models(
    roles: Mapping[str, str], engine_factory: EngineFactory, limits: Limits
) -> AsyncIterator[dict[str, Model]]:
    """The models by role; two roles that name the same directory or URL share one engine or client. `engine_factory`
    starts engines with structured output.

    Raises BadInput for a name that is neither, and for an endpoint where nothing listens.
    """
    async with contextlib.AsyncExitStack() as stack:
        opened: dict[str, Model] = {}
        names = {role: spec if is_url(spec) else str(Path(spec).resolve()) for role, spec in roles.items()}
        for role, spec in names.items():
            if spec in opened:
                continue
            if is_url(spec):
                opened[spec] = _remote(spec, role, limits, stack)
            else:
                directory = checked_directory(spec, role)
                engine = await stack.enter_async_context(engine_factory(directory, "cpu"))
                backend = backend_for_engine(engine, directory, schemas=True)
                name = directory.resolve().name
                opened[spec] = Model(backend, name, template_for(spec), _reasons(directory))
        yield {role: opened[spec] for role, spec in names.items()}


def checked_directory(spec: str, role: str) -> Path:
    """The model directory that `spec` names. Raises BadInput."""
    if not (Path(spec) / "config.json").is_file():
        raise BadInput("command line", f"--{role} {spec}", "is neither a URL nor a model directory with config.json")
    return Path(spec)


def _reasons(directory: Path) -> bool:
    files = (directory / name for name in ("chat_template.jinja", "tokenizer_config.json"))
    return any("<think>" in file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file())


def _remote(spec: str, role: str, limits: Limits, stack: contextlib.AsyncExitStack) -> Model:
    url, _, name = spec.partition("#")
    name = name or first_model(url)
    backend = OpenAIBackend(
        OpenAISettings(
            url=url,
            model=name,
            concurrency=limits.concurrency,
            timeout_s=limits.timeout_s,
            deadline_s=2 * limits.timeout_s,
            retries=limits.retries,
            backoff_s=limits.backoff_s,
            max_requests=limits.max_requests,
            max_tokens_total=limits.max_tokens_total,
        )
    )
    stack.push_async_callback(backend.aclose)
    return Model(backend, name, "tier")


class Ledger:
    """What the backends spent, and since when it was last written down."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        self._backends = {id(m.backend): m.backend for m in models.values()}.values()
        self._written: dict[str, Spent] = {}

    def now(self) -> dict[str, Spent]:
        """Spent by this process, by model identity."""
        total: dict[str, Spent] = {}
        for b in self._backends:  # two clients may ask one model
            spent = Spent(b.requests, b.prompt_tokens, b.completion_tokens)
            total[b.identity] = total.get(b.identity, Spent()) + spent
        return {identity: spent for identity, spent in total.items() if spent}

    def take(self) -> dict[str, Spent]:
        """Spent since the last call."""
        now = self.now()
        fresh = {identity: spent - self._written.get(identity, Spent()) for identity, spent in now.items()}
        self._written.update(now)
        return {identity: spent for identity, spent in fresh.items() if spent}


class Recorded:
    """A backend that takes replies from the journal and writes new ones there; a reply that is an error is not kept.

    It stands behind the judge as behind the drafting, one a prompt.
    """

    def __init__(self, model: Model, journal: Journal, ledger: Ledger, prompt: str, stage: str = "judge") -> None:
        backend = model.backend
        self._model, self._backend, self._journal, self._ledger = model, backend, journal, ledger
        self._prompt, self._stage = prompt, stage
        self.grain, self.concurrency = backend.grain, backend.concurrency

    @property
    def identity(self) -> str:
        return self._backend.identity

    async def tier_logprobs(self, queries: Sequence[TierQuery]) -> list[TierReply]:
        keys = [content_hash(self.identity, q.content, *q.tiers, str(q.draw)) for q in queries]
        return await self._recorded(keys, queries, self._backend.tier_logprobs, TierReply, self._stage)

    async def complete(self, queries: Sequence[TextQuery]) -> list[TextReply]:
        keys = [
            content_hash(self.identity, q.content, "text", str(q.max_tokens), repr(q.temperature), str(q.draw))
            for q in queries
        ]
        return await self._recorded(keys, queries, self._backend.complete, TextReply, self._stage)

    async def ask(
        self,
        stage: str,
        prompts: Sequence[list[Segment]],
        *,
        max_tokens: int,
        temperature: float,
        draws: Sequence[int],
        schema: dict[str, Any] | None = None,
    ) -> list[str]:
        """The texts written for `prompts`, the i-th as draw `draws[i]`. Raises Unreached or Refused."""
        if not self._model.reasons:
            prompts = [without_reasoning(segments) for segments in prompts]
        queries = [
            TextQuery(
                tuple(Part(s.text, s.trusted) for s in segments),
                hashlib.sha256(msgspec.json.encode(segments)).hexdigest(),
                max_tokens,
                temperature,
                draw,
                schema,
            )
            for segments, draw in zip(prompts, draws)
        ]
        tap = Recorded(self._model, self._journal, self._ledger, self._prompt, stage)
        replies = await tap.complete(queries)
        if len(replies) != len(queries):
            raise Unreached(f"wrong number of answers: {len(replies)} for {len(queries)} questions")
        for reply in replies:
            if reply.error is not None:
                raise (Refused if reply.error.startswith(HOPELESS) else Unreached)(reply.error)
        return [reply.text or "" for reply in replies]

    async def _recorded[Q, R: (TierReply, TextReply)](
        self, keys: Sequence[str], queries: Sequence[Q], ask: Any, kind: type[R], stage: str
    ) -> list[R]:
        replies: list[R | None] = []
        for key in keys:
            known = self._journal.get(key)
            replies.append(None if known is None else msgspec.convert(known, kind))
        due = [i for i, reply in enumerate(replies) if reply is None]

        async def call(some: Sequence[int]) -> None:
            fresh: list[R] = await ask([queries[i] for i in some])
            for i, reply in zip(some, fresh):
                replies[i] = reply
                if reply.error is None:
                    self._journal.put(Entry(keys[i], stage, self._prompt, plain_reply(reply), self._ledger.take()))

        # As small as the backend likes its calls, so that what has come is written down at once.
        await asyncio.gather(*(call(due[i : i + self.grain]) for i in range(0, len(due), self.grain)))
        return [reply for reply in replies if reply is not None]


def without_reasoning(segments: list[Segment]) -> list[Segment]:
    """The prompt without the empty reasoning at its end."""
    last = segments[-1]
    return [*segments[:-1], last._replace(text=_EMPTY_REASONING.sub("", last.text))] if last.trusted else segments


def plain_reply(reply: TierReply | TextReply) -> dict[str, Any]:
    """The fields that are set, in plain data; JSON has no minus infinity, so a sign that was not listed is -1e9."""
    tree = {k: v for k, v in msgspec.to_builtins(reply).items() if v is not None}
    if "logprobs" in tree:
        tree["logprobs"] = [max(x, -1e9) for x in tree["logprobs"]]
    return tree
