"""What the command line calls: scoring a file, examining a judge; what is said, which exit status."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megarubric.errors import BadInput, Interrupted
from megarubric.judging.opening import JudgeUse, open_judge
from megarubric.judging.score import ScoreSummary, score_file
from megarubric.judging.suite import JudgeReport, fit_calibration, load_labelled, run_judge_suite
from megarubric.observe.files import check_writable, whole_file

LINE_EVERY_S = 30.0


def run_score(rubrics: Path, responses: Path, out: Path, use: JudgeUse, *, as_json: bool = False) -> int:
    """Score a file and say how it went on standard error (`as_json`: the counts as JSON on standard output). Returns
    the exit status: 0, or 1 when some lines were bad.

    Raises BadInput for what makes the whole job impossible, Interrupted after SIGTERM or Ctrl-C; then there is no
    output, and what was judged is in the cache, where there is one.
    """
    for path, what in ((rubrics, "rubric file"), (responses, "responses file")):
        if not path.exists():
            raise BadInput(path, None, f"no such {what}")
    if responses.is_dir() or out.is_dir():
        raise BadInput(responses if responses.is_dir() else out, None, "is a directory")
    if use.device == "cuda":
        _need_cuda()
    summary = _until_told(_score(rubrics, responses, out, use), use)
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
    calibration_out: Path | None = None,
    as_json: bool = False,
) -> int:
    """Examine a judge on labelled answers (`suite.run_judge_suite`), write the report to `out` as JSON and print it as
    tables, or as JSON too. `calibration_out` gets the calibration that the labels amount to. Returns the exit status.
    """
    answers = load_labelled(rubrics, labelled)
    for path in (out, calibration_out):
        if path is not None:
            check_writable(path)
    if calibration_out is not None and (use.calibration is not None or use.second is not None):
        raise BadInput("command line", "--fit-calibration", "fits one judge as it is: no calibration, no second judge")

    async def examine() -> JudgeReport:
        async with open_judge(use) as judge:
            report = await run_judge_suite(judge, answers, author=author, attacks=attacks, report=_say)
            if calibration_out is not None:
                (await fit_calibration(judge, answers)).save(calibration_out)
            return report

    report = _until_told(examine(), use)
    plain = msgspec.json.format(msgspec.json.encode(report), indent=2).decode()
    with whole_file(out) as f:
        f.write(plain + "\n")
    if as_json:
        print(plain)
    else:
        show_report(report)
    return 0


def _until_told[T](work: Coroutine[Any, Any, T], use: JudgeUse) -> T:
    """Run `work`; SIGTERM and Ctrl-C cancel it, so that it cleans up behind itself, and raise Interrupted."""

    async def watched() -> T:
        task = asyncio.current_task()
        assert task is not None
        with contextlib.suppress(RuntimeError, ValueError):  # not the main thread: whoever owns it decides
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    try:
        return asyncio.run(watched())
    except (asyncio.CancelledError, KeyboardInterrupt):
        kept = "--cache FILE would have kept what was judged"
        if use.cache is not None:
            kept = f"what was judged is in {use.cache}; the same command goes on from there"
        raise Interrupted(f"interrupted, no output written; {kept}") from None


async def _score(rubrics: Path, responses: Path, out: Path, use: JudgeUse) -> ScoreSummary:
    async with open_judge(use) as judge:
        with _progress(responses.stat().st_size) as progress:
            return await score_file(
                rubrics,
                responses,
                out,
                judge,
                use.device,
                report=_say,
                progress=progress,
            )


def _shown(value: float, form: str = ".2f") -> str:
    """A number, or a dash where the data cannot say."""
    return "-" if value != value else format(value, form)


def show_report(report: JudgeReport) -> None:
    """A judge's examination as tables on standard output."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    table = Table(title=f"judge {report.judge}: {report.answers} labelled answers")
    for column in ("criterion", "n", "unread", "accuracy", "kappa", "quadratic", "alpha", "rank"):
        first = column == "criterion"
        table.add_column(column, justify="left" if first else "right", overflow="fold", no_wrap=not first)
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
    found = report.attacks
    title = (
        f"attacks: {found.fooled:.1%} fooled, {found.fooled_uncaught:.1%} uncaught; "
        f"additions that attack nothing: {found.control_fooled:.1%}"
    )
    table = Table(title=title)
    for column in ("attack", "gain", "worst", "fooled", "unread", "caught"):
        table.add_column(column, justify="left" if column == "attack" else "right")
    for r in [*sorted(found.results, key=lambda r: -r.fooled), *found.controls]:
        shares = [f"{x:.0%}" for x in (r.fooled, r.unread, r.caught)]
        table.add_row(r.attack, _shown(r.gain, "+.2f"), _shown(r.worst, "+.2f"), *shares)
    console.print(table)


def _need_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise BadInput("command line", "--device cuda", "no CUDA device can be used on this machine")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, otherwise a line every half minute."""
    console = Console(stderr=True)
    if not console.is_terminal:
        said = time.monotonic()

        def line(done: int, lines: int) -> None:
            nonlocal said
            if time.monotonic() - said >= LINE_EVERY_S:
                said = time.monotonic()
                _say(f"scoring: {done / max(total, 1):.0%}, {lines} responses")

        yield line
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
