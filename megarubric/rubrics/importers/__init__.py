"""Importers: public rubric formats -> our rubrics, with counts of what came in, what came out and what was lost.

One file a format. An importer is a function `row -> Rubric trees`; nothing is invented beyond the wording that turns a
question into a criterion, and provenance and licence are those of the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarubric.errors import BadInput
from megarubric.observe.files import whole_file
from megarubric.rubrics.importers import fastchat, hbq, ifeval, weighted, writingbench
from megarubric.rubrics.importers.model import Importer, Report
from megarubric.rubrics.load import RawRubric, read_raw
from megarubric.rubrics.parse import parse_rubric
from megarubric.rubrics.schema import Rubric, dumps

FORMATS: dict[str, Importer] = {
    "writingbench": writingbench.IMPORTER,
    "hbq": hbq.IMPORTER,
    "healthbench": weighted.HEALTHBENCH,
    "rubrichub": weighted.RUBRICHUB,
    "rar": weighted.RAR,
    "ifeval": ifeval.IMPORTER,
    "mtbench": fastchat.MT_BENCH,
    "vicuna": fastchat.VICUNA,
}

__all__ = ["FORMATS", "Report", "import_files", "write_corpus"]


def import_files(paths: Sequence[Path], format: str | None = None) -> list[Report]:
    """One report a file; a directory stands for its .json and .jsonl files.

    Raises BadInput for a path that cannot be read, an unknown `format`, or a file whose format cannot be told.
    """
    if format is not None and format not in FORMATS:
        raise BadInput("command line", format, f"no such format; there are {', '.join(FORMATS)}")
    files = [f for path in paths for f in (sorted(path.glob("*.json*")) if path.is_dir() else [path])]
    taken: dict[str, str] = {}
    return [_import_file(file, format, taken) for file in files]


def _import_file(file: Path, format: str | None, taken: dict[str, str]) -> Report:
    rows = list(read_raw(file))
    first = next((r.data for r in rows if isinstance(r, RawRubric)), None)
    name = format or next((n for n, i in FORMATS.items() if isinstance(first, dict) and i.fits(first)), None)
    if name is None:
        bad = next((r for r in rows if isinstance(r, BadInput)), None)
        raise bad or BadInput(file, None, f"its format is none of {', '.join(FORMATS)}; name it with --format")
    report = Report(str(file), name)
    importer = FORMATS[name]
    for number, raw in enumerate(rows, 1):
        report.rows += 1
        if isinstance(raw, BadInput):
            report.refused.append((raw.item, raw.reason))
            continue
        place = raw.item or f"row {number}"
        try:
            trees = importer.convert(raw.data, number, report)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            report.refused.append((place, f"not a {name} row: {type(error).__name__}: {str(error)[:100]}"))
            continue
        for tree in trees:
            _add(tree, place, report, taken)
    return report


def _add(tree: dict[str, Any], place: str, report: Report, taken: dict[str, str]) -> None:
    try:
        rubric = parse_rubric(tree, report.file, place)
    except BadInput as error:
        report.refused.append((error.item, error.reason))
        return
    if rubric.id in taken:
        report.refused.append((f"{place}, rubric {rubric.id}", f"the id is taken already, by {taken[rubric.id]}"))
        return
    taken[rubric.id] = f"{report.file}: {place}"
    report.rubrics.append(rubric)


def write_corpus(out: Path, rubrics: Sequence[Rubric]) -> None:
    """One rubric a line, written aside and renamed."""
    with whole_file(out) as f:
        for rubric in rubrics:
            f.write(dumps(rubric) + "\n")
