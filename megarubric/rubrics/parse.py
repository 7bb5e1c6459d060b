"""Plain data -> `Rubric`, or one line that names file, line or rubric, criterion and key."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from megarubric.errors import BadInput
from megarubric.rubrics.checks import parse_check
from megarubric.rubrics.schema import (
    Criterion,
    KeyPath,
    Pair,
    Provenance,
    Rubric,
    Saturation,
    Shaping,
    Tier,
    Veto,
)


class Problem(ValueError):
    """What is wrong with a rubric, and where in it; `parse_rubric` turns it into BadInput."""

    def __init__(self, path: KeyPath, reason: str) -> None:
        super().__init__(reason)
        self.path = path


def parse_rubric(
    obj: object, where: object, item: str | None = None, lines: Mapping[KeyPath, int] | None = None
) -> Rubric:
    """The rubric that `obj` (a mapping as JSON or YAML gives it) describes.

    Args:
        obj: plain data. It is not changed.
        where: the file, for messages.
        item: the line of the file, when a line holds one rubric ("line 7").
        lines: line number of each path inside a rubric that spans many lines.

    Raises:
        BadInput: unknown key, wrong type, value out of range, broken rule; names the rubric, criterion and key.
    """
    try:
        return build(obj)
    except Problem as problem:
        raise BadInput(where, _item(obj, problem.path, item, lines), str(problem)) from None


def build(obj: object) -> Rubric:
    """`parse_rubric` without a file: raises `Problem`."""
    if not isinstance(obj, dict):
        raise Problem((), f"a rubric is a mapping of keys, not {kind_name(obj)}")
    tree = {key: value for key, value in obj.items() if not (value is None and key in ("tags", "pairs"))}
    if "scope" not in tree and tree.get("prompt") is not None:
        tree["scope"] = "instance"
    if isinstance(tree.get("criteria"), list | tuple):
        tree["criteria"] = [_with_check(c, i) for i, c in enumerate(tree["criteria"])]
    try:
        rubric = msgspec.convert(tree, Rubric)
    except msgspec.ValidationError as error:
        raise _explained(str(error), tree) from None
    except (RecursionError, OverflowError, UnicodeError) as error:
        raise Problem((), f"cannot be read: {error}") from None
    for path, reason in _broken_rules(rubric):
        raise Problem(path, reason)
    try:
        msgspec.json.encode(rubric)  # lone surrogates survive JSON escapes but have no UTF-8
    except (UnicodeError, TypeError, RecursionError) as error:
        raise Problem((), f"holds what cannot be written as UTF-8 text: {error}") from None
    return rubric


def _with_check(criterion: Any, position: int) -> Any:
    """The criterion with its `check`, flat in files, turned into a `Check`."""
    if not isinstance(criterion, dict) or criterion.get("check") is None:
        return criterion
    check, path = criterion["check"], ("criteria", position, "check")
    if not isinstance(check, dict):
        raise Problem(path, f"a check is a mapping with a kind, not {kind_name(check)}")
    params = dict(check)
    kind = params.pop("kind", None)
    if kind is None:
        raise Problem((*path, "kind"), "required, and missing")
    if not isinstance(kind, str):
        raise Problem((*path, "kind"), f"must be text, not {kind_name(kind)}")
    try:
        return {**criterion, "check": parse_check(kind, params)}
    except ValueError as error:
        raise Problem(path, str(error)) from None


def _broken_rules(rubric: Rubric) -> Iterator[tuple[KeyPath, str]]:
    """What the types cannot say."""
    if not math.isfinite(rubric.veto_reward):
        yield ("veto_reward",), f"{rubric.veto_reward} is not a finite number"
    if rubric.version > 2**31 - 1:
        yield ("version",), "too large"
    who = rubric.provenance
    if who is not None and who.author != "human" and not (who.model and who.model.strip()):
        yield ("provenance", "model"), f"required when the author is {who.author}, and missing"
    seen: dict[str, int] = {}
    for i, criterion in enumerate(rubric.criteria):
        if criterion.id in seen:
            yield (
                ("criteria", i, "id"),
                f"criterion id {criterion.id!r} appears twice (criteria {seen[criterion.id]} and {i})",
            )
        seen[criterion.id] = i
        yield from _broken_criterion(criterion, ("criteria", i))
    for i, pair in enumerate(rubric.pairs):
        yield from _broken_pair(pair, ("pairs", i), seen)
    if rubric.shaping is not None:
        for name in ("alpha", "power"):
            if not math.isfinite(getattr(rubric.shaping, name)):
                yield ("shaping", name), "not a finite number"


def _broken_criterion(criterion: Criterion, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if not math.isfinite(criterion.weight):
        yield (*path, "weight"), f"{criterion.weight} is not a finite number"
    if criterion.saturation is not None and not math.isfinite(criterion.saturation.beta):
        yield (*path, "saturation", "beta"), "not a finite number"
    if criterion.tiers is None:
        return
    if criterion.check is not None:
        yield (*path, "tiers"), "a criterion has tiers or a check, not both"
    if len(criterion.tiers) < 2:
        yield (*path, "tiers"), f"needs at least two tiers, has {len(criterion.tiers)}"
    last = -math.inf
    for i, tier in enumerate(criterion.tiers):
        if not math.isfinite(tier.value):
            yield (*path, "tiers", i, "value"), f"{tier.value} is not a finite number"
        if tier.value <= last:
            yield (
                (*path, "tiers", i, "value"),
                f"tier values must increase strictly, and {tier.value:g} follows {last:g}",
            )
        last = tier.value
    if not math.isfinite(criterion.tiers[-1].value - criterion.tiers[0].value):
        yield (*path, "tiers"), "the range of the tier values is too large"


def _broken_pair(pair: Pair, path: KeyPath, known: Mapping[str, int]) -> Iterator[tuple[KeyPath, str]]:
    for side in ("a", "b"):
        name = getattr(pair, side)
        if name not in known:
            yield (*path, side), f"names the unknown criterion {shown(name)}{_near(name, known)}"
    if pair.a == pair.b:
        yield (*path, "b"), f"a and b are both {pair.a}: a pair joins two different criteria"
    if not math.isfinite(pair.weight):
        yield (*path, "weight"), f"{pair.weight} is not a finite number"


# --- messages --------------------------------------------------------------------------------------------------------

_KIND_NAMES: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
    type(None): "nothing (null)",
}
_MSGSPEC_NAMES = {
    "str": "text",
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "nothing (null)",
}
_BOUNDS = {">=": "at least", "<=": "at most", "<": "below", ">": "above"}
_STRUCTS: dict[str, type[msgspec.Struct]] = {
    "criteria": Criterion,
    "tiers": Tier,
    "veto": Veto,
    "saturation": Saturation,
    "pairs": Pair,
    "shaping": Shaping,
    "provenance": Provenance,
}


def kind_name(value: object) -> str:
    """What a value is, in words."""
    return _KIND_NAMES.get(type(value), f"a {type(value).__name__}")


def shown(value: object) -> str:
    """A value in a message, cut when long."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 60 else text[:57] + "..."


def _near(name: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name[:200], list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


def _value_at(tree: Any, path: KeyPath) -> Any:
    for part in path:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def _explained(message: str, tree: dict[Any, Any]) -> Problem:
    """msgspec's message as a `Problem` with a sentence of ours."""
    text, _, place = message.partition(" - at ")
    spot = place.rsplit("`$", 1)[-1].rstrip("`")
    path: KeyPath = tuple(int(n) if n else key for n, key in re.findall(r"\[(\d+)\]|\.([^.\[\]]+)", spot))
    value = _value_at(tree, path)
    if place.startswith("`key`"):
        return Problem(path, "keys must be text")
    if found := re.fullmatch(r"Object contains unknown field `(.*)`", text, re.DOTALL):
        key = found[1]
        names = _known_keys(path)
        hint = _near(key, names) or f"; known here: {', '.join(names)}"
        return Problem((*path, key), f"unknown key {shown(key)}{hint}")
    if found := re.fullmatch(r"Object missing required field `(.*)`", text):
        return Problem((*path, found[1]), "required, and missing")
    if text.startswith("Invalid enum value"):
        return Problem(path, f"{shown(value)} is not one of {', '.join(_choices(path))}")
    if "matching regex" in text:
        allowed = "a-z 0-9 . _ -" if path == ("id",) else "letters, digits and . _ : -"
        return Problem(path, f"{shown(value)} is not an id: only {allowed}, at least one")
    if found := re.fullmatch(r"Expected `(.+?)`, got `(.+?)`", text):
        wanted = [_MSGSPEC_NAMES.get(t.strip(), t.strip()) for t in found[1].split("|") if t.strip() != "null"]
        return Problem(path, f"must be {' or '.join(wanted)}, not {kind_name(value)} ({shown(value)})")
    if found := re.fullmatch(r"Expected `\w+`(?: of length)? (>=|<=|<|>) (\S+)", text):
        size = "its length " if "length" in text else ""
        return Problem(path, f"{size}must be {_BOUNDS[found[1]]} {float(found[2]):g}, not {shown(value)}")
    return Problem(path, text[:1].lower() + text[1:])


def _struct_at(path: KeyPath) -> type[msgspec.Struct]:
    names = [part for part in path if isinstance(part, str)]
    return _STRUCTS.get(names[-1], Rubric) if names else Rubric


def _known_keys(path: KeyPath) -> tuple[str, ...]:
    return _struct_at(path).__struct_fields__


def _choices(path: KeyPath) -> tuple[str, ...]:
    hints = msgspec.inspect.type_info(_struct_at(path[:-1]))
    for field in getattr(hints, "fields", ()):
        if field.name == path[-1]:
            options = [field.type, *getattr(field.type, "types", ())]
            return next((tuple(map(str, o.values)) for o in options if hasattr(o, "values")), ())
    return ()


def _item(obj: object, path: KeyPath, item: str | None, lines: Mapping[KeyPath, int] | None) -> str:
    """ "line 12, rubric story.plain, criterion length, check.kind" as far as it is known."""
    parts = [item] if item else []
    if lines:
        near = next((lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in lines), None)
        if near is not None:
            parts.append(f"line {near}")
    if isinstance(obj, dict) and isinstance(obj.get("id"), str):
        parts.append(f"rubric {shown(obj['id'])[1:-1]}")
    rest = path
    if len(path) >= 2 and path[0] == "criteria":
        name = _value_at(obj, (*path[:2], "id"))
        parts.append(f"criterion {shown(name)[1:-1]}" if isinstance(name, str) else f"criteria[{path[1]}]")
        rest = path[2:]
    elif len(path) >= 2 and path[0] == "pairs":
        a, b = (_value_at(obj, (*path[:2], side)) for side in "ab")
        parts.append(f"pair {shown(a)[1:-1]}*{shown(b)[1:-1]}" if isinstance(a, str) and isinstance(b, str) else "pair")
        rest = path[2:]
    words = "".join(f"[{p}]" if isinstance(p, int) else f".{shown(p)[1:-1]}" for p in rest).lstrip(".")
    return ", ".join([*parts, words] if words else parts)
