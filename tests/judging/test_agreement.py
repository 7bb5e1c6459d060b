from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarubric.errors import BadInput
from megarubric.judging.agreement import (
    agreement,
    bootstrap,
    cohen_kappa,
    compression,
    flip_rate,
    krippendorff_alpha,
    nearest_label,
    ranks,
    spearman,
)

NAN = float("nan")
# The worked example of Krippendorff's "Computing Krippendorff's Alpha-Reliability" (2011): 4 observers, 12 units.
EXAMPLE = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
    [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
]
two_raters = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=25)


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorffs_own_example(level: str, alpha: float) -> None:
    assert krippendorff_alpha(EXAMPLE, level) == pytest.approx(alpha, abs=5e-4)  # type: ignore[arg-type]


def test_cohens_kappa_of_a_table_worked_by_hand() -> None:
    # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: observed 0.70, by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.50
    a = [1] * 25 + [0] * 25
    b = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert cohen_kappa(a, b) == pytest.approx(0.4)


@given(two_raters)
def test_kappas_equal_their_definitions_over_all_pairs(pairs: list[tuple[int, int]]) -> None:
    x, y = np.array(pairs, float).T
    for quadratic in (False, True):

        def distance(p: float, q: float, quadratic: bool = quadratic) -> float:
            return (p - q) ** 2 if quadratic else float(p != q)

        observed = np.mean([distance(p, q) for p, q in zip(x, y)])
        chance = np.mean([distance(p, q) for p, q in itertools.product(x, y)])
        got = cohen_kappa(x, y, quadratic=quadratic)
        assert np.isnan(got) if chance == 0 else got == pytest.approx(1 - observed / chance)


@given(two_raters)
def test_alpha_of_two_complete_raters_equals_its_definition_over_pooled_pairs(pairs: list[tuple[int, int]]) -> None:
    x, y = np.array(pairs, float).T
    pooled = np.concatenate([x, y])
    expected = np.mean([(p - q) ** 2 for p, q in itertools.permutations(pooled, 2)])
    got = krippendorff_alpha([x, y], "interval")
    assert np.isnan(got) if expected == 0 else got == pytest.approx(1 - np.mean((x - y) ** 2) / expected)


def test_perfect_and_opposite_raters() -> None:
    labels = [0, 1, 2, 2, 1, 0]
    assert cohen_kappa(labels, labels) == cohen_kappa(labels, labels, quadratic=True) == 1.0
    assert krippendorff_alpha([labels, labels]) == 1.0
    assert cohen_kappa([0, 1], [1, 0]) == -1.0


def test_constant_raters_have_no_defined_agreement() -> None:
    assert np.isnan(cohen_kappa([1, 1], [1, 1])) and np.isnan(krippendorff_alpha([[1, 1], [1, 1]]))
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3])) and np.isnan(cohen_kappa([], []))


@given(st.permutations(list(range(8))))
def test_spearman_without_ties_equals_the_textbook_formula(order: list[int]) -> None:
    d = np.arange(8) - np.array(order)
    assert spearman(range(8), order) == pytest.approx(1 - 6 * (d**2).sum() / (8 * (64 - 1)))


def test_tied_ranks_are_shared() -> None:
    assert ranks([10, 20, 20, 30]).tolist() == [1, 2.5, 2.5, 4]


def test_agreement_leaves_out_unread_judgements_and_says_how_many() -> None:
    result = agreement([0.1, 1.9, NAN, 1.2], [0, 2, 1, 1], resamples=50)
    assert result.n == 3 and result.unread == 0.25 and result.accuracy.value == 1.0 and result.kappa.value == 1.0
    assert result.alpha.value < 1.0  # expectations are compared as they are


def test_nearest_label() -> None:
    assert nearest_label([0.4, 0.5, 0.6, 9], [0, 1]).tolist() == [0, 0, 1, 1]


def test_the_bootstrap_interval_covers_the_known_accuracy_and_is_reproducible() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(60):
        truth = rng.integers(0, 2, 120).astype(float)
        judge = np.where(rng.random(120) < 0.8, truth, 1 - truth)  # right with probability 0.8
        interval = bootstrap(lambda p, q: float(np.mean(p == q)), judge, truth, resamples=200, seed=seed)
        covered += interval.low <= 0.8 <= interval.high
        assert interval.low <= interval.value <= interval.high
    assert covered >= 51  # 95 % nominal: 57 expected, 51 or fewer with probability below 2 %
    assert bootstrap(spearman, [1, 2, 3, 4], [1, 3, 2, 4], seed=1) == bootstrap(
        spearman, [1, 2, 3, 4], [1, 3, 2, 4], seed=1
    )


def test_flip_rate() -> None:
    assert flip_rate([[1, 1, 0, NAN], [1, 0, 0, NAN]]) == 0.25
    assert flip_rate([[1, 1], [1, 1], [1, 0]]) == pytest.approx(2 / 6)
    with pytest.raises(BadInput, match="2 draws"):
        flip_rate([[1, 2]])


def test_compression_of_a_judge_that_uses_the_top_of_the_scale() -> None:
    high, spread = compression([8, 9, 9, 9, 10], 0, 10), compression([0, 2.5, 5, 7.5, 10], 0, 10)
    assert high["top_fifth"] == 1.0 and high["top_value"] == 0.6 and high["std"] < spread["std"]
    assert spread["entropy"] == pytest.approx(1.0) and spread["top_fifth"] == 0.2


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(BadInput, match="equal numbers"):
        cohen_kappa([1, 2], [1])
