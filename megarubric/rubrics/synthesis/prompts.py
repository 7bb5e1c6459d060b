"""The prompts that drafting sends: readable template files, filled so that no material can pass for instructions.

A template is one text file in Qwen's chat markup. ``{{name}}`` is filled in; what stands between ``{{#name}}`` and
``{{/name}}`` is there only when there is a value; ``{{=form}}`` is the file that says what a rubric looks like;
``{{nonce}}`` is a code that occurs in none of the values, for the marker lines around them. What is filled in comes out
as untrusted segments: whoever tokenises them reads no control token there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from megarubric.errors import BadInput

TEMPLATE_DIR = Path(__file__).parent / "templates"
FIELDS: dict[str, frozenset[str]] = {
    name: frozenset(fields.split())
    for name, fields in {
        "answer": "prompt",
        "criticise": "prompt reference answer",
        "draft_seeded": "prompt reference brief seeds problem",
        "draft_stronger": "prompt reference answers seeds problem",
        "mine": "prompt reference critiques count problem",
        "revise": "prompt rubric findings",
        "split": "criteria",
        "form": "families fewest most",
    }.items()
}
OPTIONAL = frozenset({"reference", "brief", "seeds", "answers", "findings", "problem"})
_MARK = re.compile(r"\{\{([#/=]?)([a-z_]+)\}\}")


class Segment(NamedTuple):
    """A stretch of a prompt; `trusted` when it is the template's own text."""

    text: str
    trusted: bool


class Templates:
    """The templates of one run, by name.

    Args:
        directory: a folder whose files stand in for the shipped ones of the same name; None for the shipped ones.
        form: values of the form's own fields (families, fewest, most).

    Raises:
        BadInput: a template that cannot be read, or that uses a field it is not given; a folder without any of them.
    """

    def __init__(self, directory: Path | None = None, form: Mapping[str, str] | None = None) -> None:
        if directory is not None and not any((directory / f"{name}.txt").is_file() for name in FIELDS):
            raise BadInput(directory, None, f"holds no template; their names are {', '.join(FIELDS)} (.txt)")
        self._text = {name: _read(name, directory) for name in FIELDS}
        for name, value in (form or {}).items():
            self._text["form"] = self._text["form"].replace("{{" + name + "}}", value)
        self.hash = hashlib.sha256(msgspec.json.encode(self._text, order="sorted")).hexdigest()

    def render(self, name: str, **values: str | None) -> list[Segment]:
        """The prompt. A value that is None or blank is not there, which only optional fields may be."""
        given = {key: value for key, value in values.items() if value is not None and value.strip()}
        if missing := FIELDS[name] - OPTIONAL - set(given):
            raise ValueError(f"template {name} needs {', '.join(sorted(missing))}")
        text = self._text[name]
        for field in FIELDS[name] & OPTIONAL:
            if field in given:
                text = text.replace("{{#" + field + "}}\n", "").replace("{{/" + field + "}}\n", "")
                text = text.replace("{{/" + field + "}}", "")
            else:
                text = re.sub(rf"\{{\{{#{field}\}}\}}\n.*?\{{\{{/{field}\}}\}}\n?", "", text, flags=re.DOTALL)
        nonce = _nonce(given.values())
        segments: list[Segment] = []
        last = 0
        for mark in _MARK.finditer(text):
            segments.append(Segment(text[last : mark.start()], True))
            last = mark.end()
            if mark[1] == "=":
                segments.append(Segment(self._text["form"], True))
            elif mark[2] == "nonce":
                segments.append(Segment(nonce, True))
            else:
                segments.append(Segment(given[mark[2]], False))
        segments.append(Segment(text[last:], True))
        return [segment for segment in segments if segment.text]


def _read(name: str, directory: Path | None) -> str:
    path = TEMPLATE_DIR / f"{name}.txt"
    if directory is not None and (directory / f"{name}.txt").is_file():
        path = directory / f"{name}.txt"
    try:
        text = path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(path, None, f"cannot be read as a template: {error}") from None
    known = FIELDS[name] | {"nonce"}
    for sign, field in _MARK.findall(text):
        if (sign == "=" and (field != "form" or name == "form")) or (sign != "=" and field not in known):
            raise BadInput(path, "{{" + sign + field + "}}", f"unknown; known here: {', '.join(sorted(known))}")
        if sign in ("#", "/") and field not in OPTIONAL:
            raise BadInput(path, "{{" + sign + field + "}}", "is never left out: it needs no section")
    plain = re.sub(r"\{\{#([a-z_]+)\}\}.*?\{\{/\1\}\}", "", text, flags=re.DOTALL)
    for sign, field in _MARK.findall(plain):
        if sign in ("#", "/"):
            raise BadInput(path, "{{" + sign + field + "}}", "a section that is not closed, or not opened")
        if not sign and field in OPTIONAL:
            raise BadInput(
                path, "{{" + field + "}}", f"may be missing: it belongs between {{{{#{field}}}}} and its end"
            )
    for field in sorted(known - OPTIONAL - {"nonce", "count"}):
        if not re.search(r"\{\{" + field + r"\}\}", text) and name != "form":
            raise BadInput(path, "{{" + field + "}}", "missing")
    return text


def _nonce(values: Iterable[str]) -> str:
    """Eight hex digits that depend on the values and occur in none of them."""
    texts = list(values)
    digest = hashlib.sha256(msgspec.json.encode(texts)).hexdigest()
    while any(digest[:8] in text.casefold() for text in texts):
        digest = hashlib.sha256(digest.encode()).hexdigest()
    return digest[:8]
