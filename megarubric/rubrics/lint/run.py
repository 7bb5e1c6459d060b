"""Runs the rules over files, and mends what is safe to mend."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from megarubric.errors import BadInput
from megarubric.rubrics.lint import rules  # noqa: F401  (registers the rules)
from megarubric.rubrics.lint.model import CHECKS, Finding, declare
from megarubric.rubrics.lint.near import near_duplicates
from megarubric.rubrics.load import RawRubric, read_raw, rubric_files
from megarubric.rubrics.parse import parse_rubric
from megarubric.rubrics.schema import Rubric, dumps, to_dict

declare("unreadable", "A rubric that cannot be read is no rubric.", "an unknown key, two equal ids, broken JSON")

ALLOW = "lint-allow:"  # a tag "lint-allow:RULE" says that the finding is meant


def lint_rubric(rubric: Rubric, file: str = "") -> Iterator[Finding]:
    """Every finding in one rubric, but for rules its tags allow (`lint-allow:RULE`)."""
    allowed = {tag.removeprefix(ALLOW) for tag in rubric.tags if tag.startswith(ALLOW)}
    for rule_id, check in CHECKS:
        if rule_id not in allowed:
            for criterion, message in check(rubric):
                yield Finding(file, rubric.id, criterion, rule_id, message)


def lint_paths(paths: Sequence[Path]) -> tuple[list[Finding], int]:
    """(findings, number of rubrics) of files and directories. What cannot be read is a finding of rule `unreadable`;
    a path that is not there raises BadInput."""
    findings: list[Finding] = []
    rubrics: list[Rubric] = []
    sources: list[str] = []
    seen: dict[str, str] = {}
    for path in paths:
        rubric_files(path)
        raw: RawRubric | BadInput | None = None
        for raw in read_raw(path):
            try:
                if isinstance(raw, BadInput):
                    raise raw
                rubric = raw.parse()
                if rubric.id in seen:
                    raise BadInput(raw.source, f"rubric {rubric.id}", f"the id is taken already, by {seen[rubric.id]}")
            except BadInput as error:
                name = raw.data.get("id") if isinstance(raw, RawRubric) and isinstance(raw.data, dict) else None
                file = str(raw.file) if isinstance(raw, RawRubric) else error.where
                known = name if isinstance(name, str) else None
                places = (p.removeprefix("criterion ") for p in error.item.split(", ") if p.startswith("criterion "))
                message = f"{error.item}: {error.reason}".lstrip(": ")
                findings.append(Finding(file, known, next(places, None), "unreadable", message))
                continue
            seen[rubric.id] = raw.source
            rubrics.append(rubric)
            sources.append(str(raw.file))
            findings += lint_rubric(rubric, sources[-1])
        if raw is None:
            findings.append(Finding(str(path), None, None, "unreadable", "holds no rubric"))
    for later, earlier, overlap in near_duplicates(rubrics):
        if f"{ALLOW}near-duplicate" not in rubrics[later].tags:
            message = f"{overlap:.0%} of its word 4-grams are those of {rubrics[earlier].id}"
            findings.append(Finding(sources[later], rubrics[later].id, None, "near-duplicate", message))
    return findings, len(rubrics)


def fixed(rubric: Rubric) -> Rubric:
    """The rubric with safe fixes made: text trimmed, tags once each, `detector: true` on the veto of a hack detector
    that has no weight."""
    tree = to_dict(rubric)
    if "title" in tree:
        tree["title"] = tree["title"].strip()
    if "tags" in tree:
        tree["tags"] = list(dict.fromkeys(tree["tags"]))
    wrong = {f.criterion for f in lint_rubric(rubric) if f.rule == "veto-polarity"}
    for criterion, plain in zip(rubric.criteria, tree["criteria"]):
        if "description" in plain:
            plain["description"] = plain["description"].strip()
        for tier in plain.get("tiers") or ():
            if "text" in tier:
                tier["text"] = tier["text"].strip()
        if criterion.id in wrong and criterion.weight == 0 and "veto" in plain:
            plain["veto"]["detector"] = True
    return parse_rubric(tree, rubric.id)


def fix_files(paths: Sequence[Path]) -> tuple[int, list[Path]]:
    """Mend JSONL and JSON files in place (written aside, then renamed; untouched lines keep their bytes).

    Returns (rubrics mended, YAML files that need a fix by hand: rewriting them would lose their comments).
    """
    mended, left = 0, []
    for file in (f for path in paths for f in rubric_files(path)):
        items = list(read_raw(file))
        changes: dict[int, Rubric] = {}
        for i, raw in enumerate(items):
            try:
                rubric = raw.parse() if isinstance(raw, RawRubric) else None
            except BadInput:
                continue
            if rubric is not None and fixed(rubric) != rubric:
                changes[i] = fixed(rubric)
        if not changes:
            continue
        if file.suffix == ".jsonl":
            lines = file.read_bytes().split(b"\n")
            for i, rubric in changes.items():
                raw = items[i]
                assert isinstance(raw, RawRubric) and raw.item is not None
                lines[int(raw.item.removeprefix("line ")) - 1] = dumps(rubric).encode()
            _replace(file, b"\n".join(lines))
        elif file.suffix == ".json" and all(isinstance(raw, RawRubric) for raw in items):
            data: list[Any] = [to_dict(changes[i]) if i in changes else raw.data for i, raw in enumerate(items)]  # type: ignore[union-attr]
            whole = data if file.read_text(encoding="utf-8").lstrip("\ufeff \t\r\n").startswith("[") else data[0]
            _replace(file, msgspec.json.format(msgspec.json.encode(whole), indent=2) + b"\n")
        else:
            left.append(file)
            continue
        mended += len(changes)
    return mended, left


def _replace(file: Path, content: bytes) -> None:
    aside = file.with_name(f".{file.name}.new")
    aside.write_bytes(content)
    os.replace(aside, file)
