"""A kit: one kind of task, its hand-written scenarios and forms, and the instance rubrics they compose.

A scenario is a concrete case: facts as slots, and criteria of its own that hold for this case only. A form is a way to
ask about it: a prompt and the criteria of the craft, with the scenario's facts put in where `{slot}` stands (`{Slot}`
starts with a capital). Every scenario meets every form (or those it names), and each meeting is one instance rubric.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from megarubric.errors import BadInput
from megarubric.rubrics.parse import parse_rubric
from megarubric.rubrics.schema import Rubric
from megarubric.rubrics.yaml_reader import YamlProblem, documents

SLOT = re.compile(r"\{([A-Za-z][A-Za-z0-9_]*)\}")
SPECIFIC_AT_LEAST = 3  # criteria of an instance that speak of its own case
Plain = str | int | float


class Line(Struct, frozen=True, forbid_unknown_fields=True):
    """A criterion in short: description `d`, weight `w`, tier texts `t` (values 0, 1, 2...) or a check."""

    id: str
    d: str
    w: float = 1.0
    t: tuple[str, ...] = ()
    check: dict[str, Any] | None = None
    veto: float | None = None  # threshold; a detector when the weight is 0 and the check is one
    detector: bool = False
    sat: tuple[float, float] | None = None  # theta, beta
    ref: bool = False
    forms: tuple[str, ...] = ()  # of a scenario's own criterion: only with these forms


class Scenario(Struct, frozen=True, forbid_unknown_fields=True):
    """One case. `name` goes into the title; `slots` fill the forms; `own` are its criteria."""

    key: str
    name: str
    slots: dict[str, Plain | list[Plain]]
    own: tuple[Line, ...] = ()
    reference: str | None = None
    forms: tuple[str, ...] = ()


class Form(Struct, frozen=True, forbid_unknown_fields=True):
    """One way to ask. `pairs` are [a, b, weight, kind]; `shaping` is [kappa, alpha, power]."""

    key: str
    prompt: str
    criteria: tuple[Line, ...]
    title: str | None = None
    reference: str | None = None
    pairs: tuple[tuple[str, str, float, str], ...] = ()
    shaping: tuple[float, float, float] | None = None


class Kit(Struct, frozen=True, forbid_unknown_fields=True):
    """One file. `kit` is the kind of task (also the id of its task rubric, FAMILY.KIT)."""

    kit: str
    family: str
    title: str
    scenarios: tuple[Scenario, ...]
    forms: tuple[Form, ...]
    tags: tuple[str, ...] = ()


def read_kit(path: Path) -> Kit:
    """Raises BadInput that names the file and the reason."""
    try:
        (data, _), *more = documents(path.read_text(encoding="utf-8"))
        if more:
            raise BadInput(path, None, "holds more than one document")
        kit = msgspec.convert(data, Kit)
    except YamlProblem as error:
        raise BadInput(path, f"line {error.line}", str(error)) from None
    except (msgspec.ValidationError, ValueError) as error:
        raise BadInput(path, None, str(error)) from None
    if path.stem != kit.kit or path.parent.name != kit.family:
        raise BadInput(path, None, f"kit {kit.family}/{kit.kit} should stand in {kit.family}/{kit.kit}.yaml")
    return kit


class _Filler:
    """Puts a scenario's facts into texts, and notes which were used."""

    def __init__(self, slots: Mapping[str, Any], where: Path, item: str) -> None:
        self.slots, self.where, self.item = slots, where, item
        self.used: set[str] = set()

    def value(self, value: Any) -> Any:
        """A text with its slots filled; a text that is one slot keeps the slot's type; containers item by item."""
        if isinstance(value, dict):
            return {k: self.value(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(v) for v in value]
        if not isinstance(value, str):
            return value
        whole = SLOT.fullmatch(value)
        if whole and whole[1] in self.slots:
            self.used.add(whole[1])
            return self.slots[whole[1]]
        return SLOT.sub(self._text, value).strip()

    def _text(self, found: re.Match[str]) -> str:
        name = found[1]
        if name in self.slots:
            self.used.add(name)
            return str(self.slots[name])
        lower = name[0].lower() + name[1:]
        if lower in self.slots:
            self.used.add(lower)
            text = str(self.slots[lower])
            return text[:1].upper() + text[1:]
        raise BadInput(self.where, self.item, f"no slot {{{name}}}")


def _criterion(line: Line, fill: _Filler) -> dict[str, Any]:
    out: dict[str, Any] = {"id": line.id, "description": fill.value(line.d), "weight": line.w}
    if line.check is not None:
        out["check"] = fill.value(line.check)
    elif line.t:
        out["tiers"] = [{"value": k, "text": fill.value(text)} for k, text in enumerate(line.t)]
    if line.ref:
        out["needs_reference"] = True
    if line.veto is not None:
        out["veto"] = {"threshold": line.veto, "detector": line.detector}
    if line.sat is not None:
        out["saturation"] = {"theta": line.sat[0], "beta": line.sat[1]}
    return out


def _specific(line: Line) -> bool:
    return any(SLOT.search(text) for text in (line.d, *line.t, str(line.check or "")))


def compose(kit: Kit, path: Path, provenance: Mapping[str, str]) -> Iterator[Rubric]:
    """The instance rubrics of a kit, in the order scenario, form. Raises BadInput (also for a slot nothing uses)."""
    keys = [form.key for form in kit.forms]
    for scenario in kit.scenarios:
        used: set[str] = set()
        for form in kit.forms:
            if scenario.forms and form.key not in scenario.forms:
                continue
            item = f"{scenario.key}.{form.key}"
            fill = _Filler(scenario.slots, path, item)
            own = [line for line in scenario.own if not line.forms or form.key in line.forms]
            specific = len(own) + sum(map(_specific, form.criteria))
            if specific < SPECIFIC_AT_LEAST:
                raise BadInput(path, item, f"{specific} criteria speak of this case; {SPECIFIC_AT_LEAST} should")
            reference = scenario.reference or form.reference
            lines = [*own, *form.criteria]
            data = {
                "id": f"{kit.family}.{kit.kit}.{scenario.key}.{form.key}",
                "title": f"{form.title or kit.title}: {scenario.name}",
                "scope": "instance",
                "family": kit.family,
                "provenance": dict(provenance),
                "tags": list(kit.tags),
                "prompt": fill.value(form.prompt),
                "reference": fill.value(reference) if reference and any(line.ref for line in lines) else None,
                "criteria": [_criterion(line, fill) for line in lines],
                "pairs": [{"a": a, "b": b, "weight": w, "kind": kind} for a, b, w, kind in form.pairs],
            }
            if form.shaping is not None:
                data["shaping"] = dict(zip(("kappa", "alpha", "power"), form.shaping))
            yield parse_rubric(data, path, item)
            used |= fill.used
        unknown = [k for line in scenario.own for k in line.forms if k not in keys] + [
            k for k in scenario.forms if k not in keys
        ]
        if unknown:
            raise BadInput(path, scenario.key, f"no form {unknown[0]}")
        unused = sorted(set(scenario.slots) - used)
        if unused:
            raise BadInput(path, scenario.key, f"no form uses the slot {unused[0]}")
