"""The curve g: continuity, slopes, ceiling, order, and the numerics underneath."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarubric.errors import BadInput
from megarubric.reward.constants import compile_rubric, saturate
from megarubric.reward.numerics import F32, exp64, log64, one_minus_exp2, power

unit = st.floats(0, 1, width=32)


@given(st.floats(0, 2.0**100, width=32))
def test_one_minus_exp2(w: float) -> None:
    want = -math.expm1(-w * math.log(2))
    assert abs(float(one_minus_exp2(F32(w))) - want) <= 1.5 * 2**-23 * want + 2.0**-148


@given(unit, st.floats(1, 2.0**20, width=32))
def test_power(t: float, p: float) -> None:
    want = t**p
    assert abs(float(power(F32(t), F32(p))) - want) <= 2**-24 * want + 2.0**-149
    assert power(F32(t), F32(1)) == F32(t)


@given(st.floats(2.0**-149, 1.0))
def test_log_and_exp(x: float) -> None:
    assert log64(x) == pytest.approx(math.log(x), rel=1e-10, abs=1e-300)
    assert exp64(math.log(x)) == pytest.approx(math.exp(math.log(x)), rel=1e-10)


@given(st.floats(0, 0.984375, width=32), st.floats(2.0**-20, 2.0**10, width=32), unit, unit)
def test_curve(kit_curve, theta: float, beta: float, x: float, y: float) -> None:
    c = kit_curve(theta, beta)
    low, high = sorted((F32(x), F32(y)))
    ulp = np.spacing(F32(1))
    assert saturate(low, c) <= saturate(high, c) + 2 * ulp  # increasing, to rounding
    assert saturate(F32(theta), c) == F32(theta)
    just_above = np.nextafter(F32(theta), F32(2))
    assert abs(saturate(just_above, c) - just_above) <= 4 * ulp * max(F32(theta), ulp)  # continuous, slope 1
    assert saturate(F32(1), c) == c.ceiling <= 1 + ulp
    want = theta - (1 - theta) * math.expm1(-beta) / beta
    assert float(c.ceiling) == pytest.approx(want, rel=1e-6)


@pytest.fixture(scope="module")
def kit_curve(kit):
    def build(theta: float, beta: float):
        rubric = kit.rubric([{"saturation": {"theta": theta, "beta": beta}}])
        return compile_rubric(rubric).criteria[0]

    return build


def test_tiny_beta_is_the_identity(kit_curve) -> None:
    for beta in (1e-40, 1e-30, 1e-20):
        for theta in (0.0, 0.5):
            c = kit_curve(theta, beta)
            for s in (0.0, 0.3, 0.75, 1.0):
                assert saturate(F32(s), c) == pytest.approx(s, rel=2e-7)


def test_theta_that_rounds_to_one_is_the_identity(kit_curve) -> None:
    assert not kit_curve(1 - 1e-12, 3.0).saturates


@pytest.mark.parametrize(
    ("criteria", "pairs", "fields", "names"),
    [
        ([{"saturation": {"theta": 1.0, "beta": 1.0}}], [], {}, ["c0", "theta"]),
        ([{"saturation": {"theta": -0.1, "beta": 1.0}}], [], {}, ["c0", "theta"]),
        ([{"saturation": {"theta": 0.1, "beta": 0.0}}], [], {}, ["c0", "beta"]),
        ([{"weight": math.inf}], [], {}, ["c0", "weight"]),
        ([{"id": "x"}, {"id": "x"}], [], {}, ["x"]),
        ([{}], [{"a": "c0", "b": "zz", "weight": 1.0, "kind": "min"}], {}, ["zz"]),
        ([{}], [{"a": "c0", "b": "c0", "weight": 1.0, "kind": "min"}], {}, ["c0"]),
        ([{}], [], {"shaping": {"kappa": 1.0, "alpha": 1.0, "power": 2.0}}, ["kappa"]),
        ([{}], [], {"shaping": {"kappa": 0.5, "alpha": -1.0, "power": 2.0}}, ["alpha"]),
        ([{}], [], {"shaping": {"kappa": 0.5, "alpha": 1.0, "power": 0.5}}, ["power"]),
    ],
)
def test_bad_rubrics_are_refused(kit, criteria, pairs, fields, names) -> None:
    """By the schema or by `compile_rubric`: either way before any sample is aggregated, in one line."""
    with pytest.raises(BadInput) as caught:
        compile_rubric(kit.rubric([dict(c) for c in criteria], pairs, **fields))
    assert "test.rubric" in str(caught.value)
    assert all(name in str(caught.value) for name in names)
