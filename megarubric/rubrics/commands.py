"""The verbs `rubrics lint | stats | show | import`. Each returns the exit status: 0 done, 1 done with findings or with
inputs left out, 2 something could not be read."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from megarubric.errors import BadInput
from megarubric.rubrics.corpus import Corpus
from megarubric.rubrics.lint import Finding, fix_files, lint_paths
from megarubric.rubrics.load import load_rubrics
from megarubric.rubrics.schema import to_dict
from megarubric.rubrics.show import print_rubric
from megarubric.rubrics.stats import corpus_stats, print_stats

PathLike = str | os.PathLike[str]
SHOW_AT_MOST = 20


def lint(paths: Sequence[PathLike], as_json: bool = False, fix: bool = False) -> int:
    """Print findings: a table, or with `as_json` one JSON list of {file, rubric, criterion, rule, message}.

    Status 0 without findings, 1 with findings, 2 when a rubric cannot be read (it is named on standard error as well).
    """
    places = [Path(p) for p in paths]
    mended, by_hand = fix_files(places) if fix else (0, [])
    findings, n = lint_paths(places)
    if as_json:
        _write_json([f._asdict() for f in findings])
    else:
        _print_findings(findings, n, mended)
    for file in by_hand:
        print(f"{file}: not mended: rewriting YAML would lose its comments", file=sys.stderr)
    unreadable = [f for f in findings if f.rule == "unreadable"]
    for f in unreadable:
        print(f"{f.file}: {f.message}", file=sys.stderr)
    return 2 if unreadable else 1 if findings else 0


def _print_findings(findings: Sequence[Finding], n: int, mended: int) -> None:
    out = _console()
    for f in findings:
        place = f"{f.file}: {f.rubric or '-'}" + (f"/{f.criterion}" if f.criterion else "")
        out.print(Text(place) + Text(f"  {f.rule}  ", "yellow") + Text(f.message), soft_wrap=True)
    counts = ", ".join(f"{rule} {k}" for rule, k in Counter(f.rule for f in findings).most_common())
    fixed = f"; {mended} rubrics mended" if mended else ""
    out.print(
        Text(f"{n:,} rubrics, {len(findings):,} findings{': ' + counts if counts else ''}{fixed}"), soft_wrap=True
    )


def stats(paths: Sequence[PathLike], as_json: bool = False) -> int:
    """Print what the rubrics hold (one JSON object with `as_json`). Raises BadInput when one cannot be read."""
    numbers = corpus_stats(_corpus(paths).rubrics)
    if as_json:
        _write_json(numbers)
    else:
        print_stats(numbers, _console())
    return 0


def show(paths: Sequence[PathLike], ids: Sequence[str] = (), as_json: bool = False) -> int:
    """Print rubrics, those named by `ids` or the first 20. Raises BadInput for an id that is not there."""
    corpus = _corpus(paths)
    chosen = [corpus.get(name) for name in ids] if ids else list(corpus)
    if as_json:
        _write_json([to_dict(r, defaults=True) | {"hash": r.hash} for r in chosen])
        return 0
    out = _console()
    shown = chosen if ids else chosen[:SHOW_AT_MOST]
    for rubric in shown:
        print_rubric(rubric, out)
    if len(shown) < len(chosen):
        out.print(f"{len(chosen) - len(shown):,} more; choose with --id")
    return 0


def import_(paths: Sequence[PathLike], out: PathLike, format: str | None = None, as_json: bool = False) -> int:
    """Read foreign rubric files and write one JSONL corpus file (aside, then renamed).

    Args:
        paths: files of one or several formats.
        out: the JSONL file to write.
        format: one of `importers.FORMATS`; told from each file's first line when None.

    Status 0, or 1 when some rows could not be used (named on standard error). Raises BadInput when a file's format is
    unknown, or nothing could be used.
    """
    from megarubric.rubrics.importers import import_files, write_corpus

    reports = import_files([Path(p) for p in paths], format)
    rubrics = [r for report in reports for r in report.rubrics]
    if not rubrics:
        raise BadInput(", ".join(map(str, paths)), None, "no row could be used")
    write_corpus(Path(out), rubrics)
    if as_json:
        _write_json([report.as_dict() for report in reports])
    else:
        for report in reports:
            print(report.summary())
        print(f"{len(rubrics):,} rubrics in {out}")
    for report in reports:
        for place, reason in report.refused:
            print(f"{report.file}: {place}: {reason}", file=sys.stderr)
    return 1 if any(report.refused for report in reports) else 0


def _corpus(paths: Sequence[PathLike]) -> Corpus:
    parts = [load_rubrics(p) for p in paths]
    if len(parts) == 1:
        return parts[0]
    sources = [source for part in parts for source in part.sources]
    return Corpus((r for part in parts for r in part), sources, ", ".join(map(str, paths)))


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120, soft_wrap=False)


def _write_json(data: Any) -> None:
    print(msgspec.json.format(msgspec.json.encode(data), indent=1).decode())
