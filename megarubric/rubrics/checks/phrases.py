"""Phrase patterns that can be read: a space stands for white space, `<NAME>` for a fragment."""

from __future__ import annotations

import re


def words(*lists: str) -> str:
    """Alternatives from space-separated lists; "_" inside one stands for a space or hyphen."""
    items = [item.replace("_", "[ -]?") for part in lists for item in part.split()]
    return f"(?:{'|'.join(items)})"


def fill(template: str, **fragments: str) -> str:
    """The template with `<NAME>` replaced by its fragment, and spaces by white space."""

    def fragment(match: re.Match[str]) -> str:
        return fragments[match[1]]

    filled = template
    while (again := re.sub(r"<([A-Z_]+)>", fragment, filled)) != filled:
        filled = again
    return re.sub(r"(?<!\[) +", r"\\s+", filled)


def pattern(*templates: str, **fragments: str) -> re.Pattern[str]:
    """One compiled pattern of all templates, each a regular expression as `fill` reads it. Gaps are written
    `<GAP:n>`: at most n characters of the same sentence."""
    body = "|".join(fill(re.sub(r"<GAP:(\d+)>", r"[^.!?\\n]{0,\1}", t), **fragments) for t in templates)
    return re.compile(body)
