"""`detectable_format:*` and `detectable_content:*`. Every scan is linear in the length of the response."""

from __future__ import annotations

import json
import re

from megarubric.rubrics.checks.registry import CheckArgs, Count, Phrase, Text, register

CONSTRAINED_RESPONSES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")

_STAR_BULLET = re.compile(r"^[^\S\n]*[*][^*].*$", re.MULTILINE)
_DASH_BULLET = re.compile(r"^[^\S\n]*-", re.MULTILINE)
_EMPHASIS = re.compile(r"[*]([^\n*]*)[*]")
_STRONG = re.compile(r"[*][*]([^\n*]*)[*][*]")
_FENCES = ("```json", "```Json", "```JSON", "```")


class NoArgs(CheckArgs, frozen=True):
    pass


class NumberBulletLists(CheckArgs, frozen=True):
    num_bullets: Count


class NumberHighlightedSections(CheckArgs, frozen=True):
    num_highlights: Count


class MultipleSections(CheckArgs, frozen=True):
    section_spliter: Phrase  # IFEval's spelling
    num_sections: Count


class NumberPlaceholders(CheckArgs, frozen=True):
    num_placeholders: Count


class Postscript(CheckArgs, frozen=True):
    postscript_marker: Phrase


@register("detectable_format:number_bullet_lists", NumberBulletLists)
def number_bullet_lists(args: NumberBulletLists, text: Text) -> bool:
    """Exactly so many lines that begin with `*` or `-`."""
    found = len(_STAR_BULLET.findall(text.response)) + len(_DASH_BULLET.findall(text.response))
    return found == args.num_bullets


@register("detectable_format:number_highlighted_sections", NumberHighlightedSections)
def number_highlighted_sections(args: NumberHighlightedSections, text: Text) -> bool:
    """At least so many `*highlighted*` or `**highlighted**` stretches that are not blank."""
    found = sum(bool(h.strip()) for pattern in (_EMPHASIS, _STRONG) for h in pattern.findall(text.response))
    return found >= args.num_highlights


@register("detectable_format:multiple_sections", MultipleSections)
def multiple_sections(args: MultipleSections, text: Text) -> bool:
    """At least so many headings "SPLITTER n"."""
    heading = re.escape(args.section_spliter.strip()) + r"\s?\d+"
    return len(re.findall(heading, text.response)) >= args.num_sections


@register("detectable_format:constrained_response", NoArgs)
def constrained_response(args: NoArgs, text: Text) -> bool:
    """Contains one of IFEval's three fixed answers."""
    return any(option in text.response for option in CONSTRAINED_RESPONSES)


@register("detectable_format:json_format", NoArgs)
def json_format(args: NoArgs, text: Text) -> bool:
    """The whole response is JSON, in a Markdown fence or bare."""
    body = text.response.strip()
    for fence in _FENCES:
        body = body.removeprefix(fence)
    try:
        json.loads(body.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


@register("detectable_format:title", NoArgs)
def title(args: NoArgs, text: Text) -> bool:
    """A line has a title in double angular brackets, `<<poem of joy>>`, that is not blank."""
    for line in text.response.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if start >= 0 and end >= start + 3 and line[start : end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


@register("detectable_content:number_placeholders", NumberPlaceholders)
def number_placeholders(args: NumberPlaceholders, text: Text) -> bool:
    """At least so many `[placeholders]`."""
    found = 0
    for line in text.response.split("\n"):
        start = line.find("[")
        while start >= 0 and (end := line.find("]", start)) >= 0:
            found += 1
            start = line.find("[", end)
    return found >= args.num_placeholders


@register("detectable_content:postscript", Postscript)
def postscript(args: Postscript, text: Text) -> bool:
    """The marker occurs, in any case; `P.S.` and `P.P.S` may have a space after each point."""
    marker = args.postscript_marker.strip()
    if marker == "P.P.S":
        pattern = r"p\.\s?p\.\s?s"
    elif marker == "P.S.":
        pattern = r"p\.\s?s\."
    else:
        pattern = re.escape(marker.lower())
    return re.search(pattern, text.response.lower()) is not None
