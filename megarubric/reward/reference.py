"""The reward of one sample, in plain Python and float32: the contract (docs: reward equations) as code.

Every sum runs in index order and every operation rounds to float32, so the compiled CPU and CUDA ops are held to these
very bits. Slow on purpose (about 0.1 ms a sample); `reward.batch.aggregate_batch` is what training calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from megarubric.errors import BadInput
from megarubric.reward.constants import RubricConstants, constants_of, pair_value, saturate
from megarubric.reward.numerics import F32, power

if TYPE_CHECKING:
    from megarubric.rubrics import Rubric

ZERO, ONE = F32(0), F32(1)
SCORE_TOLERANCE = 1e-6  # a score may lie outside [0, 1] by this much; it is used as it is


@dataclass(frozen=True, slots=True)
class RewardResult:
    """What the aggregation says about one sample. All numbers are float32 values.

    `reward` is None exactly when `valid` is False. `r0` (before shaping) and `r1` (after) are None when nothing that
    could carry a reward was judged. `veto` names the first failing veto criterion. `attribution` maps every criterion
    id, and "a*b" for every pair, to its share of r0 before clipping; masked items and unscored samples have 0.
    """

    reward: float | None
    valid: bool
    vetoed: bool
    veto: str | None
    r0: float | None
    r1: float | None
    attribution: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """`RewardResult` before names: `veto` is a criterion index or -1; shares in criterion and in pair order."""

    reward: F32 | None
    valid: bool
    vetoed: bool
    veto: int
    r0: F32 | None
    r1: F32 | None
    criterion_shares: list[F32]
    pair_shares: list[F32]

    def named(self, constants: RubricConstants) -> RewardResult:
        attribution = {c.id: float(share) for c, share in zip(constants.criteria, self.criterion_shares)}
        for pair, share in zip(constants.pairs, self.pair_shares):  # two pairs of the same criteria share a key
            attribution[pair.key] = float(F32(attribution.get(pair.key, 0.0)) + share)
        return RewardResult(
            reward=None if self.reward is None else float(self.reward),
            valid=self.valid,
            vetoed=self.vetoed,
            veto=constants.criteria[self.veto].id if self.veto >= 0 else None,
            r0=None if self.r0 is None else float(self.r0),
            r1=None if self.r1 is None else float(self.r1),
            attribution=attribution,
        )


def checked_score(rubric_id: str, criterion_id: str, sample: object, value: object) -> F32:
    """`value` as float32, or BadInput naming rubric, criterion and sample."""
    where, item = f"rubric {rubric_id}", f"criterion {criterion_id}, sample {sample}"
    if not isinstance(value, (int, float, np.floating, np.integer)):
        raise BadInput(where, item, f"the score must be a number or null, not {value!r}")
    try:
        score = float(value)
    except OverflowError:  # an integer beyond float64
        score = math.inf
    if not math.isfinite(score):
        raise BadInput(where, item, f"the score is {score}")
    if score < -SCORE_TOLERANCE or score > 1 + SCORE_TOLERANCE:
        raise BadInput(where, item, f"the score {score:g} is outside [0, 1]")
    return F32(score)


def aggregate(rubric: Rubric, scores: Mapping[str, float | None], sample: object = "") -> RewardResult:
    """Reward of one sample under `rubric`.

    Args:
        rubric: the rubric; checked and compiled on first use.
        scores: normalised score s in [0, 1] per criterion id. None, or an id that is absent, is masked: not judged,
            not applicable or unreadable. A masked criterion counts neither in the numerator nor in the denominator.
        sample: how error messages call the sample.

    Raises:
        BadInput: a score that is not finite or outside [0, 1] by more than 1e-6, a score for a criterion the rubric
            does not have, or a rubric `compile_rubric` refuses.
    """
    constants = constants_of(rubric)
    known = {c.id for c in constants.criteria}
    for name in scores:
        if name not in known:
            raise BadInput(
                f"rubric {rubric.id}", f"criterion {name}, sample {sample}", "the rubric has no such criterion"
            )
    s: list[F32 | None] = []
    for criterion in constants.criteria:
        value = scores.get(criterion.id)
        s.append(None if value is None else checked_score(rubric.id, criterion.id, sample, value))
    with np.errstate(over="ignore", under="ignore"):
        return aggregate_scores(constants, s).named(constants)


def aggregate_scores(constants: RubricConstants, s: list[F32 | None]) -> Outcome:
    """The equations. `s` holds one checked float32 score per criterion in rubric order, None where masked."""
    g: list[F32 | None] = []
    numerator, denominator, magnitude = ZERO, ZERO, ZERO
    any_pitfall = failed = missing = False
    veto = -1

    for k, (c, score) in enumerate(zip(constants.criteria, s)):
        if score is None:
            g.append(None)
            fails = c.veto and constants.on_missing_veto == "fail"
            missing = missing or (c.veto and constants.on_missing_veto == "unscored")
        else:
            saturated = saturate(score, c)
            g.append(saturated)
            numerator = numerator + c.weight * saturated
            if c.weight > 0:
                denominator = denominator + c.weight * c.ceiling
            any_pitfall = any_pitfall or bool(c.weight < 0)
            magnitude = magnitude + abs(c.weight)
            fails = bool(c.veto and (score >= c.tau if c.fails_high else score < c.tau))
        if fails and not failed:
            failed, veto = True, k

    phi: list[F32 | None] = []
    pair_numerator, pair_denominator = ZERO, ZERO
    for pair in constants.pairs:
        x, y = g[pair.a], g[pair.b]
        if x is None or y is None:
            phi.append(None)
            continue
        value = pair_value(pair.kind, x, y)
        phi.append(value)
        pair_numerator = pair_numerator + pair.weight * value
        if pair.weight > 0:
            pair_denominator = pair_denominator + pair.weight * pair.ceiling

    total = denominator + pair_denominator
    r0: F32 | None = None
    divisor: F32 | None = None
    if total > 0:
        divisor = total
        r0 = _clip((numerator + pair_numerator) / total)
    elif any_pitfall:  # nothing positive was judged: start from 1 and let the pitfalls take away
        divisor = magnitude
        r0 = _clip(ONE + numerator / magnitude)
    r1 = None if r0 is None else _shape(constants, r0)

    criterion_shares = [
        ZERO if x is None or divisor is None else (c.weight * x) / divisor + ZERO  # + 0: never -0
        for c, x in zip(constants.criteria, g)
    ]
    pair_shares = [
        (pair.weight * value) / total + ZERO if value is not None and total > 0 else ZERO
        for pair, value in zip(constants.pairs, phi)
    ]
    valid = failed or (r0 is not None and not missing)
    reward = constants.veto_reward if failed else r1
    return Outcome(reward if valid else None, valid, failed, veto, r0, r1, criterion_shares, pair_shares)


def _clip(x: F32) -> F32:
    x = x if x > ZERO else ZERO
    return x if x < ONE else ONE


def _shape(constants: RubricConstants, r0: F32) -> F32:
    """h(r0): amplifies differences above kappa; h(0) = 0, h(1) = 1, increasing."""
    if not constants.shaped:
        return r0
    t = (r0 - constants.kappa) / (ONE - constants.kappa)
    if t <= 0:
        t = ZERO
    return (r0 + constants.gain * power(t, constants.power)) / (ONE + constants.gain)
