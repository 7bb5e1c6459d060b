from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarubric.errors import BadInput
from megarubric.judging.agreement import spearman
from megarubric.judging.calibration import POOLED, Calibration, Labelled, Map, calibration_error, fit, isotonic

points = st.lists(st.tuples(st.floats(0, 1, width=32), st.integers(1, 5)), min_size=1, max_size=12)


@given(points)
def test_isotonic_regression_equals_the_max_min_formula(pairs: list[tuple[float, int]]) -> None:
    y, w = np.array(pairs, float).T
    n = len(y)

    def mean(a: int, b: int) -> float:
        return float(np.average(y[a : b + 1], weights=w[a : b + 1]))

    expected = [max(min(mean(a, b) for b in range(i, n)) for a in range(i + 1)) for i in range(n)]
    assert isotonic(y, w) == pytest.approx(expected)


def _judge_that_over_credits(n: int, seed: int) -> list[Labelled]:
    rng = np.random.default_rng(seed)
    truth = rng.random(n)
    scores = np.clip(0.7 + 0.3 * truth + rng.normal(0, 0.03, n), 0, 1)
    return [Labelled("r", "c", float(s), float(t)) for s, t in zip(scores, truth)]


def test_calibration_mends_the_scale_on_unseen_items_and_keeps_the_order() -> None:
    calibration = fit("judge", _judge_that_over_credits(400, 1))
    fresh = _judge_that_over_credits(400, 2)
    raw = [x.score for x in fresh]
    mended = [calibration.score("r", "c", s) for s in raw]
    labels = [x.label for x in fresh]
    assert calibration_error(mended, labels) < 0.1 * calibration_error(raw, labels)
    assert np.std(mended) > 2 * np.std(raw)  # the compressed scale is spread out
    assert spearman(mended, labels) == pytest.approx(spearman(raw, labels), abs=0.01)
    order = np.argsort(raw, kind="stable")
    assert (np.diff(np.array(mended)[order]) >= 0).all()


def test_criteria_with_few_labels_use_the_pooled_map() -> None:
    items = _judge_that_over_credits(50, 1) + [Labelled("r", "rare", 0.9, 0.1)]
    calibration = fit("judge", items)
    assert set(calibration.maps) == {POOLED, "r/c"}
    assert calibration.score("r", "rare", 0.9) == calibration.maps[POOLED](0.9)
    assert Calibration("judge", {}).score("r", "c", 0.3) == 0.3


def test_a_calibration_survives_its_file_and_refuses_another_judge(tmp_path: Path) -> None:
    calibration = fit("judge a", _judge_that_over_credits(60, 1))
    calibration.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json", judge="judge a") == calibration
    with pytest.raises(BadInput, match="fitted for judge a"):
        Calibration.load(tmp_path / "c.json", judge="judge b")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"judge": "a", "maps": {"*": {"x": [0, 1], "y": [1, 0], "labels": 5}}}',
        '{"judge": "a", "maps": {}, "z": 1}',
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(BadInput, match=r"c\.json"):
        Calibration.load(tmp_path / "c.json")


def test_maps_and_labels_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="must increase"):
        Map((0.5, 0.5), (0.1, 0.2), 2)
    with pytest.raises(BadInput, match="at least 20"):
        fit("judge", _judge_that_over_credits(5, 1))
    with pytest.raises(BadInput, match=r"r/c"):
        fit("judge", [Labelled("r", "c", 0.5, float("nan"))] * 30)
