"""From names to a running judge: which backend, which template, cache or replay, calibration.

A judge is named by a model directory (an engine serves it), by the URL of an OpenAI-compatible server (``#`` and the
model's name behind it where the server has several), or ``none``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from megarubric.config.judge import is_url
from megarubric.errors import BadInput
from megarubric.judging.backends import (
    Dtype,
    backend_for_engine,
    backend_for_url,
    context_length,
    model_identity,
    serving_dtype,
)
from megarubric.judging.backends.engine import TierEngine
from megarubric.judging.backends.openai import url_identity
from megarubric.judging.cache import CachedBackend, JudgeCache
from megarubric.judging.calibration import Calibration
from megarubric.judging.judge import Judge
from megarubric.judging.modes import Mode
from megarubric.judging.settings import JudgeSettings
from megarubric.judging.types import TierBackend

Device = Literal["cpu", "cuda"]
EngineFactory = Callable[[Path, Device], AbstractAsyncContextManager[TierEngine]]
_SMALL_CONTEXT = 2048  # a model that reads fewer tokens gets the compact template


@dataclass(frozen=True, slots=True)
class JudgeUse:
    """Which judge, and how it is used by a verb.

    `judge` and `second` are names (see above). `engine_factory` starts an engine for a model directory, which is served
    in `dtype` (None: `serving_dtype`). `settings` None takes the template that fits the judge's context. `cache` keeps
    the judgements; with `replay_only` they are all there is, and the names only say whose to read. The budget holds for
    each URL.
    """

    judge: str = "none"
    device: Device = "cpu"
    engine_factory: EngineFactory | None = None
    settings: JudgeSettings | None = None
    cache: Path | None = None
    replay_only: bool = False
    second: str | None = None
    calibration: Path | None = None
    concurrency: int = 16
    max_requests: int = 0
    max_total_tokens: int = 0
    dtype: Dtype | None = None


@contextlib.asynccontextmanager
async def open_judge(use: JudgeUse) -> AsyncIterator[Judge]:
    """The judge, running; on exit it ends, and what is worth saying about it is said on standard error."""
    settings = use.settings or JudgeSettings(template=template_for(use.judge))
    async with contextlib.AsyncExitStack() as stack:
        cache = None
        if use.cache is not None:
            cache = JudgeCache(use.cache)
            stack.callback(cache.close)
        first: TierBackend | None
        second: TierBackend | None
        if use.replay_only:
            if cache is None:
                raise BadInput("command line", "--replay-only", "needs --cache")
            first = replayed(cache, use.judge, use.dtype)
            second = None if use.second is None else replayed(cache, use.second, use.dtype)
        else:
            first = await stack.enter_async_context(_backend(use.judge, use, settings))
            second = None
            if use.second is not None:
                if first is None:
                    raise BadInput("command line", f"--second-judge {use.second}", "there is no first: --judge is none")
                second = await stack.enter_async_context(_backend(use.second, use, settings))
        judge = assembled(first, second, settings, cache, use.calibration)
        yield judge
        if judge.stats.failures:
            reasons = ", ".join(f"{n} {reason}" for reason, n in judge.stats.failures.most_common(5))
            print(f"unread judgements: {reasons}", file=sys.stderr)
        if judge.stats.escalated:
            print(f"second judge: asked {judge.stats.escalated} of {judge.stats.asked}", file=sys.stderr)
        if cache is not None:
            s = cache.stats()
            size = f"{s.entries} judgements, {s.bytes / 1e6:.1f} MB"
            print(f"cache {use.cache}: {size}, hit rate {s.hit_rate:.0%}", file=sys.stderr)
            if use.replay_only and s.misses and not s.hits:
                print("nothing was found: a replay needs the same template, mode and judge as before", file=sys.stderr)


def assembled(
    first: TierBackend | None,
    second: TierBackend | None,
    settings: JudgeSettings,
    cache: JudgeCache | None,
    calibration: Path | None,
) -> Judge:
    """The judge made of these parts. Raises BadInput when a template, or the calibration, is not for it."""
    first, second = (
        CachedBackend(b, cache) if b is not None and cache is not None and not isinstance(b, CachedBackend) else b
        for b in (first, second)
    )
    judge = Judge(first, settings, second=second)
    judge.cache = cache
    if calibration is not None and first is not None:
        judge.calibration = Calibration.load(calibration, first.identity, judge.asked)
    return judge


def replayed(cache: JudgeCache, name: str, dtype: Dtype | None = None) -> CachedBackend:
    """The judge called `name` as far as `cache` remembers it; nothing is started or asked. An identity as the cache
    itself writes it is a name too, and ``none`` is whoever is alone in it.

    Raises BadInput unless exactly one judge fits, with the names of those that are there.
    """
    held = cache.judges()
    if name == "none" or name in held:
        fits = held if name == "none" else [name]
    elif is_url(name):
        base, _, model = name.partition("#")
        begin = url_identity(base)
        fits = [i for i in held if i.startswith(begin) and (not model or i[len(begin) :].partition("+")[0] == model)]
    else:
        directory = Path(name)
        begin = model_identity(directory, dtype or "") if directory.is_dir() else name
        fits = [i for i in held if i.startswith(begin)]
    if len(fits) != 1:
        there = ", ".join(fits or held)
        what = f"holds judgements of several judges: {there}" if fits else f"holds none of {name}, only of {there}"
        raise BadInput(cache.path, None, f"{what}; a replay needs those of one" if held else "holds no judgements")
    return CachedBackend(None, cache, identity=fits[0])


def template_for(judge: str) -> str:
    """The compact template for a model directory with a short context, else the full one."""
    if judge == "none" or is_url(judge) or not (Path(judge) / "config.json").is_file():
        return "tier"
    context = context_length(Path(judge))
    return "tier_compact" if context is not None and context < _SMALL_CONTEXT else "tier"


def settings_for(
    judge: str,
    template: str | None,
    mode: Mode = "tier",
    draws: int = 1,
    temperature: float | None = None,
    timeout_s: float = 120.0,
) -> JudgeSettings:
    """Settings of the judge of that name where there is no configuration. `template` is that of `mode`, None the one
    that fits the judge; `temperature` None is 0, or 0.7 for several draws. Raises BadInput for what cannot be."""
    degrees = (0.7 if draws > 1 else 0.0) if temperature is None else temperature
    if draws < 1:
        raise BadInput("command line", f"--draws {draws}", "must be at least 1")
    if degrees < 0 or (draws > 1 and degrees == 0):
        reason = "must not be negative" if degrees < 0 else f"{draws} draws at temperature 0 are one draw"
        raise BadInput("command line", f"--temperature {degrees:g}", reason)
    if draws > 1 and mode == "tier":
        raise BadInput("command line", f"--draws {draws}", "mode tier gives a distribution at once: one draw is all")
    if timeout_s <= 0:
        raise BadInput("command line", f"--timeout {timeout_s:g}", "must be above 0")
    tier = template if template and mode == "tier" else template_for(judge)
    settings = JudgeSettings(template=tier, mode=mode, draws=draws, temperature=degrees, timeout_s=timeout_s)
    if template and mode != "tier":
        return msgspec.structs.replace(settings, **{f"{mode}_template": template})
    return settings


@contextlib.asynccontextmanager
async def _backend(judge: str, use: JudgeUse, settings: JudgeSettings) -> AsyncIterator[TierBackend | None]:
    if judge == "none":
        yield None
        return
    if is_url(judge):
        url, _, model = judge.partition("#")
        remote = backend_for_url(
            url,
            model or None,
            use.concurrency,
            timeout_s=settings.timeout_s,
            max_requests=use.max_requests,
            max_total_tokens=use.max_total_tokens,
        )
        try:
            yield remote
        finally:
            await remote.aclose()
        return
    directory = Path(judge)
    if not (directory / "config.json").is_file():
        raise BadInput(
            "command line", f"--judge {judge}", "is neither none, a URL nor a model directory with config.json"
        )
    if use.engine_factory is None:
        raise BadInput("command line", f"--judge {judge}", "no engine can be started here")
    async with use.engine_factory(directory, use.device) as engine:
        yield backend_for_engine(engine, directory, dtype=use.dtype or serving_dtype(directory))
