"""The table of check kinds: a typed argument struct and a pure function each, registered where they are defined."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta, Struct

from megarubric.rubrics.schema import Check, Rubric

Count = Annotated[int, Meta(ge=0, le=10**9)]
Phrase = Annotated[str, Meta(min_length=1, pattern=r"\S")]
Phrases = Annotated[tuple[Phrase, ...], Meta(min_length=1)]


class CheckArgs(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every kind's arguments: unknown names are refused."""

    def problem(self) -> str | None:
        """What is wrong with the arguments taken together, or None."""
        return None


class Text(NamedTuple):
    """What a check looks at."""

    response: str
    prompt: str
    rubric: Rubric | None


class Kind(NamedTuple):
    """One kind of check.

    `follows(args, text)` says whether the condition holds. A detector's condition is that the hack is present, so its
    value is 1 on a bad answer; it belongs under a veto with `detector: true` or a negative weight.
    """

    name: str
    args: type[CheckArgs]
    follows: Callable[[Any, Text], bool]
    detector: bool
    needs_rubric: bool


KINDS: dict[str, Kind] = {}


def register[A: CheckArgs](
    name: str, args: type[A], *, detector: bool = False, needs_rubric: bool = False
) -> Callable[[Callable[[A, Text], bool]], Callable[[A, Text], bool]]:
    """Decorator: makes a function the check of kind `name`."""

    def add(follows: Callable[[A, Text], bool]) -> Callable[[A, Text], bool]:
        assert name not in KINDS, name
        KINDS[name] = Kind(name, args, follows, detector, needs_rubric)
        return follows

    return add


def arguments(kind: str, params: Mapping[str, Any]) -> CheckArgs:
    """The typed arguments. Raises ValueError with one sentence: unknown kind, unknown, missing or unfit argument."""
    entry = KINDS.get(kind)
    if entry is None:
        close = difflib.get_close_matches(kind[:100], list(KINDS), 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown check kind {kind[:100]!r}{hint}")
    try:
        args = msgspec.convert(dict(params), entry.args)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(f"{kind}: {_sentence(str(error), entry.args)}") from None
    problem = args.problem()
    if problem is not None:
        raise ValueError(f"{kind}: {problem}")
    return args


def parse_check(kind: str, params: Mapping[str, Any]) -> Check:
    """A `Check` whose arguments fit its kind. Raises ValueError."""
    arguments(kind, params)
    return Check(kind, dict(params))


def full_params(check: Check) -> dict[str, Any]:
    """The check's arguments with every default written out."""
    plain: dict[str, Any] = msgspec.to_builtins(arguments(check.kind, check.params))
    return plain


def _sentence(message: str, args: type[CheckArgs]) -> str:
    text, _, place = message.partition(" - at `$")
    name = place.rstrip("`").lstrip(".")
    takes = f"it takes {', '.join(args.__struct_fields__) or 'no arguments'}"
    if found := re.fullmatch(r"Object contains unknown field `(.*)`", text, re.DOTALL):
        return f"unknown argument {found[1][:60]!r}; {takes}"
    if found := re.fullmatch(r"Object missing required field `(.*)`", text):
        return f"the argument {found[1]} is missing; {takes}"
    if "matching regex" in text:
        text = "must not be blank"
    elif text.startswith("Invalid enum value"):
        text = f"{text[:1].lower()}{text[1:]}; one of {', '.join(_choices(args, name))}"
    else:
        text = text[:1].lower() + text[1:]
    return f"{name}: {text}" if name else text


def _choices(args: type[CheckArgs], name: str) -> list[str]:
    for field in msgspec.structs.fields(args):
        if field.name == name.split("[")[0]:
            info = msgspec.inspect.type_info(field.type)
            for option in (info, *getattr(info, "types", ())):
                if hasattr(option, "values"):
                    return [str(v) for v in option.values]
    return []
