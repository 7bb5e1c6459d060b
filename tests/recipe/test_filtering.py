"""Which prompts are kept: the quantile, the reasons, and that neither order nor chance decides."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarubric.config.schema import Filter
from megarubric.recipe.filtering import PromptScore, bounds_of, counts, decide, histogram, quantile

reward = st.floats(0, 1)
rewards = st.lists(st.none() | reward, max_size=6).map(tuple)
prompts = st.lists(st.tuples(rewards, st.sampled_from([None, "creative", "social"])), max_size=25).map(
    lambda rows: [PromptScore(id=f"p{i}", family=f, rewards=r) for i, (r, f) in enumerate(rows)]
)
filters = st.builds(
    lambda ends, by, min_std: Filter(low=min(ends), high=max(ends), by=by, min_std=min_std),
    st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True),
    st.sampled_from(["family", "all"]),
    st.sampled_from([0.0, 0.01, 0.2]),
)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.floats(0, 1))
def test_the_quantile_is_numpys(values: list[float], q: float) -> None:
    assert quantile(values, q) == pytest.approx(float(np.quantile(values, q)), rel=1e-9, abs=1e-9)
    assert min(values) <= quantile(values, q) <= max(values)


def test_a_quantile_by_hand() -> None:
    assert quantile([4, 1, 3, 2], 0.25) == 1.75
    for values, q in (([], 0.5), ([1.0], 1.5)):
        with pytest.raises(ValueError):
            quantile(values, q)


@given(prompts, filters, st.randoms(use_true_random=False))
def test_order_decides_nothing(rows: list[PromptScore], f: Filter, shuffler: random.Random) -> None:
    shuffled = list(rows)
    shuffler.shuffle(shuffled)
    assert {d.id: d for d in decide(rows, f)} == {d.id: d for d in decide(shuffled, f)}


@given(prompts, filters, st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.3))
def test_a_wider_filter_keeps_what_a_narrower_kept(
    rows: list[PromptScore], f: Filter, lower: float, higher: float, less: float
) -> None:
    wider = Filter(low=f.low * lower, high=f.high + (1 - f.high) * higher, by=f.by, min_std=max(0.0, f.min_std - less))
    kept = {d.id for d in decide(rows, f) if d.kept}
    assert kept <= {d.id for d in decide(rows, wider) if d.kept}


@given(prompts, filters)
def test_every_decision_is_what_its_reason_says(rows: list[PromptScore], f: Filter) -> None:
    decisions = decide(rows, f)
    assert [d.id for d in decisions] == [p.id for p in rows]
    for p, d in zip(rows, decisions):
        assert d.kept == (d.reason == "central")
        if d.reason == "unscored":
            assert not p.valid and d.score is None and d.std is None
            continue
        assert d.bounds is not None and d.score is not None and d.std is not None
        assert d.score == pytest.approx(float(np.mean(p.valid))) and d.std == pytest.approx(
            float(np.std(p.valid)), abs=1e-8
        )
        inside = d.bounds.low <= d.score <= d.bounds.high
        assert {"too hard": d.score < d.bounds.low, "too easy": d.score > d.bounds.high}.get(d.reason, inside)
        if d.kept:
            assert d.std >= f.min_std and len(p.valid) >= 2
    assert sum(counts(decisions).values()) == len(rows)
    assert sum(k + n for _, _, k, n in histogram(decisions)) == sum(d.score is not None for d in decisions)


def test_reasons_by_example() -> None:
    rows = [
        PromptScore(id="hard", rewards=(0.0, 0.1)),
        PromptScore(id="a", rewards=(0.2, 0.6)),
        PromptScore(id="flat", rewards=(0.5, 0.5)),
        PromptScore(id="one", rewards=(0.5, None)),
        PromptScore(id="b", rewards=(0.4, 0.8, None)),
        PromptScore(id="easy", rewards=(1.0, 0.9)),
        PromptScore(id="silent", rewards=(None, None)),
    ]
    found = {d.id: d.reason for d in decide(rows, Filter(low=0.1, high=0.9))}
    assert found == {
        "hard": "too hard", "a": "central", "flat": "no spread", "one": "no spread", "b": "central",
        "easy": "too easy", "silent": "unscored",
    }  # fmt: skip


def test_a_family_has_its_own_distribution() -> None:
    rows = [PromptScore(id=f"{f}{i}", family=f, rewards=(x + i / 10 - 0.05, x + i / 10 + 0.05))
            for f, x in (("social", 0.0), ("creative", 0.6)) for i in range(4)]  # fmt: skip
    kept = {by: [d.id for d in decide(rows, Filter(low=0.2, high=0.8, by=by)) if d.kept] for by in ("all", "family")}
    assert kept["all"] == ["social2", "social3", "creative0", "creative1"]
    assert kept["family"] == ["social1", "social2", "creative1", "creative2"]
    assert set(bounds_of(rows, Filter(by="family"))) == {"creative", "social"}
