"""YAML -> plain data with the line of every key, from parser events.

A composer of our own because PyYAML's (a) recurses, so deeply nested input overflows the stack of its C loader, (b)
takes the last of two equal keys, (c) expands aliases without bound, (d) reads YAML 1.1: `no` as false, `1:30` as 90,
`010` as 8, a bare date as an object. Here: a nesting limit, duplicate keys refused, no aliases and no tags, and the
scalars of YAML 1.2's core schema, with two exceptions that are refused because they are more likely slips than wishes:
bare dates and infinities.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from megarubric.rubrics.schema import KeyPath

MAX_DEPTH = 32  # a rubric needs 5

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_DATE = re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ].*)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # only its event parser is used
_TEXT_TAGS = ("!", "tag:yaml.org,2002:str")


class YamlProblem(ValueError):
    """What is wrong with a YAML text, and the line (from 1)."""

    def __init__(self, line: int | None, reason: str) -> None:
        super().__init__(reason)
        self.line = line


class _Open:
    """A mapping or list being filled."""

    __slots__ = ("key", "path", "value", "waiting")

    def __init__(self, value: dict[str, Any] | list[Any], path: KeyPath) -> None:
        self.value = value
        self.path = path
        self.key: str | None = None
        self.waiting = False  # a mapping whose key is read and whose value is not


def documents(text: str) -> Iterator[tuple[Any, dict[KeyPath, int]]]:
    """Every document of a YAML text with the line of each path in it. Raises YamlProblem."""
    stack: list[_Open] = []
    root: Any = None
    lines: dict[KeyPath, int] = {}
    try:
        for event in yaml.parse(text, Loader=_Loader):
            line = event.start_mark.line + 1 if event.start_mark else 0
            if isinstance(event, yaml.DocumentStartEvent):
                root, lines = None, {}
            elif isinstance(event, yaml.DocumentEndEvent):
                yield root, lines
            elif isinstance(event, yaml.AliasEvent):
                raise YamlProblem(line, f"aliases (*{event.anchor}) are not read: write the value out")
            elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
                if event.tag is not None:
                    raise YamlProblem(line, f"the tag {event.tag} is not read")
                if len(stack) >= MAX_DEPTH:
                    raise YamlProblem(line, f"nested deeper than {MAX_DEPTH}")
                value: dict[str, Any] | list[Any] = {} if isinstance(event, yaml.MappingStartEvent) else []
                path = _place(stack, value, line, lines)
                if not stack:
                    root = value
                stack.append(_Open(value, path))
            elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
                stack.pop()
            elif isinstance(event, yaml.ScalarEvent):
                top = stack[-1] if stack else None
                if top is not None and isinstance(top.value, dict) and not top.waiting:
                    _take_key(top, event.value, line)
                else:
                    scalar = _scalar(event, line)
                    _place(stack, scalar, line, lines)
                    if not stack:
                        root = scalar
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlProblem(mark.line + 1 if mark else None, f"not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        position = getattr(error, "position", None)
        at = text.count("\n", 0, position) + 1 if isinstance(position, int) else None
        raise YamlProblem(at, f"not YAML: {getattr(error, 'reason', 'unreadable')}") from None


def _take_key(top: _Open, key: str, line: int) -> None:
    if key in top.value:
        raise YamlProblem(line, f"the key {key[:60]!r} appears twice")
    top.key, top.waiting = key, True


def _place(stack: list[_Open], value: Any, line: int, lines: dict[KeyPath, int]) -> KeyPath:
    """Put a value where it belongs; returns its path."""
    if not stack:
        lines[()] = line
        return ()
    top = stack[-1]
    if isinstance(top.value, list):
        path = (*top.path, len(top.value))
        top.value.append(value)
    elif not top.waiting or top.key is None:
        raise YamlProblem(line, "a key must be text, not a list or a mapping")
    else:
        path = (*top.path, top.key)
        top.value[top.key] = value
        top.waiting = False
    lines[path] = line
    return path


def _scalar(event: Any, line: int) -> Any:
    text: str = event.value
    if event.tag is not None:
        if event.tag in _TEXT_TAGS:
            return text
        raise YamlProblem(line, f"the tag {event.tag} is not read")
    if not event.implicit[0]:
        return text  # quoted or a block
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        if len(text) > 100:
            raise YamlProblem(line, "a number of more than 100 digits")
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        raise YamlProblem(line, f"{text} is not a finite number")
    if _DATE.fullmatch(text):
        raise YamlProblem(line, f"{text[:40]} is a bare date; quote it if text is meant")
    return text
