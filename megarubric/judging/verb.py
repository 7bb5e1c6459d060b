"""What the command line calls: scoring a file, examining a judge; which judge, what is said, which exit status."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megarubric.errors import BadInput
from megarubric.judging.backends import backend_for_engine, backend_for_url
from megarubric.judging.backends.engine import TierEngine
from megarubric.judging.cache import CachedBackend, JudgeCache
from megarubric.judging.judge import Judge
from megarubric.judging.score import Device, ScoreSummary, score_file
from megarubric.judging.settings import JudgeSettings
from megarubric.judging.suite import JudgeReport, load_labelled, run_judge_suite
from megarubric.judging.types import TierBackend
from megarubric.observe.files import whole_file

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
    use = JudgeUse(judge, device, engine_factory, settings, cache, replay_only)
    summary = asyncio.run(_score(rubrics, responses, out, use))
    if as_json:
        print(msgspec.json.encode(summary).decode())
    else:
        print(f"{summary} -> {out}", file=sys.stderr)
    return summary.exit_status


def run_judge_eval(
    rubrics: Path,
    labelled: Path,
    out: Path,
    use: JudgeUse,
    *,
    author: str | None = None,
    attacks: int = 8,
    as_json: bool = False,
) -> int:
    """Examine a judge on labelled answers (`suite.run_judge_suite`), write the report to `out` as JSON and print it as
    tables, or as JSON too. Returns the exit status."""
    answers = load_labelled(rubrics, labelled)

    async def examine() -> JudgeReport:
        async with open_judge(use) as judge:
            return await run_judge_suite(judge, answers, author=author, attacks=attacks)

    report = asyncio.run(examine())
    plain = msgspec.json.format(msgspec.json.encode(report), indent=2).decode()
    with whole_file(out) as f:
        f.write(plain + "\n")
    if as_json:
        print(plain)
    else:
        show_report(report)
    return 0


@dataclass(frozen=True, slots=True)
class JudgeUse:
    """Which judge, and how: see `run_score`."""

    judge: str = "none"
    device: Device = "cpu"
    engine_factory: EngineFactory | None = None
    settings: JudgeSettings | None = None
    cache: Path | None = None
    replay_only: bool = False


@contextlib.asynccontextmanager
async def open_judge(use: JudgeUse) -> AsyncIterator[Judge]:
    """The judge, running; on exit it ends, and what is worth saying about it is said on standard error."""
    async with contextlib.AsyncExitStack() as stack:
        cache = None
        if use.cache is not None:
            cache = JudgeCache(use.cache)
            stack.callback(cache.close)
        backend: TierBackend | None
        if use.replay_only:
            assert cache is not None
            backend = _replayed(cache)
            chosen = use.settings or JudgeSettings(template=template_for(use.judge))
        else:
            backend, chosen = await stack.enter_async_context(
                _backend(use.judge, use.device, use.engine_factory, use.settings)
            )
            if cache is not None and backend is not None:
                backend = CachedBackend(backend, cache)
        judge = Judge(backend, chosen)
        yield judge
        if judge.stats.failures:
            reasons = ", ".join(f"{n} {reason}" for reason, n in judge.stats.failures.most_common(5))
            print(f"unread judgements: {reasons}", file=sys.stderr)
        if cache is not None:
            s = cache.stats()
            size = f"{s.entries} judgements, {s.bytes / 1e6:.1f} MB"
            print(f"cache {use.cache}: {size}, hit rate {s.hit_rate:.0%}", file=sys.stderr)


async def _score(rubrics: Path, responses: Path, out: Path, use: JudgeUse) -> ScoreSummary:
    async with open_judge(use) as judge:
        with _progress(responses.stat().st_size) as progress:
            return await score_file(
                rubrics,
                responses,
                out,
                judge,
                use.device,
                report=lambda line: print(line, file=sys.stderr, flush=True),
                progress=progress,
            )


def _shown(value: float, form: str = ".2f") -> str:
    """A number, or a dash where the data cannot say."""
    return "-" if value != value else format(value, form)


def show_report(report: JudgeReport) -> None:
    """A judge's examination as tables on standard output."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    table = Table(title=f"judge {report.judge}: {report.answers} labelled answers")
    for column in ("criterion", "n", "unread", "accuracy", "kappa", "quadratic", "alpha", "rank corr."):
        table.add_column(column, justify="left" if column == "criterion" else "right")
    for name, a in [*report.criteria.items(), ("all", report.overall)]:
        cells = [f"{_shown(i.value)} [{_shown(i.low)}, {_shown(i.high)}]" for i in (a.accuracy, a.kappa)]
        rest = [_shown(i.value) for i in (a.quadratic_kappa, a.alpha, a.spearman)]
        table.add_row(name, str(a.n), f"{a.unread:.0%}", *cells, *rest, end_section=name != "all")
    console.print(table)
    b, before, after = report.biases, report.compression, report.compression_calibrated
    shares = [_shown(c["top_fifth"], ".0%") for c in (before, after)]
    lines = (
        f"calibration error {report.calibration_error:.3f}, {report.calibration_error_calibrated:.3f} calibrated",
        f"scores in the top fifth {shares[0]}, {shares[1]} calibrated",
        f"flips on a second draw {report.flip_rate:.1%}",
        f"change when tiers are listed highest first {_shown(b.tier_order, '.3f')}",
        f"length bias {_shown(b.length.value, '+.2f')}, verbosity {_shown(b.verbosity, '+.3f')}, "
        f"self-preference {_shown(b.self_preference.value, '+.3f')}",
        f"{report.judgements_per_second:.0f} judgements a second",
    )
    console.print("\n".join(lines), markup=False)
    if report.attacks is None:
        return
    table = Table(title=f"attacks: {report.attacks.fooled:.1%} fooled, {report.attacks.fooled_uncaught:.1%} uncaught")
    for column in ("attack", "gain", "worst", "fooled", "unread", "caught"):
        table.add_column(column, justify="left" if column == "attack" else "right")
    for r in sorted(report.attacks.results, key=lambda r: -r.fooled):
        shares = [f"{x:.0%}" for x in (r.fooled, r.unread, r.caught)]
        table.add_row(r.attack, _shown(r.gain, "+.2f"), _shown(r.worst, "+.2f"), *shares)
    console.print(table)


def is_url(judge: str) -> bool:
    return judge.startswith(("http://", "https://"))


def template_for(judge: str) -> str:
    """The compact template for a model directory with a short context, else the full one."""
    config = Path(judge) / "config.json"
    if judge == "none" or is_url(judge) or not config.is_file():
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
    if is_url(judge):
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
    chosen = settings or JudgeSettings(template=template_for(judge))
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
