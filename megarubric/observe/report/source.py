"""Reads a run directory, of a run that ended or goes on, in bounded memory; what cannot be read is named, not fatal."""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from megarubric.errors import BadInput
from megarubric.evaluate.summary import Summary

LONGEST_LINE = 16 << 20  # bytes; a longer line is left out and counted
MOST_SERIES = 4000  # metric names that are kept; a corpus can have thousands of criteria

_STEP_FILE = re.compile(r"step_(\d+)\.jsonl")


@dataclass(frozen=True)
class Series:
    """One metric: float64 [n] steps, rising, and float64 [n] values, all finite."""

    steps: np.ndarray
    values: np.ndarray


class Judged(msgspec.Struct, frozen=True):
    """What the report needs of a stored judgement."""

    score: float | None = None
    source: str = ""
    read: bool = True
    entropy: float | None = None
    reason: str | None = None


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """What the report needs of a line of ``rollouts/step_N.jsonl`` (`recipe.records.Record`); ids are not decoded."""

    step: int
    prompt_id: str
    group: int = 0
    sample: int = 0
    rubric: str = ""
    prompt: str = ""
    response: str = ""
    finish_reason: str = ""
    weight_version: int = 0
    reward: float | None = None
    vetoed: bool = False
    veto: str | None = None
    r0: float | None = None
    r1: float | None = None
    advantage: float = 0.0
    judgements: dict[str, Judged] = {}
    attribution: dict[str, float] = {}


class BeforeAfter(msgspec.Struct, frozen=True):
    """``heldout.json``."""

    before: Summary
    after: Summary


@dataclass
class Source:
    """A run directory as read. `notes` are sentences about what was missing or left out."""

    path: Path
    config: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Series] = field(default_factory=dict)
    heldout: BeforeAfter | None = None
    evaluations: dict[str, Summary] = field(default_factory=dict)  # by file name
    rollout_files: dict[int, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_run(path: Path) -> Source:
    """Everything but the rollouts, of which only the files are listed. Raises BadInput when `path` is no run."""
    if not path.is_dir():
        raise BadInput(path, None, "no such run directory")
    source = Source(path)
    _read_config(source)
    _read_metrics(source)
    _read_heldout(source)
    _read_evaluations(source)
    folder = path / "rollouts"
    if folder.is_dir():
        found = {int(m[1]): p for p in folder.iterdir() if (m := _STEP_FILE.fullmatch(p.name))}
        source.rollout_files = dict(sorted(found.items()))
    if source.config is None and not source.metrics and not source.rollout_files:
        raise BadInput(path, None, "is no run directory: no config.yaml, no metrics.jsonl, no rollouts")
    return source


def _read_config(source: Source) -> None:
    import yaml

    file = source.path / "config.yaml"
    try:
        source.config = file.read_text(encoding="utf-8", errors="replace")
        tree = yaml.safe_load(source.config)
        source.settings = tree if isinstance(tree, dict) else {}
    except FileNotFoundError:
        source.notes.append("config.yaml is not there.")
    except yaml.YAMLError:
        source.notes.append("config.yaml is not YAML; it is shown as it is.")


def _read_metrics(source: Source) -> None:
    file = source.path / "metrics.jsonl"
    if not file.exists():
        source.notes.append("metrics.jsonl is not there: no curves.")
        return
    steps: dict[str, array[float]] = {}
    values: dict[str, array[float]] = {}
    bad = dropped = 0
    for line in _lines(file):
        try:
            row: dict[str, Any] = json.loads(line or b"null")
            step = float(row["step"])
        except (ValueError, KeyError, TypeError, RecursionError):
            bad += 1
            continue
        for name, value in row.items():
            if name == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not math.isfinite(value) or abs(value) > 1e300:
                continue
            if name not in steps:
                if len(steps) >= MOST_SERIES:
                    dropped += 1
                    continue
                steps[name], values[name] = array("d"), array("d")
            steps[name].append(step)
            values[name].append(float(value))
    for name in steps:
        source.metrics[name] = _series(np.array(steps[name]), np.array(values[name]))
    if bad:
        source.notes.append(f"metrics.jsonl: {bad} line(s) could not be read (a run under way tears its last one).")
    if dropped:
        source.notes.append(f"metrics.jsonl has more than {MOST_SERIES} names; the later ones are left out.")


def _series(steps: np.ndarray, values: np.ndarray) -> Series:
    """Sorted by step; of a step written twice the later line counts."""
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    last = np.append(steps[1:] != steps[:-1], True) if len(steps) else np.zeros(0, bool)
    return Series(steps[last], values[last])


def _read_heldout(source: Source) -> None:
    file = source.path / "heldout.json"
    try:
        source.heldout = msgspec.json.decode(file.read_bytes(), type=BeforeAfter)
    except FileNotFoundError:
        source.notes.append("heldout.json is not there: it is written when a run with held-out prompts ends.")
    except (msgspec.DecodeError, UnicodeDecodeError):
        source.notes.append("heldout.json cannot be read.")


def _read_evaluations(source: Source) -> None:
    """The ``eval*.json`` that `megarubric eval --out` put into the run directory."""
    for file in sorted(source.path.glob("eval*.json")):
        try:
            source.evaluations[file.name] = msgspec.json.decode(file.read_bytes(), type=Summary)
        except (msgspec.DecodeError, UnicodeDecodeError, OSError):
            source.notes.append(f"{file.name} is not an evaluation that can be read.")


def rollouts(file: Path, problems: list[str]) -> Iterator[Rollout]:
    """The answers of one step, one at a time; `problems` gets a sentence when lines were left out."""
    decoder = msgspec.json.Decoder(Rollout)
    bad = 0
    try:
        for line in _lines(file):
            try:
                if line is None:
                    raise ValueError
                yield decoder.decode(line)
            except (ValueError, msgspec.DecodeError, RecursionError):
                bad += 1
    except OSError as error:
        problems.append(f"rollouts/{file.name}: {error.strerror}.")
    if bad:
        problems.append(f"rollouts/{file.name}: {bad} line(s) could not be read.")


def _lines(file: Path) -> Iterator[bytes | None]:
    """The lines that are not blank; None for one that is longer than `LONGEST_LINE`."""
    with file.open("rb") as f:
        while line := f.readline(LONGEST_LINE):
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                while (rest := f.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield None
            elif line.strip():
                yield line
