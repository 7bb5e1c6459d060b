"""`megarubric score` as the command line calls it: which judge, what is reported, which exit status."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megarubric.errors import BadInput
from megarubric.judging.backends import backend_for_engine, backend_for_url
from megarubric.judging.backends.engine import TierEngine
from megarubric.judging.cache import CachedBackend, JudgeCache
from megarubric.judging.judge import Judge, JudgeSettings
from megarubric.judging.score import Device, ScoreSummary, score_file
from megarubric.judging.types import TierBackend

EngineFactory = Callable[[Path, Device], AbstractAsyncContextManager[TierEngine]]
_SMALL_CONTEXT = 2048  # a model that reads fewer tokens gets the compact template


def run_score(
    rubrics: Path,
    responses: Path,
    out: Path,
    judge: str = "none",
    device: Device = "cpu",
    *,
    engine_factory: EngineFactory | None = None,
    settings: JudgeSettings | None = None,
    cache: Path | None = None,
    replay_only: bool = False,
    as_json: bool = False,
) -> int:
    """Score a file and say how it went on standard error (`as_json`: the counts as JSON on standard output). Returns
    the exit status: 0, or 1 when some lines were bad.

    `judge` is ``none``, a model directory (an engine is started by `engine_factory` and ended again) or a URL, with the
    model's name after ``#`` where the server has several. `cache` keeps the judgements; with `replay_only` they are all
    there is. Raises BadInput for what makes the whole job impossible.
    """
    for path, what in ((rubrics, "rubric file"), (responses, "responses file")):
        if not path.exists():
            raise BadInput(path, None, f"no such {what}")
    if responses.is_dir() or out.is_dir():
        raise BadInput(responses if responses.is_dir() else out, None, "is a directory")
    if replay_only and cache is None:
        raise BadInput("command line", "--replay-only", "needs --cache")
    if device == "cuda":
        _need_cuda()
    summary = asyncio.run(_run(rubrics, responses, out, judge, device, engine_factory, settings, cache, replay_only))
    if as_json:
        print(msgspec.json.encode(summary).decode())
    else:
        print(f"{summary} -> {out}", file=sys.stderr)
    return summary.exit_status


async def _run(
    rubrics: Path,
    responses: Path,
    out: Path,
    judge: str,
    device: Device,
    engine_factory: EngineFactory | None,
    settings: JudgeSettings | None,
    cache_path: Path | None,
    replay_only: bool,
) -> ScoreSummary:
    async with contextlib.AsyncExitStack() as stack:
        cache = None
        if cache_path is not None:
            cache = JudgeCache(cache_path)
            stack.callback(cache.close)
        backend: TierBackend | None
        if replay_only:
            assert cache is not None
            backend = _replayed(cache)
            chosen = settings or JudgeSettings(template=_template(judge))
        else:
            backend, chosen = await stack.enter_async_context(_backend(judge, device, engine_factory, settings))
            if cache is not None and backend is not None:
                backend = CachedBackend(backend, cache)
        used = Judge(backend, chosen)
        with _progress(responses.stat().st_size) as progress:
            summary = await score_file(
                rubrics,
                responses,
                out,
                used,
                device,
                report=lambda line: print(line, file=sys.stderr, flush=True),
                progress=progress,
            )
        if used.stats.failures:
            reasons = ", ".join(f"{n} {reason}" for reason, n in used.stats.failures.most_common(5))
            print(f"unread judgements: {reasons}", file=sys.stderr)
        if cache is not None:
            s = cache.stats()
            print(
                f"cache {cache_path}: {s.entries} judgements, {s.bytes / 1e6:.1f} MB, hit rate {s.hit_rate:.0%}",
                file=sys.stderr,
            )
        return summary


def _is_url(judge: str) -> bool:
    return judge.startswith(("http://", "https://"))


def _template(judge: str) -> str:
    """The compact template for a model directory with a short context, else the full one."""
    config = Path(judge) / "config.json"
    if judge == "none" or _is_url(judge) or not config.is_file():
        return "tier"
    try:
        read = msgspec.json.decode(config.read_bytes())
    except msgspec.DecodeError as error:
        raise BadInput(config, None, f"is not JSON: {error}") from error
    context = read.get("max_position_embeddings") if isinstance(read, dict) else None
    return "tier_compact" if isinstance(context, int) and context < _SMALL_CONTEXT else "tier"


@contextlib.asynccontextmanager
async def _backend(
    judge: str, device: Device, engine_factory: EngineFactory | None, settings: JudgeSettings | None
) -> AsyncIterator[tuple[TierBackend | None, JudgeSettings]]:
    if judge == "none":
        yield None, settings or JudgeSettings()
        return
    if _is_url(judge):
        url, _, model = judge.partition("#")
        remote = backend_for_url(url, model or None)
        try:
            yield remote, settings or JudgeSettings()
        finally:
            await remote.aclose()
        return
    directory = Path(judge)
    if not (directory / "config.json").is_file():
        raise BadInput(
            "command line", f"--judge {judge}", "is neither none, a URL nor a model directory with config.json"
        )
    if engine_factory is None:
        raise BadInput("command line", f"--judge {judge}", "no engine can be started here")
    chosen = settings or JudgeSettings(template=_template(judge))
    async with engine_factory(directory, device) as engine:
        yield backend_for_engine(engine, directory), chosen


def _replayed(cache: JudgeCache) -> CachedBackend:
    judges = cache.judges()
    if len(judges) != 1:
        held = "no judgements" if not judges else "judgements of several judges: " + ", ".join(judges)
        raise BadInput(cache.path, None, f"holds {held}; a replay needs those of one")
    return CachedBackend(None, cache, identity=judges[0])


def _need_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise BadInput("command line", "--device cuda", "no CUDA device can be used on this machine")


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing otherwise (the closing line says it all)."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, lines: None
        return
    columns = (
        TextColumn("scoring"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[lines]} responses"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=max(total, 1), lines=0)
        yield lambda done, lines: bar.update(task, completed=done, lines=lines)
