"""The reference against values worked by hand and against the float64 oracle."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from megarubric.errors import BadInput
from megarubric.reward.reference import aggregate

SATURATED = {"theta": 0.5, "beta": 2.0}
CEILING = 0.5 + 0.5 * (1 - math.exp(-2.0)) / 2.0  # g(1) for SATURATED
AT_075 = 0.5 + 0.5 * (1 - math.exp(-1.0)) / 2.0  # g(0.75)

# criteria, pairs, rubric fields, scores (by position), expected r0, expected reward
HAND_WORKED = {
    "weighted mean": ([{"weight": 1}, {"weight": 3}], [], {}, [1.0, 0.5], 2.5 / 4, 2.5 / 4),
    "masked is not zero": ([{"weight": 1}, {"weight": 3}], [], {}, [1.0, None], 1.0, 1.0),
    "pitfall present": ([{"weight": 1}, {"weight": -0.5}], [], {}, [1.0, 1.0], 0.5, 0.5),
    "pitfall clips at 0": ([{"weight": 1}, {"weight": -2}], [], {}, [1.0, 1.0], 0.0, 0.0),
    "all pitfalls": ([{"weight": -1}, {"weight": -3}], [], {}, [1.0, 0.5], 1 - 2.5 / 4, 1 - 2.5 / 4),
    "positive masked, pitfall judged": ([{"weight": 1}, {"weight": -3}], [], {}, [None, 0.5], 0.5, 0.5),
    "nothing judged": ([{"weight": 1}, {"weight": -3}], [], {}, [None, None], None, None),
    "only weight 0": ([{"weight": 0}], [], {}, [1.0], None, None),
    "saturated": ([{"weight": 2, "saturation": SATURATED}], [], {}, [0.75], AT_075 / CEILING, AT_075 / CEILING),
    "full marks stay 1": ([{"weight": 2, "saturation": SATURATED}, {}], [], {}, [1.0, 1.0], 1.0, 1.0),
    "below theta": ([{"saturation": SATURATED}], [], {}, [0.25], 0.25 / CEILING, 0.25 / CEILING),
    "product": (
        [{"weight": 1}, {"weight": 1}],
        [{"a": "c0", "b": "c1", "weight": 2, "kind": "product"}],
        {},
        [0.5, 1.0],
        (1.5 + 2 * 0.5) / 4,
        (1.5 + 2 * 0.5) / 4,
    ),
    "min with a saturated side": (
        [{"weight": 1, "saturation": SATURATED}, {"weight": 1}],
        [{"a": "c0", "b": "c1", "weight": 1, "kind": "min"}],
        {},
        [0.75, 1.0],
        (AT_075 + 1 + AT_075) / (CEILING + 1 + CEILING),
        (AT_075 + 1 + AT_075) / (CEILING + 1 + CEILING),
    ),
    "gap punishes imbalance": (
        [{"weight": 1}, {"weight": 1}],
        [{"a": "c0", "b": "c1", "weight": -0.5, "kind": "gap"}],
        {},
        [1.0, 0.5],
        (1.5 - 0.25) / 2,
        (1.5 - 0.25) / 2,
    ),
    "masked pair": (
        [{"weight": 1}, {"weight": 1}],
        [{"a": "c0", "b": "c1", "weight": 2, "kind": "product"}],
        {},
        [0.5, None],
        0.5,
        0.5,
    ),
    "pair alone carries": (
        [{"weight": 0}, {"weight": 0}],
        [{"a": "c0", "b": "c1", "weight": 2, "kind": "min"}],
        {},
        [0.5, 0.25],
        0.25,
        0.25,
    ),
    "shaping": (
        [{}],
        [],
        {"shaping": {"kappa": 0.6, "alpha": 1.0, "power": 2.0}},
        [0.8],
        0.8,
        (0.8 + 0.4 * 0.5**2) / 1.4,
    ),
    "shaping below kappa": (
        [{}],
        [],
        {"shaping": {"kappa": 0.6, "alpha": 1.0, "power": 2.0}},
        [0.5],
        0.5,
        0.5 / 1.4,
    ),
    "shaping ends": ([{}], [], {"shaping": {"kappa": 0.6, "alpha": 3.0, "power": 2.5}}, [1.0], 1.0, 1.0),
    "gate passes": ([{}, {"weight": 0, "veto": {"threshold": 0.5}}], [], {}, [0.25, 0.5], 0.25, 0.25),
    "gate fails": ([{}, {"weight": 0, "veto": {"threshold": 0.5}}], [], {"veto_reward": -1.0}, [0.25, 0.4], 0.25, -1.0),
    "weighted veto counts too": ([{}, {"weight": 1, "veto": {}}], [], {}, [0.5, 1.0], 0.75, 0.75),
    "detector fires": ([{}, {"weight": 0, "veto": {"detector": True}}], [], {}, [0.75, 0.5], 0.75, 0.0),
    "detector silent": ([{}, {"weight": 0, "veto": {"detector": True}}], [], {}, [0.75, 0.25], 0.75, 0.75),
    "negative veto detects": ([{}, {"weight": -0.5, "veto": {}}], [], {}, [0.75, 1.0], 0.25, 0.0),
    "detector flag needs weight 0": ([{"weight": 1, "veto": {"detector": True}}], [], {}, [1.0], 1.0, 1.0),
}


@pytest.mark.parametrize("name", HAND_WORKED)
def test_hand_worked(kit, name: str) -> None:
    criteria, pairs, fields, scores, r0, reward = HAND_WORKED[name]
    rubric = kit.rubric([dict(c) for c in criteria], pairs, **fields)
    result = aggregate(rubric, {f"c{i}": s for i, s in enumerate(scores)})
    if reward is None:
        assert result.reward is None and not result.valid and result.r0 is None and result.r1 is None
        assert set(result.attribution.values()) == {0.0}
    else:
        assert result.valid
        assert result.r0 == pytest.approx(r0, rel=5e-7)
        assert result.reward == pytest.approx(reward, rel=5e-7)


def test_full_marks_are_exactly_one(kit) -> None:
    rubric = kit.rubric(
        [
            {"weight": w, "saturation": {"theta": t, "beta": b}}
            for w, t, b in [(0.3, 0.1, 3), (1.7, 0.9, 0.01), (2, 0, 50)]
        ],
        [
            {"a": "c0", "b": "c2", "weight": 0.7, "kind": "product"},
            {"a": "c1", "b": "c0", "weight": 0.1, "kind": "min"},
        ],
        shaping={"kappa": 0.3, "alpha": 2.0, "power": 3.3},
    )
    assert aggregate(rubric, {"c0": 1.0, "c1": 1.0, "c2": 1.0}).reward == 1.0
    assert aggregate(rubric, {"c0": 0.0, "c1": 0.0, "c2": 0.0}).reward == 0.0


@pytest.mark.parametrize(
    ("policy", "scores", "valid", "vetoed", "veto", "reward"),
    [
        ("unscored", {"c0": 0.5}, False, False, None, None),
        ("pass", {"c0": 0.5}, True, False, None, 0.5),
        ("fail", {"c0": 0.5}, True, True, "gate", 0.0),
        ("unscored", {"c0": 0.5, "late": 0.0}, True, True, "late", 0.0),  # a failed veto wins over a missing one
        ("fail", {"c0": 0.5, "late": 0.0}, True, True, "gate", 0.0),  # the first failing one in the rubric's order
        ("pass", {"late": 0.0}, True, True, "late", 0.0),  # vetoed is valid even when r0 is not defined
        ("pass", {"late": 1.0}, False, False, None, None),
        ("unscored", {"c0": 0.5, "gate": 1.0, "late": 1.0}, True, False, None, 0.5),
    ],
)
def test_missing_vetoes(kit, policy, scores, valid, vetoed, veto, reward) -> None:
    gate = {"weight": 0, "veto": {"threshold": 0.5}}
    rubric = kit.rubric([{}, {"id": "gate", **gate}, {"id": "late", **gate}], on_missing_veto=policy)
    result = aggregate(rubric, scores)
    assert (result.valid, result.vetoed, result.veto, result.reward) == (valid, vetoed, veto, reward)


def test_attribution_sums_to_the_unclipped_reward(kit) -> None:
    pairs = [
        {"a": "c0", "b": "c1", "weight": 0.5, "kind": "min"},
        {"a": "c0", "b": "c1", "weight": -0.25, "kind": "gap"},
    ]
    rubric = kit.rubric([{"weight": 1}, {"weight": 2}, {"weight": -4}], pairs)
    result = aggregate(rubric, {"c0": 1.0, "c1": 0.5, "c2": 1.0})
    assert result.r0 == 0.0
    assert sum(result.attribution.values()) == pytest.approx((1 + 1 - 4 + 0.25 - 0.125) / 3.5, rel=1e-6)
    assert result.attribution["c0*c1"] == pytest.approx(0.125 / 3.5)  # two pairs of the same criteria share a key
    pitfalls = aggregate(kit.rubric([{"weight": -1}, {"weight": -3}]), {"c0": 0.0, "c1": 0.5})
    assert pitfalls.r0 == pytest.approx(1 + sum(pitfalls.attribution.values()))
    assert math.copysign(1, pitfalls.attribution["c0"]) == 1  # no negative zeros in what people read


@pytest.mark.parametrize("scale", [2.0**-900, 1e-30, 1e30, 2.0**900])
def test_a_common_scale_of_the_weights_changes_nothing(kit, scale: float) -> None:
    def build(unit: float) -> object:
        pairs = [{"a": "c0", "b": "c1", "weight": 0.5 * unit, "kind": "product"}]
        return kit.rubric([{"weight": unit}, {"weight": 2 * unit}, {"weight": -0.5 * unit}], pairs)

    scores = {"c0": 0.3, "c1": 0.9, "c2": 0.1}
    assert aggregate(build(scale), scores).reward == pytest.approx(aggregate(build(1.0), scores).reward, rel=2e-7)


def test_results_are_float32(kit) -> None:
    result = aggregate(kit.rubric([{"weight": 1}, {"weight": 2}]), {"c0": 0.1, "c1": 0.7})
    for number in (result.reward, result.r0, *result.attribution.values()):
        assert number == float(np.float32(number))


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (1.00001, "outside"),
        (-0.00001, "outside"),
        ("0.5", "number"),
    ],
)
def test_bad_score_names_rubric_criterion_sample(kit, score, reason) -> None:
    with pytest.raises(BadInput) as caught:
        aggregate(kit.rubric([{}, {}]), {"c0": 0.5, "c1": score}, sample="s-17")
    message = str(caught.value)
    assert all(part in message for part in ("test.rubric", "c1", "s-17", reason)) and "\n" not in message


def test_unknown_criterion_is_bad(kit) -> None:
    with pytest.raises(BadInput, match=r"test\.rubric.*no-such.*s1"):
        aggregate(kit.rubric([{}]), {"no-such": None}, sample="s1")


def test_tolerance_is_used_not_clamped(kit) -> None:
    assert aggregate(kit.rubric([{"weight": 1}, {"weight": -1}]), {"c0": 1.0, "c1": -9e-7}).r0 == 1.0
    assert aggregate(kit.rubric([{}, {}]), {"c0": 0.5, "c1": -9e-7}).r0 < 0.25


def test_random_rubrics_against_float64(kit) -> None:
    rng = random.Random(20250818)
    seen = {"unscored": 0, "vetoed": 0, "pitfall": 0}
    for _ in range(2000):
        obj = kit.random_rubric(rng)
        rubric = kit.parse(obj)
        scores = kit.random_scores(rng, obj)
        oracle = kit.Oracle(obj, scores)
        kit.assert_close(aggregate(rubric, scores), oracle)
        seen["unscored"] += not oracle.valid
        seen["vetoed"] += oracle.vetoed
        seen["pitfall"] += oracle.r0 is not None and all(c["weight"] <= 0 for c in obj["criteria"])
    assert min(seen.values()) > 50, seen
