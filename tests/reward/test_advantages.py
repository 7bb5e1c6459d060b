from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarubric.errors import BadInput
from megarubric.reward.advantages import CriterionMeans, effective_weights, group_advantages, objective_wise


def test_standardize_by_hand() -> None:
    adv, degenerate = group_advantages([1.0, 0.0, 0.5, 0.9], [True] * 4, [0, 0, 1, 1], "standardize")
    assert adv[:2] == pytest.approx([0.5 / (0.5 + 1e-6), -0.5 / (0.5 + 1e-6)])
    assert adv[2:] == pytest.approx([-0.2 / (0.2 + 1e-6), 0.2 / (0.2 + 1e-6)], rel=1e-6)
    assert not degenerate.any() and adv.dtype == np.float32


def test_center_by_hand() -> None:
    adv, _ = group_advantages([1.0, 0.0, 0.5], [True] * 3, [7, 7, 7], "center")
    assert adv == pytest.approx([0.5, -0.5, 0.0])


def test_unscored_sample_takes_no_part() -> None:
    adv, degenerate = group_advantages([1.0, math.nan, 0.0, 0.3], [True, False, True, True], [0, 0, 0, 1], "center")
    assert adv.tolist() == [0.5, 0.0, -0.5, 0.0]
    assert degenerate.tolist() == [False, True]  # one valid sample is not a comparison


@pytest.mark.parametrize("value", [0.1, 0.9, 1 / 3, 1e-7, 123.4])
@pytest.mark.parametrize("size", [2, 7, 64, 1000])
def test_equal_rewards_are_degenerate_at_any_size(value: float, size: int) -> None:
    adv, degenerate = group_advantages(np.full(size, value), np.ones(size, bool), np.zeros(size, int), "standardize")
    assert degenerate.all() and not adv.any()


@given(
    st.lists(st.tuples(st.floats(-2, 2, width=32), st.booleans(), st.integers(0, 4)), min_size=1, max_size=60),
    st.sampled_from(["center", "standardize"]),
)
def test_against_plain_python(samples, mode) -> None:
    rewards, valid, group = zip(*samples)
    adv, degenerate = group_advantages(rewards, valid, group, mode, n_groups=5)
    for index in range(5):
        members = [r for r, ok, g in samples if ok and g == index]
        if len(members) < 2:
            assert degenerate[index]
            continue
        mean = math.fsum(members) / len(members)
        std = math.sqrt(math.fsum((m - mean) ** 2 for m in members) / len(members))
        if abs(std - 1e-8) > 1e-12:
            assert degenerate[index] == (std < 1e-8)
        for (r, ok, g), a in zip(samples, adv):
            if g == index:
                want = 0.0 if not ok or degenerate[index] else (r - mean) / (std + 1e-6 if mode == "standardize" else 1)
                assert a == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_order_of_groups_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    rewards, valid, group = rng.random(200, np.float32), rng.random(200) > 0.2, np.repeat(np.arange(25), 8)
    adv, degenerate = group_advantages(rewards, valid, group)
    shuffle = np.argsort(rng.random(200), kind="stable")
    again, flags = group_advantages(rewards[shuffle], valid[shuffle], group[shuffle])
    np.testing.assert_allclose(again, adv[shuffle], rtol=1e-6)
    assert (flags == degenerate).all()


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"mode": "zscore"}, "mode"),
        ({"valid": [True]}, "valid"),
        ({"group": [0, -1]}, "group"),
        ({"n_groups": 1}, "group"),
        ({"rewards": [0.0, math.nan]}, "sample 1"),
    ],
)
def test_bad_input(kwargs, reason) -> None:
    with pytest.raises(BadInput, match=reason):
        group_advantages(**{"rewards": [0.0, 1.0], "valid": [True, True], "group": [0, 1], **kwargs})


def test_objective_wise_by_hand() -> None:
    scores = [[1.0, 0.0], [0.0, 0.0], [0.5, 1.0], [0.5, 0.0]]
    mask = [[True, True], [True, False], [True, True], [True, True]]
    adv, degenerate = objective_wise(scores, mask, [0, 0, 1, 1], [2.0, 1.0])
    # group 0: criterion 0 spreads by 0.5; criterion 1 has one judged sample. group 1: only criterion 1 spreads.
    assert adv == pytest.approx([2.0, -2.0, 1.0, -1.0], rel=1e-5)
    assert degenerate.tolist() == [False, False]
    _, flags = objective_wise(scores, mask, [0, 0, 1, 1], [1.0, 0.0])
    assert flags.tolist() == [False, True]


def test_objective_wise_gamma_discounts_what_is_satisfied() -> None:
    w = effective_weights([1.0, 1.0], [0.75, 0.0], 2.0, 3, 2)
    assert w.shape == (3, 2) and w[0].tolist() == [0.0625, 1.0]
    assert effective_weights([3.0], [0.9], 0.0, 1, 1).tolist() == [[3.0]]
    with pytest.raises(BadInput, match="mean_scores"):
        effective_weights([1.0], None, 1.0, 1, 1)


def test_criterion_means_resume() -> None:
    means = CriterionMeans()
    means.update("r/c", [1.0, None, 0.0, 0.5])
    assert means.mean("r/c") == 0.5 and means.mean("r/new") == 0.0
    resumed = CriterionMeans()
    resumed.load_state_dict(means.state_dict())
    resumed.update("r/c", [0.5])
    means.update("r/c", [0.5])
    assert resumed.state_dict() == means.state_dict()
