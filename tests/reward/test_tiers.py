from __future__ import annotations

import math

import numpy as np
import pytest

from megarubric.errors import BadInput
from megarubric.reward.tiers import tier_expectation


def test_by_hand() -> None:
    reading = tier_expectation(np.log([[0.1, 0.3, 0.5], [0.2, 0.2, 0.0001]]), [0, 1, 2])
    assert reading.value[0] == pytest.approx((0.3 + 1.0) / 0.9)
    assert reading.mass == pytest.approx([0.9, 0.4001], rel=1e-6)
    assert reading.read.tolist() == [True, False]
    p = np.array([0.1, 0.3, 0.5]) / 0.9
    assert reading.entropy[0] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-6)


def test_a_certain_judge() -> None:
    reading = tier_expectation([-math.inf, 0.0], [0, 3])
    assert (reading.value, reading.entropy, reading.mass, reading.read) == (3.0, 0.0, 1.0, True)


def test_no_tier_at_all_is_unread_not_zero() -> None:
    reading = tier_expectation([[-math.inf, -math.inf]], [0, 1], min_tier_mass=0.0)
    assert not reading.read[0] and math.isnan(reading.value[0]) and reading.mass[0] == 0


def test_mass_at_the_threshold_is_read() -> None:
    assert tier_expectation(np.log([0.25, 0.25]), [0, 1]).read
    assert not tier_expectation(np.log([0.25, 0.2499]), [0, 1]).read


def test_far_below_one_stays_finite() -> None:
    reading = tier_expectation([-900.0, -900.0], [0, 1], min_tier_mass=0.0)
    assert reading.value == pytest.approx(0.5) and reading.entropy == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("logprobs", "values"), [([[0.0]], [0, 1]), ([math.nan, -1.0], [0, 1]), ([4.0, 2.0], [0, 1]), ([], [])]
)
def test_bad_input(logprobs, values) -> None:
    with pytest.raises(BadInput):
        tier_expectation(logprobs, values)
