"""A defence rubric into a corpus: written as YAML, shown as a difference, linted before it replaces anything."""

from __future__ import annotations

import difflib
import re
import tempfile
from pathlib import Path

import msgspec
import yaml

from megarubric.errors import BadInput
from megarubric.observe.files import whole_file
from megarubric.rubrics import Rubric, dumps, load_rubrics, parse_rubric, to_dict
from megarubric.rubrics.lint import lint_paths
from megarubric.rubrics.load import SUFFIXES


class _Dumper(yaml.SafeDumper):
    """Quotes every text that is not plainly text: what an answer says may look like a number or a date to a reader."""


_PLAINLY_TEXT = re.compile(r"[A-Za-z][A-Za-z .,_/()-]*", re.ASCII)
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if _PLAINLY_TEXT.fullmatch(text) else '"'
    ),
)


def as_yaml(rubric: Rubric) -> str:
    """The rubric as a YAML document that reads back equal."""
    text = yaml.dump(to_dict(rubric), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return str(text)


def promotion(rubric: Rubric, target: Path) -> tuple[Path, str, str]:
    """(file, its text now, its text with `rubric` in it) for a rubric file, or for a directory, where the rubric gets a
    file of its own. Text is the same when the rubric is there already.

    A rubric of the same id that is another one is replaced by the next version where it is alone in its file or is a
    JSONL line. Raises BadInput where it shares a YAML file, or when the target is of no such kind.
    """
    known = {}
    empty = target.is_dir() and not any(p.suffix in SUFFIXES for p in target.rglob("*"))
    if target.exists() and not empty:
        known = {r.id: r for r in load_rubrics(target)}
    old = known.get(rubric.id)
    file = target / f"{rubric.id}.yaml" if target.is_dir() else target
    if target.is_dir() and old is not None and not file.exists():
        raise BadInput(target, f"rubric {rubric.id}", "is there in a file with other rubrics: promote to that file")
    if file.suffix not in (".yaml", ".yml", ".jsonl"):
        raise BadInput(target, None, "is neither a directory nor a .yaml or .jsonl file")
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    if old is not None:
        if msgspec.structs.replace(rubric, version=old.version) == old:
            return file, before, before
        rubric = parse_rubric(to_dict(msgspec.structs.replace(rubric, version=old.version + 1)), file)
    if file.suffix == ".jsonl":
        lines = [line for line in before.splitlines() if line.strip()]
        here = next((i for i, line in enumerate(lines) if msgspec.json.decode(line).get("id") == rubric.id), len(lines))
        lines[here : here + 1] = [dumps(rubric)]
        return file, before, "\n".join(lines) + "\n"
    if old is None and before.strip():
        return file, before, before.rstrip("\n") + "\n---\n" + as_yaml(rubric)
    if old is not None and len(load_rubrics(file)) > 1:
        raise BadInput(file, f"rubric {rubric.id}", "another version is there among other rubrics: replace it by hand")
    return file, before, as_yaml(rubric)


def difference(file: Path, before: str, after: str) -> str:
    """What changes, as a unified difference."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), str(file), f"{file} (new)", lineterm="", n=2)
    return "\n".join(lines)


def write_promotion(file: Path, before: str, after: str) -> None:
    """Replace the file, in one step. Raises BadInput, and changes nothing, when the new text has a lint finding that
    the old text did not have."""
    found = _findings(file, after) - (_findings(file, before) if before.strip() else set())
    if found:
        rubric, rule, message = sorted(found)[0]
        raise BadInput(file, f"rubric {rubric}", f"not promoted, lint {rule}: {message}")
    with whole_file(file) as f:
        f.write(after)


def _findings(file: Path, text: str) -> set[tuple[str, str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        aside = Path(folder) / file.name
        aside.write_text(text, encoding="utf-8")
        findings, _ = lint_paths([aside])
    return {(f.rubric or "", f.rule, f.message) for f in findings}
