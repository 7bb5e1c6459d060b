"""A judge behind any OpenAI-compatible URL, asked over HTTP.

Chat completions with log-probabilities give the distribution over the tier signs; a server without that endpoint is
asked through plain completions; a server that returns no log-probabilities is read by its text (strict form, then a
JSON schema). One request a criterion, `concurrency` at a time, with retries, back-off, rate-limit headers and a budget.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import math
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

import httpx
import msgspec

from megarubric.errors import BadInput
from megarubric.judging.parser import parse_tier, parse_tier_json
from megarubric.judging.prompt import chat_messages, defang
from megarubric.judging.types import TextQuery, TextReply, TierQuery, TierReply

log = logging.getLogger(__name__)

_RETRY_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
_TOP_LOGPROBS = 20  # the most the API allows


class OpenAISettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where and how to ask.

    `url` is the API's base (``https://host/v1``; the ``/v1`` may be left out when there is no path). The key is read
    from the environment variable `key_env` and appears nowhere else. `timeout_s` bounds one request, `deadline_s` one
    query with its retries. `max_requests` and `max_tokens_total` are the budget (0: none); when it is spent the
    remaining queries are errors, unasked. After `give_up_after` failures in a row the server counts as down: for
    `cool_off_s` queries are errors at once, so a judge that hangs costs a run its judgements and not its hours.
    `prefill`: the server continues an unfinished assistant message (vLLM does), so one token answers.
    """

    url: str
    model: str
    key_env: str = "OPENAI_API_KEY"
    api: Literal["auto", "chat", "completions"] = "auto"
    prefill: bool = False
    concurrency: int = 16
    timeout_s: float = 60.0
    deadline_s: float = 110.0
    retries: int = 4
    backoff_s: float = 0.5
    max_backoff_s: float = 30.0
    max_requests: int = 0
    max_tokens_total: int = 0
    give_up_after: int = 32
    cool_off_s: float = 30.0
    answer_tokens: int = 12


class _Retry(Exception):
    """An attempt failed in a way that may pass; `after_s` is what the server asked for."""

    def __init__(self, reason: str, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.after_s = after_s


class _GiveUp(Exception):
    """An attempt failed in a way that will not pass."""


class OpenAIBackend:
    """See the module. Used from one event loop; `aclose` when done."""

    grain = 1

    def __init__(self, settings: OpenAISettings) -> None:
        if not settings.url.startswith(("http://", "https://")):
            raise BadInput("judge", settings.url, "a judge URL starts with http:// or https://")
        self.settings = settings
        self.concurrency = settings.concurrency
        self.requests = 0
        self.tokens = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.retried = 0
        key = os.environ.get(settings.key_env, "")
        self._client = httpx.AsyncClient(
            base_url=api_base(settings.url) + "/",
            timeout=settings.timeout_s,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=settings.concurrency),
        )
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._jitter = random.Random()  # spreads retries in time; touches no result
        self._resume_at = 0.0
        self._failed_in_a_row = 0
        self._down_until = 0.0
        self._completions = settings.api == "completions"
        self._schemas = True

    @property
    def identity(self) -> str:
        s = self.settings
        way = ("", "+prefill")[s.prefill] + ("", "+completions")[s.api == "completions"]
        return f"{url_identity(s.url)}{s.model}{way}"

    async def aclose(self) -> None:
        await self._client.aclose()

    async def tier_logprobs(self, queries: Sequence[TierQuery]) -> list[TierReply]:
        if len(queries) == 1:  # no task in between: the reply is in the caller's hands in the step that received it
            return [await self._query(queries[0])]
        return list(await asyncio.gather(*(self._query(query) for query in queries)))

    async def complete(self, queries: Sequence[TextQuery]) -> list[TextReply]:
        if len(queries) == 1:
            return [await self._text_query(queries[0])]
        return list(await asyncio.gather(*(self._text_query(query) for query in queries)))

    async def _query(self, query: TierQuery) -> TierReply:
        try:
            return await self._with_retries(lambda: self._ask(query))
        except _GiveUp as error:
            return TierReply(error=str(error))

    async def _text_query(self, query: TextQuery) -> TextReply:
        messages, _ = chat_messages(query.parts)
        body: dict[str, Any] = {"messages": messages, "max_tokens": query.max_tokens, "temperature": query.temperature}
        if query.temperature > 0:
            body["seed"] = query.draw
        if query.schema is not None and self._schemas:
            form = {"name": "reply", "strict": True, "schema": query.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        try:
            choice = await self._with_retries(lambda: self._post("chat/completions", body))
        except _GiveUp as error:
            if "response_format" in body and str(error).startswith(("HTTP 400", "HTTP 422", "HTTP 501")):
                log.warning("%s refuses structured output (%s): asking without", self.settings.url, error)
                self._schemas = False
                return await self._text_query(query)
            return TextReply(error=str(error))
        text = _field(choice, "message", "content")
        return (
            TextReply(text=text) if isinstance(text, str) else TextReply(error="unreadable reply: no message content")
        )

    async def _with_retries[R](self, attempt_once: Callable[[], Awaitable[R]]) -> R:
        """The result of the first attempt that succeeds. Raises _GiveUp."""
        s = self.settings
        reason = ""
        async with self._slots:
            if time.monotonic() < self._down_until:
                raise _GiveUp(f"judge is down: {self._failed_in_a_row} failures in a row")
            try:
                async with asyncio.timeout(s.deadline_s):
                    for attempt in range(s.retries + 1):
                        self.retried += attempt > 0
                        try:
                            result = await attempt_once()
                        except _Retry as error:
                            reason = f"{error} ({s.retries + 1} attempts)"
                            await self._back_off(attempt, error.after_s)
                        else:
                            self._failed_in_a_row = 0
                            return result
            except TimeoutError:
                reason = f"timed out after {s.deadline_s:g} s with retries"
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= s.give_up_after:  # each failure after a cool-off starts the next one
            self._down_until = time.monotonic() + s.cool_off_s
            log.warning("%s: %d failures in a row, left alone for %g s", s.url, self._failed_in_a_row, s.cool_off_s)
        raise _GiveUp(reason)

    async def _back_off(self, attempt: int, after_s: float | None) -> None:
        """Exponential back-off with full jitter; what the server asked for holds for all queries of this client."""
        if attempt >= self.settings.retries:
            return
        if after_s is not None:
            after_s = min(after_s, self.settings.deadline_s)
            self._resume_at = max(self._resume_at, time.monotonic() + after_s)
        ceiling = min(self.settings.max_backoff_s, self.settings.backoff_s * 2**attempt)
        await asyncio.sleep((after_s or 0.0) + self._jitter.uniform(0, ceiling))

    async def _ask(self, query: TierQuery) -> TierReply:
        if self._completions:
            return await self._ask_completions(query)
        messages, prefix = chat_messages(query.parts)
        body: dict[str, Any] = {"messages": messages, "logprobs": True, "top_logprobs": _TOP_LOGPROBS}
        body["max_tokens"] = self.settings.answer_tokens
        if self.settings.prefill:
            body["messages"] = [*messages, {"role": "assistant", "content": prefix}]
            body.update(max_tokens=1, add_generation_prompt=False, continue_final_message=True)
        try:
            choice = await self._post("chat/completions", body)
        except _GiveUp as error:
            if self.settings.api == "auto" and str(error).startswith(("HTTP 404", "HTTP 405", "HTTP 501")):
                log.warning("%s has no chat endpoint (%s): asking through completions", self.settings.url, error)
                self._completions = True
                return await self._ask_completions(query)
            if not str(error).startswith("HTTP 400"):
                raise
            choice = await self._post("chat/completions", _without_logprobs(body))  # some models refuse logprobs
        tokens = _field(choice, "logprobs", "content")
        text = _field(choice, "message", "content")
        if not isinstance(text, str):
            raise _Retry("unreadable reply: no message content")
        if isinstance(tokens, list) and tokens:
            return _from_tokens(tokens, query.tiers)
        verdict = parse_tier(text, query.tiers)
        if verdict is None:
            verdict = await self._ask_schema(messages, query.tiers)
        if verdict is None:
            return TierReply(error=f"no tier in the reply: {text[:80]!r}")
        return TierReply(verdict=verdict)

    async def _ask_schema(self, messages: list[dict[str, str]], tiers: tuple[str, ...]) -> int | None:
        """Ask once more with structured output; None when that is refused or not followed."""
        schema = {
            "type": "object",
            "properties": {"tier": {"type": "string", "enum": list(tiers)}},
            "required": ["tier"],
            "additionalProperties": False,
        }
        form = {"type": "json_schema", "json_schema": {"name": "tier", "strict": True, "schema": schema}}
        body = {"messages": messages, "max_tokens": self.settings.answer_tokens, "response_format": form}
        try:
            choice = await self._post("chat/completions", body)
        except _GiveUp:
            return None
        text = _field(choice, "message", "content")
        return parse_tier_json(text, tiers) if isinstance(text, str) else None

    async def _ask_completions(self, query: TierQuery) -> TierReply:
        prompt = "".join(p.text if p.trusted else defang(p.text) for p in query.parts)
        body = {"prompt": prompt, "max_tokens": 1, "logprobs": _TOP_LOGPROBS}
        choice = await self._post("completions", body)
        top = _field(choice, "logprobs", "top_logprobs")
        if not isinstance(top, list) or not top or not isinstance(top[0], dict):
            raise _GiveUp("no log-probabilities in the reply")
        return _from_top([(str(token), logprob) for token, logprob in top[0].items()], query.tiers)

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The reply's only choice. Raises _Retry or _GiveUp."""
        s = self.settings
        while (wait := self._resume_at - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        # Nothing is awaited between the check and the count: the number of requests is never exceeded. Tokens are known
        # when a reply has come, so requests under way may exceed theirs.
        if s.max_requests and self.requests >= s.max_requests:
            raise _GiveUp(f"budget spent: {s.max_requests} requests")
        if s.max_tokens_total and self.tokens >= s.max_tokens_total:
            raise _GiveUp(f"budget spent: {s.max_tokens_total} tokens")
        self.requests += 1
        try:
            response = await self._client.post(path, json={"model": s.model, "temperature": 0, **body})
        except httpx.TimeoutException as error:
            raise _Retry(f"timed out after {s.timeout_s:g} s") from error
        except httpx.HTTPError as error:
            raise _Retry(f"connection failed: {type(error).__name__}") from error
        self._note_limits(response)
        if response.status_code != 200:
            reason = f"HTTP {response.status_code}: {' '.join(response.text[:120].split())}"
            if response.status_code in _RETRY_STATUS:
                raise _Retry(reason, _retry_after(response.headers))
            raise _GiveUp(reason)
        try:
            reply = msgspec.json.decode(response.content)
        except msgspec.DecodeError as error:
            raise _Retry(f"unreadable reply: {error}") from error
        spent = _field(reply, "usage", "total_tokens")
        self.tokens += spent if isinstance(spent, int) else 0
        read, written = (_field(reply, "usage", name) for name in ("prompt_tokens", "completion_tokens"))
        self.prompt_tokens += read if isinstance(read, int) else 0
        self.completion_tokens += written if isinstance(written, int) else 0
        choices = _field(reply, "choices")
        if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
            raise _Retry("unreadable reply: no choices")
        if len(choices) != 1:
            raise _Retry(f"wrong number of answers: {len(choices)} for 1 question")
        choice: dict[str, Any] = choices[0]
        return choice

    def _note_limits(self, response: httpx.Response) -> None:
        """A server that says it has no requests or tokens left is left alone until it says it has."""
        for what in ("requests", "tokens"):
            if response.headers.get(f"x-ratelimit-remaining-{what}", "").strip() not in ("0", "0.0"):
                continue
            reset = _duration(response.headers.get(f"x-ratelimit-reset-{what}", "").strip())
            if reset is not None:
                self._resume_at = max(self._resume_at, time.monotonic() + min(reset, self.settings.deadline_s))


def _without_logprobs(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key not in ("logprobs", "top_logprobs")}


def _field(value: object, *path: str) -> Any:
    """Nested field of decoded JSON, None where any step is missing."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _from_tokens(tokens: list[Any], tiers: tuple[str, ...]) -> TierReply:
    """Find the token that is the verdict: the reply up to it is nothing, or the agreed ``Tier [``."""
    before = ""
    for at, entry in enumerate(tokens):
        token = _field(entry, "token")
        top = _field(entry, "top_logprobs")
        if not isinstance(token, str):
            break
        found = re.fullmatch(r"\s*(Tier\s*\[\s*)?", before) and token.strip() in tiers
        if found and isinstance(top, list) and not _goes_on(token, tokens[at + 1 :]):
            listed = [(_field(t, "token"), _field(t, "logprob")) for t in top] + [(token, _field(entry, "logprob"))]
            return _from_top([(t, x) for t, x in dict(listed).items() if isinstance(t, str)], tiers)
        before += token
    return TierReply(error=f"no tier in the reply: {before[:80]!r}")


def _goes_on(token: str, following: list[Any]) -> bool:
    """Whether what looks like a sign is the beginning of something else: 1 of ``10``, ``1.5`` or ``1/5``, A of
    ``All``."""
    rest = "".join(str(_field(entry, "token")) for entry in following[:2])
    return token == token.rstrip() and re.match(r"\w|[.,/:%]\s*\d", rest) is not None


def _from_top(top: list[tuple[str, Any]], tiers: tuple[str, ...]) -> TierReply:
    """Sum the listed tokens that spell a sign (with or without white space); a sign not listed has probability 0."""
    mass = dict.fromkeys(tiers, 0.0)
    for token, logprob in top:
        sign = token.strip()
        if sign in mass and isinstance(logprob, int | float) and logprob <= 1e-3:
            mass[sign] += math.exp(logprob)
    if not any(mass.values()):
        return TierReply(error="no tier among the listed tokens")
    return TierReply(logprobs=tuple(min(0.0, math.log(p)) if p > 0 else -math.inf for p in mass.values()))


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds of a Retry-After header, a number or an HTTP date, or of the finer ``retry-after-ms``."""
    finer = headers.get("retry-after-ms", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", finer):
        return float(finer) / 1000
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _duration(text: str) -> float | None:
    """Seconds of ``1s``, ``6m0s``, ``20ms`` or a plain number, None when it is something else. A number that can only
    be a time of day (some servers send the moment of the reset) counts from now."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "": 1.0}
    if not re.fullmatch(r"(?:\d+(?:\.\d+)?(?:ms|h|m|s))+|\d+(?:\.\d+)?", text):
        return None
    seconds = sum(float(number) * units[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)(ms|h|m|s|)", text))
    return seconds if seconds < 1e9 else max(0.0, seconds - time.time())


def api_base(url: str) -> str:
    """`url` without a slash at its end, and with ``/v1`` when it has no path of its own."""
    base = url.rstrip("/")
    return base if re.match(r"https?://[^/]+/", base) else base + "/v1"


def url_identity(url: str) -> str:
    """What the identities of all judges at `url` begin with; the model's name follows."""
    return f"openai:{api_base(url)}#"


def first_model(url: str, timeout_s: float = 10.0) -> str:
    """Id of the first model that the server at `url` serves, ``default`` when it does not say.

    Raises BadInput when nothing listens there.
    """
    try:
        response = httpx.get(api_base(url) + "/models", timeout=timeout_s)
        models = _field(msgspec.json.decode(response.content), "data")
    except (httpx.ConnectError, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise BadInput("judge", url, f"does not answer: {error}") from error
    except (httpx.HTTPError, msgspec.DecodeError):
        models = None
    name = _field(models[0], "id") if isinstance(models, list) and models else None
    if isinstance(name, str):
        return name
    log.warning("%s names no model: asking for the model called default", url)
    return "default"
