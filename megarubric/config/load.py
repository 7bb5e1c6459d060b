"""YAML + dotted overrides -> typed configuration, or one line that says what is wrong and where."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from megarubric.config.schema import SftConfig, TrainConfig, check_sft, check_train
from megarubric.errors import BadInput

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number (YAML 1.1: text) and 12:00:00 as text (YAML 1.1: 43200, to the base 60)."""


_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_BASE_60 = re.compile(r"[-+]?\d+(:[0-5]?\d)+(\.\d*)?$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
for _first in "-+0123456789":  # before the one for whole numbers; the lists are this class's own by now
    _Loader.yaml_implicit_resolvers[_first].insert(0, ("tag:yaml.org,2002:str", _BASE_60))


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader: plain data only


def load_train(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a `TrainConfig`. Raises BadInput naming the file and the key."""
    config = _load(path, overrides, TrainConfig)
    _refuse(path, check_train(config))
    return config


def load_sft(path: str | Path, overrides: Sequence[str] = ()) -> SftConfig:
    """Read an `SftConfig`. Raises BadInput naming the file and the key."""
    config = _load(path, overrides, SftConfig)
    _refuse(path, check_sft(config))
    return config


def dump(config: TrainConfig | SftConfig) -> str:
    """The resolved configuration as YAML, every default spelled out."""
    return yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False, allow_unicode=True)


def _refuse(path: str | Path, wrong: str | None) -> None:
    if wrong is not None:
        item, _, reason = wrong.partition(": ")
        raise BadInput(path, item, reason)


def _load[T: (TrainConfig, SftConfig)](path: str | Path, overrides: Sequence[str], kind: type[T]) -> T:
    path = Path(path)
    try:
        tree = _parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(path, None, "no such file") from None
    except OSError as error:
        raise BadInput(path, None, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadInput(path, None, f"is not UTF-8 text (byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}" if mark else None
        raise BadInput(path, line, f"not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise BadInput(path, None, "a configuration is a mapping of sections")
    for override in overrides:
        _apply(tree, override)
    for key, number in _not_finite(tree, ""):
        raise BadInput(path, key, f"{number} is not a finite number")
    try:
        config = msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        raise BadInput(path, *_explain(str(error), kind)) from None
    if not _NAME.fullmatch(config.name):
        raise BadInput(path, "name", f"{config.name!r} is not a run name: letters, digits, dot, dash and underscore")
    if not 0 <= config.seed < 2**32:
        raise BadInput(path, "seed", f"must lie between 0 and 2**32 - 1, is {config.seed}")
    return config


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise BadInput("command line", override, "an override is section.key=value")
    try:
        value = _parse(text)
    except yaml.YAMLError:
        raise BadInput("command line", override, "the value is not YAML") from None
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise BadInput("command line", override, f"{section} is not a section")
    node[last] = value


def _not_finite(node: Any, key: str) -> Iterator[tuple[str, float]]:
    """Dotted key and value of every NaN and infinity: they pass for numbers and every comparison lets NaN through."""
    if isinstance(node, float) and not math.isfinite(node):
        yield key, node
    elif isinstance(node, dict | list):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _not_finite(value, f"{key}.{name}" if key else str(name))


def _explain(message: str, kind: type) -> tuple[str, str]:
    """msgspec's message -> (dotted key, sentence), with the nearest known key for an unknown one."""
    text, _, where = message.partition(" - at `$")
    place = where.rstrip("`").strip(".").removeprefix("[...]")
    unknown = re.search(r"unknown field `(.+?)`", text)
    if unknown:
        node: Any = kind
        for part in filter(None, place.split(".")):
            node = {f.name: f.type for f in msgspec.structs.fields(node)}.get(part, node)
        names = [f.name for f in msgspec.structs.fields(node)]
        near = difflib.get_close_matches(unknown[1], names, 1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(names)}"
        return ".".join(filter(None, (place, unknown[1]))), f"unknown key; {hint}"
    missing = re.search(r"missing required field `(.+?)`", text)
    if missing:
        return ".".join(filter(None, (place, missing[1]))), "required, and missing"
    return place or "config", text[:1].lower() + text[1:]
