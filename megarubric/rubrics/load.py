"""Rubric files: YAML (one rubric, a list, or several documents), JSON (one or a list), JSONL (one a line), folders."""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megarubric.errors import BadInput
from megarubric.rubrics.corpus import Corpus
from megarubric.rubrics.parse import parse_rubric
from megarubric.rubrics.schema import KeyPath, Rubric
from megarubric.rubrics.yaml_reader import YamlProblem, documents

SUFFIXES = (".jsonl", ".json", ".yaml", ".yml")
MAX_TEXT_BYTES = 16 << 20  # a YAML or JSON file
MAX_LINES_BYTES = 1 << 30  # a JSONL file
MAX_LINE_BYTES = 4 << 20


class RawRubric(NamedTuple):
    """One rubric's plain data and where it stands."""

    file: Path
    item: str | None  # "line 7" in a JSONL file, "entry 7" in a JSON list
    data: Any
    lines: Mapping[KeyPath, int] | None = None  # in a YAML file

    @property
    def source(self) -> str:
        """ "FILE: line 7"."""
        line = self.item or (f"line {self.lines[()]}" if self.lines else None)
        return f"{self.file}: {line}" if line else str(self.file)

    def parse(self) -> Rubric:
        """The rubric. Raises BadInput."""
        return parse_rubric(self.data, self.file, self.item, self.lines)


def load_rubrics(path: str | os.PathLike[str]) -> Corpus:
    """Every rubric of a file, or of all rubric files under a directory in the order of their names.

    Raises:
        BadInput: the first thing that is wrong: no such file, not YAML or JSON, a rubric that breaks a rule, an id
            that comes twice (naming both places), no rubric at all.
    """
    path = Path(path)
    rubrics: list[Rubric] = []
    sources: list[str] = []
    with _collector_at_rest():
        for raw in read_raw(path):
            if isinstance(raw, BadInput):
                raise raw
            rubrics.append(raw.parse())
            sources.append(raw.source)
    if not rubrics:
        raise BadInput(path, None, "holds no rubric")
    return Corpus(rubrics, sources, str(path))


@contextlib.contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Parsing makes millions of small objects and no cycles; the cycle collector walking them costs a third of it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def rubric_files(path: Path) -> list[Path]:
    """The file itself, or the rubric files under a directory, sorted; hidden ones left out. Raises BadInput."""
    if path.is_dir():
        found = []
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            found += [Path(folder, n) for n in names if n.endswith(SUFFIXES) and not n.startswith(".")]
        if not found:
            raise BadInput(path, None, f"holds no rubric file ({', '.join(SUFFIXES)})")
        return sorted(found)
    if not path.exists():
        raise BadInput(path, None, "no such file")
    if not path.is_file():
        raise BadInput(path, None, "neither a file nor a directory")
    if path.suffix not in SUFFIXES:
        raise BadInput(path, None, f"a rubric file is one of {', '.join(SUFFIXES)}")
    return [path]


def read_raw(path: Path) -> Iterator[RawRubric | BadInput]:
    """What stands in the file or files, item by item. What cannot be read comes as the BadInput that says why, and
    reading goes on behind it where that is possible (the next line, the next file)."""
    try:
        files = rubric_files(path)
    except BadInput as error:
        yield error
        return
    for file in files:
        try:
            yield from _read_lines(file) if file.suffix == ".jsonl" else _read_text(file)
        except BadInput as error:
            yield error


def _bytes(file: Path, limit: int) -> bytes:
    try:
        size = file.stat().st_size
        if size > limit:
            raise BadInput(file, None, f"{size} bytes, more than the {limit >> 20} MiB a rubric file may have")
        return file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise BadInput(file, None, f"cannot be read: {error.strerror}") from None


def _text(file: Path, item: str | None, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = item or f"line {data[: error.start].count(10) + 1}"
        raise BadInput(file, line, f"not UTF-8 (byte {error.start})") from None


def _read_lines(file: Path) -> Iterator[RawRubric | BadInput]:
    for number, line in enumerate(_bytes(file, MAX_LINES_BYTES).split(b"\n"), 1):
        if not line.strip():
            continue
        item = f"line {number}"
        try:
            if len(line) > MAX_LINE_BYTES:
                raise BadInput(file, item, f"longer than {MAX_LINE_BYTES >> 20} MiB")
            yield RawRubric(file, item, _json(file, item, _text(file, item, line)))
        except BadInput as error:
            yield error


def _read_text(file: Path) -> Iterator[RawRubric | BadInput]:
    text = _text(file, None, _bytes(file, MAX_TEXT_BYTES))
    if file.suffix == ".json":
        data = _json(file, None, text)
        if isinstance(data, list):
            yield from (RawRubric(file, f"entry {n}", d) for n, d in enumerate(data, 1))
        else:
            yield RawRubric(file, None, data)
        return
    try:
        for data, lines in documents(text):
            if not isinstance(data, list):
                yield RawRubric(file, None, data, lines)
                continue
            parts: list[dict[KeyPath, int]] = [{} for _ in data]
            for path, line in lines.items():
                if path and isinstance(path[0], int):
                    parts[path[0]][path[1:]] = line
            yield from (RawRubric(file, None, d, part) for d, part in zip(data, parts))
    except YamlProblem as problem:
        raise BadInput(file, f"line {problem.line}" if problem.line else None, str(problem)) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:60]!r} appears twice")
    return made


def _not_finite(name: str) -> Any:
    raise ValueError(f"{name} is not a finite number")


# Refuses a key that comes twice, NaN and infinities: ValueError says which.
STRICT_JSON = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_not_finite)


def _json(file: Path, item: str | None, text: str) -> Any:
    try:
        return STRICT_JSON.decode(text)
    except json.JSONDecodeError as error:
        place = item or f"line {error.lineno}"
        raise BadInput(file, place, f"not JSON: {error.msg} (column {error.colno})") from None
    except ValueError as error:
        raise BadInput(file, item, str(error)) from None
    except RecursionError:
        raise BadInput(file, item, "nested too deeply") from None
