"""JSON schemas of the replies asked for, for servers that hold a model to one. Reading never relies on them."""

from __future__ import annotations

from typing import Any

from megarubric.rubrics.schema import FAMILIES


def _object(**properties: Any) -> dict[str, Any]:
    """An object with exactly these keys; strict structured output wants every one of them required."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_TEXT = {"type": "string"}
_TIERS = {"type": "array", "items": _object(value={"type": "number"}, text=_TEXT)}
_RELATION = {"type": "string", "enum": ["at least", "at most", "less than", "exactly"]}


def _check(kind: str, **arguments: Any) -> dict[str, Any]:
    return _object(kind={"type": "string", "enum": [kind]}, **arguments)


_WORDS = {"type": "array", "items": _TEXT}
_CHECK = {
    "anyOf": [
        {"type": "null"},
        _check("length_constraints:number_words", relation=_RELATION, num_words={"type": "integer"}),
        _check("length_constraints:number_sentences", relation=_RELATION, num_sentences={"type": "integer"}),
        _check("keywords:existence", keywords=_WORDS),
        _check("keywords:forbidden_words", forbidden_words=_WORDS),
        _check("detectable_format:json_format"),
    ]
}
_CRITERION = _object(
    description=_TEXT,
    weight={"type": "number"},
    tiers={"anyOf": [_TIERS, {"type": "null"}]},
    check=_CHECK,
    veto={"type": "boolean"},
    needs_reference={"type": "boolean"},
)

DRAFT_SCHEMA = _object(
    title=_TEXT,
    family={"type": "string", "enum": list(FAMILIES)},
    criteria={"type": "array", "items": _CRITERION},
)
SPLIT_SCHEMA = _object(
    parts={"type": "array", "items": _object(of={"type": "integer"}, description=_TEXT, tiers=_TIERS)},
)
