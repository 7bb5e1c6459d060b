"""What importers share: the report, ids, and the words for what is not known."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megarubric.rubrics.schema import Rubric

NOT_STATED = "not stated by the source"


@dataclass
class Report:
    """What became of one file.

    Attributes:
        rows: lines or list items read.
        criteria_in: criteria (questions, checklist entries, instructions) the usable rows hold.
        lost: what our schema does not hold, by kind, with how often.
        refused: (place, reason) of rows that could not be used.
    """

    file: str
    format: str
    rows: int = 0
    criteria_in: int = 0
    rubrics: list[Rubric] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    refused: list[tuple[str, str]] = field(default_factory=list)

    @property
    def criteria_out(self) -> int:
        """Criteria of the rubrics made."""
        return sum(len(r.criteria) for r in self.rubrics)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "file": self.file,
            "format": self.format,
            "rows": self.rows,
            "rubrics": len(self.rubrics),
            "criteria_in": self.criteria_in,
            "criteria_out": self.criteria_out,
            "lost": dict(self.lost),
            "refused": [{"place": place, "reason": reason} for place, reason in self.refused],
        }

    def summary(self) -> str:
        """One line, and one for every kind of loss."""
        head = (
            f"{self.file} ({self.format}): {self.rows:,} rows with {self.criteria_in:,} criteria in, "
            f"{len(self.rubrics):,} rubrics with {self.criteria_out:,} criteria out, {len(self.refused):,} refused"
        )
        return "\n".join([head, *(f"  lost: {what} ({n:,})" for what, n in self.lost.most_common())])


class Importer(NamedTuple):
    """`fits` tells the format from a row; `convert(row, number, report)` gives rubric trees."""

    fits: Callable[[dict[str, Any]], bool]
    convert: Callable[[dict[str, Any], int, Report], list[dict[str, Any]]]


def slug(text: str, fallback: str, limit: int = 60) -> str:
    """An id made of `text`: lower case a-z, 0-9 and dashes; `fallback` when nothing is left."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9.]+", "-", plain).strip("-.")[:limit].strip("-.") or fallback


def unique_ids(names: Iterable[str]) -> list[str]:
    """The names, a number added to those that came before."""
    seen: Counter[str] = Counter()
    out: list[str] = []
    for name in names:
        seen[name] += 1
        new = name if seen[name] == 1 else f"{name}-{seen[name]}"
        while new in out:
            seen[name] += 1
            new = f"{name}-{seen[name]}"
        out.append(new)
    return out


def is_chinese(text: str) -> bool:
    """Whether a fifth or more of the characters are Chinese."""
    return sum("\u4e00" <= c <= "\u9fff" for c in text) >= 0.2 * max(1, len(text))


def conversation(prompt: object) -> tuple[str, int]:
    """(text, number of turns) of a prompt that is text or a list of {role, content} turns."""
    if isinstance(prompt, str):
        return prompt, 1
    if not isinstance(prompt, list) or not prompt:
        raise ValueError("the prompt is neither text nor a list of turns")
    if len(prompt) == 1:
        return str(prompt[0]["content"]), 1
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in prompt), len(prompt)
