"""The rubric as typed, frozen structs (contract: the rubric file format), its plain form and its content hash.

`megarubric.rubrics.parse.parse_rubric` is the only way in, so a `Rubric` that exists is valid.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from megarubric.config.schema import Family as Family  # lives below, where a run names the families it trains on

Scope = Literal["dataset", "task", "instance"]
Author = Literal["human", "llm", "hybrid"]
PairKind = Literal["product", "min", "gap"]
MissingVeto = Literal["unscored", "pass", "fail"]
KeyPath = tuple[str | int, ...]  # a place in a rubric's plain form: ("criteria", 2, "tiers", 0, "value")
SCOPES: tuple[Scope, ...] = get_args(Scope)
FAMILIES: tuple[Family, ...] = get_args(Family)

# `\Z`, not `$`: the latter lets a trailing newline through.
RubricId = Annotated[str, Meta(pattern=r"^[a-z0-9._-]+\Z", max_length=200)]
# Criterion ids become metric names and, joined by "*", attribution keys.
CriterionId = Annotated[str, Meta(pattern=r"^[\w.:-]+\Z", max_length=200)]


class Tier(Struct, frozen=True, forbid_unknown_fields=True):
    """One step of a judged criterion: the number it is worth and the text the judge reads."""

    value: float
    text: str = ""


class Check(Struct, frozen=True, forbid_unknown_fields=True):
    """A programmatic criterion: no judge call, value 0 or 1. In files the parameters stand beside `kind`.

    Attributes:
        kind: a name in `megarubric.rubrics.checks.KINDS`.
        params: the arguments that were given, already checked against the kind.
    """

    kind: str
    params: dict[str, Any] = {}


class Veto(Struct, frozen=True, forbid_unknown_fields=True):
    """A gate. With weight >= 0 it fails below `threshold`; a detector (negative weight, or weight 0 and `detector`)
    fails at or above it. `threshold` is on the normalised score, in [0, 1]."""

    threshold: Annotated[float, Meta(ge=0, le=1)] = 0.5
    detector: bool = False


class Saturation(Struct, frozen=True, forbid_unknown_fields=True):
    """Diminishing returns above `theta` (in [0, 1)) at rate `beta` (> 0)."""

    theta: Annotated[float, Meta(ge=0, lt=1)]
    beta: Annotated[float, Meta(gt=0)]


class Pair(Struct, frozen=True, forbid_unknown_fields=True):
    """An interaction of the criteria `a` and `b`; see the reward equations for the three kinds."""

    a: str
    b: str
    weight: float
    kind: PairKind = "product"


class Shaping(Struct, frozen=True, forbid_unknown_fields=True):
    """Amplifies differences above `kappa` (in [0, 1)): `alpha` >= 0, `power` >= 1."""

    kappa: Annotated[float, Meta(ge=0, lt=1)]
    alpha: Annotated[float, Meta(ge=0)]
    power: Annotated[float, Meta(ge=1)]


class Provenance(Struct, frozen=True, forbid_unknown_fields=True):
    """Who wrote the rubric and under which licence. `llm` and `hybrid` name the `model`."""

    author: Author
    source: str = ""
    licence: str = ""
    model: str | None = None


class Criterion(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """One dimension of a rubric, judged (`tiers`) or programmatic (`check`); neither means the two tiers 0 and 1."""

    id: CriterionId
    description: str = ""
    weight: float = 1.0
    tiers: tuple[Tier, ...] | None = None
    check: Check | None = None
    needs_reference: bool = False
    veto: Veto | None = None
    saturation: Saturation | None = None

    @functools.cached_property
    def tier_values(self) -> tuple[float, ...]:
        """Values a judgement may take, lowest first; (0.0, 1.0) for checks and for criteria without tiers."""
        return tuple(t.value for t in self.tiers) if self.tiers else (0.0, 1.0)


class Rubric(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """K criteria, their interactions and the shaping of the reward.

    `scope` not given in a file is `instance` when there is a `prompt`, else `task`. `family` and `provenance` may be
    missing here; `rubrics lint` asks for them.
    """

    id: RubricId
    version: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 1
    title: str = ""
    scope: Scope = "task"
    family: Family | None = None
    provenance: Provenance | None = None
    tags: tuple[str, ...] = ()
    prompt: str | None = None
    reference: str | None = None
    criteria: Annotated[tuple[Criterion, ...], Meta(min_length=1)]
    pairs: tuple[Pair, ...] = ()
    shaping: Shaping | None = None
    veto_reward: float = 0.0
    on_missing_veto: MissingVeto = "unscored"

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the canonical JSON: UTF-8, keys sorted, no white space, every default written out, numbers
        that are real by the schema written as floats. Two files that mean the same have the same hash."""
        return hashlib.sha256(canonical_json(self)).hexdigest()

    def criterion(self, criterion_id: str) -> Criterion:
        """The criterion of that id. Raises KeyError."""
        return self._by_id[criterion_id]

    @functools.cached_property
    def _by_id(self) -> dict[str, Criterion]:
        return {c.id: c for c in self.criteria}


@functools.cache
def _fields(kind: type[Struct]) -> tuple[tuple[str, Any], ...]:
    """(name, default) of every field; a required field's default equals nothing."""
    return tuple((f.name, f.default) for f in msgspec.structs.fields(kind))


def _plain(value: Any, defaults: bool) -> Any:
    if isinstance(value, Check):
        return {"kind": value.kind, **value.params}
    if isinstance(value, Struct):
        out = {}
        for name, default in _fields(type(value)):
            item = getattr(value, name)
            if defaults or item != default:
                out[name] = _plain(item, defaults)
        return out
    if isinstance(value, tuple):
        return [_plain(item, defaults) for item in value]
    return value


def to_dict(rubric: Rubric, *, defaults: bool = False) -> dict[str, Any]:
    """The rubric as a file would hold it (`parse_rubric` reads it back equal), in schema order.

    Args:
        defaults: write out what has its default value as well.
    """
    out: dict[str, Any] = _plain(rubric, defaults)
    out["scope"] = rubric.scope  # its default depends on the prompt, so it is always said
    return {name: out[name] for name in Rubric.__struct_fields__ if name in out}


def dumps(rubric: Rubric, *, defaults: bool = False) -> str:
    """One line of JSON for a corpus file."""
    return msgspec.json.encode(to_dict(rubric, defaults=defaults)).decode()


def canonical_json(rubric: Rubric) -> bytes:
    """What `Rubric.hash` is taken over."""
    from megarubric.rubrics.checks import full_params

    tree = to_dict(rubric, defaults=True)
    for criterion, plain in zip(rubric.criteria, tree["criteria"]):
        if criterion.check is not None:
            plain["check"] = {"kind": criterion.check.kind, **full_params(criterion.check)}
    return msgspec.json.encode(tree, order="sorted")
