"""What a rubric contributes to the reward equations, checked and rounded to float32 once.

The reference, the packed table of the compiled ops and the documentation's numbers all start from these constants, so
they cannot drift apart.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from megarubric.errors import BadInput
from megarubric.reward.numerics import F32, LOG2_E, one_minus_exp2

if TYPE_CHECKING:
    from megarubric.rubrics import Criterion, Pair, Rubric

PairKind = Literal["product", "min", "gap"]
MissingVeto = Literal["unscored", "pass", "fail"]
PAIR_KINDS: tuple[PairKind, ...] = ("product", "min", "gap")
MISSING_VETO: tuple[MissingVeto, ...] = ("unscored", "pass", "fail")

SMALLEST_BETA = 2.0**-64  # below it the curve differs from the identity by less than 2**-65: float32 cannot tell


@dataclass(frozen=True, slots=True)
class CriterionConstants:
    """One criterion. `weight` is scaled (see `RubricConstants.scale`).

    Saturation for s > theta is g = theta + span * (1 - 2**(-rate * (s - theta))), rate = log2(e) * beta / (1 - theta),
    span = (1 - theta) / beta: the contract's equation with its divisions folded into constants.
    """

    id: str
    weight: F32
    saturates: bool
    theta: F32
    rate: F32
    span: F32
    ceiling: F32  # G = g(1)
    veto: bool
    tau: F32
    fails_high: bool  # a detector: fails when s >= tau; otherwise fails when s < tau


@dataclass(frozen=True, slots=True)
class PairConstants:
    """One pair: indices of its criteria, scaled weight, kind, and the ceiling of phi."""

    key: str
    a: int
    b: int
    weight: F32
    kind: PairKind
    ceiling: F32


@dataclass(frozen=True, slots=True)
class RubricConstants:
    """One rubric. Shaping is r1 = (r0 + gain * t**power) / (1 + gain), gain = alpha * (1 - kappa)."""

    id: str
    criteria: tuple[CriterionConstants, ...]
    pairs: tuple[PairConstants, ...]
    scale: float  # power of two that brought the largest |weight| into [1/2, 1); ratios do not depend on it
    shaped: bool
    kappa: F32
    gain: F32
    power: F32
    veto_reward: F32
    on_missing_veto: MissingVeto


def saturate(s: F32, c: CriterionConstants) -> F32:
    """g(s) of one criterion, float32."""
    if not c.saturates or s <= c.theta:
        return s
    return c.theta + c.span * one_minus_exp2((s - c.theta) * c.rate)


def pair_value(kind: PairKind, x: F32, y: F32) -> F32:
    """phi of one pair for saturated scores x and y, float32."""
    if kind == "product":
        return x * y
    if kind == "min":
        return x if x < y else y
    return abs(x - y)


def _number(where: str, item: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise BadInput(where, item, f"{name} must be a number, not {value!r}")
    number = float(value)
    if not math.isfinite(number):
        raise BadInput(where, item, f"{name} is {number}, not finite")
    return number


def _float32(where: str, item: str, name: str, value: object) -> F32:
    number = _number(where, item, name, value)
    if abs(number) > float(np.finfo(np.float32).max):
        raise BadInput(where, item, f"{name} is {number:g}, beyond float32")
    return F32(number)


def _criterion(where: str, criterion: Criterion, scale: float) -> CriterionConstants:
    item = f"criterion {criterion.id}"
    weight = float(criterion.weight)
    theta = rate = span = F32(0)
    saturates = criterion.saturation is not None
    if criterion.saturation is not None:
        raw_theta = _number(where, item, "saturation theta", criterion.saturation.theta)
        beta = _float32(where, item, "saturation beta", criterion.saturation.beta)
        if not 0 <= raw_theta < 1:
            raise BadInput(where, item, f"saturation theta is {raw_theta:g}, outside [0, 1)")
        if not criterion.saturation.beta > 0:
            raise BadInput(where, item, f"saturation beta is {criterion.saturation.beta:g}, not above 0")
        theta = F32(raw_theta)
        beta = max(beta, F32(SMALLEST_BETA))
        if theta < 1:
            # rate may overflow to infinity (beta near the float32 limit); 1 - 2**-inf is 1, as it should be.
            with np.errstate(over="ignore", under="ignore"):
                rate, span = beta / (F32(1) - theta) * LOG2_E, (F32(1) - theta) / beta
        else:
            saturates = False  # theta rounds to 1: the curve is the identity to float32
    veto = criterion.veto is not None
    tau = F32(0.5)
    if criterion.veto is not None:
        tau = _float32(where, item, "veto threshold", criterion.veto.threshold)
    fails_high = veto and (weight < 0 or (weight == 0 and bool(criterion.veto and criterion.veto.detector)))
    open_ended = CriterionConstants(
        criterion.id, F32(weight * scale), saturates, theta, rate, span, F32(1), veto, tau, fails_high
    )
    return CriterionConstants(
        criterion.id,
        F32(weight * scale),
        saturates,
        theta,
        rate,
        span,
        saturate(F32(1), open_ended),
        veto,
        tau,
        fails_high,
    )


def _pair(
    where: str, pair: Pair, scale: float, index: dict[str, int], criteria: tuple[CriterionConstants, ...]
) -> PairConstants:
    item = f"pair {pair.a}*{pair.b}"
    for name in (pair.a, pair.b):
        if name not in index:
            raise BadInput(where, item, f"names criterion {name}, which the rubric does not have")
    if pair.a == pair.b:
        raise BadInput(where, item, "joins a criterion with itself")
    if pair.kind not in PAIR_KINDS:
        raise BadInput(where, item, f"kind is {pair.kind!r}, not one of {', '.join(PAIR_KINDS)}")
    a, b = index[pair.a], index[pair.b]
    # Every phi reaches its ceiling where both criteria do; |G_a - G_b| of a gap is not a ceiling: the contract says 0.
    ceiling = F32(0) if pair.kind == "gap" else pair_value(pair.kind, criteria[a].ceiling, criteria[b].ceiling)
    return PairConstants(f"{pair.a}*{pair.b}", a, b, F32(float(pair.weight) * scale), pair.kind, ceiling)


def compile_rubric(rubric: Rubric) -> RubricConstants:
    """Check `rubric` and round its constants to float32.

    Weights are first multiplied by one power of two, which changes no ratio and keeps any finite weights inside
    float32; a weight below 2**-126 of the largest counts as 0.

    Raises:
        BadInput: naming rubric and criterion or pair: a number that is not finite, theta or kappa outside [0, 1),
            beta <= 0, alpha < 0, power < 1, a pair that names an unknown criterion or one criterion twice, a
            duplicate criterion id, a rubric without criteria, an unknown pair kind or missing-veto policy.
    """
    where = f"rubric {rubric.id}"
    index: dict[str, int] = {}
    largest = 0.0
    for position, criterion in enumerate(rubric.criteria):
        if criterion.id in index:
            raise BadInput(where, f"criterion {criterion.id}", "this id appears twice")
        index[criterion.id] = position
        largest = max(largest, abs(_number(where, f"criterion {criterion.id}", "weight", criterion.weight)))
    if not index:
        raise BadInput(where, None, "has no criteria")
    pairs = tuple(rubric.pairs or ())
    for pair in pairs:
        largest = max(largest, abs(_number(where, f"pair {pair.a}*{pair.b}", "weight", pair.weight)))
    scale = 2.0 ** max(-1000, min(1000, -math.frexp(largest)[1])) if largest > 0 else 1.0

    with np.errstate(under="ignore"):
        criteria = tuple(_criterion(where, c, scale) for c in rubric.criteria)
        compiled_pairs = tuple(_pair(where, p, scale, index, criteria) for p in pairs)
    shaped, kappa, gain, power = False, F32(0), F32(0), F32(1)
    if rubric.shaping is not None:
        raw_kappa = _number(where, "shaping", "kappa", rubric.shaping.kappa)
        alpha = _float32(where, "shaping", "alpha", rubric.shaping.alpha)
        power = _float32(where, "shaping", "power", rubric.shaping.power)
        if not 0 <= raw_kappa < 1:
            raise BadInput(where, "shaping", f"kappa is {raw_kappa:g}, outside [0, 1)")
        if alpha < 0:
            raise BadInput(where, "shaping", f"alpha is {alpha:g}, below 0")
        if power < 1:
            raise BadInput(where, "shaping", f"power is {power:g}, below 1")
        kappa = F32(raw_kappa)
        shaped = bool(alpha > 0 and kappa < 1)
        gain = alpha * (F32(1) - kappa)
    if rubric.on_missing_veto not in MISSING_VETO:
        raise BadInput(where, "on_missing_veto", f"is {rubric.on_missing_veto!r}, not one of {', '.join(MISSING_VETO)}")
    veto_reward = _float32(where, "veto_reward", "the value", rubric.veto_reward)
    return RubricConstants(
        rubric.id, criteria, compiled_pairs, scale, shaped, kappa, gain, power, veto_reward, rubric.on_missing_veto
    )


_CACHE: OrderedDict[int, tuple[Rubric, RubricConstants]] = OrderedDict()
_CACHE_SIZE = 4096


def constants_of(rubric: Rubric) -> RubricConstants:
    """`compile_rubric`, remembered per rubric object (rubrics are frozen)."""
    hit = _CACHE.get(id(rubric))
    if hit is not None and hit[0] is rubric:
        return hit[1]
    compiled = compile_rubric(rubric)
    _CACHE[id(rubric)] = (rubric, compiled)
    if len(_CACHE) > _CACHE_SIZE:
        _CACHE.popitem(last=False)
    return compiled
