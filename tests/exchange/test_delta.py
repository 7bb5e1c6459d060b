"""The sparse delta is lossless for any bits, and is applied only to what it was made against."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarubric.exchange.delta import DeltaError, Kept, PieceHead, Sent, apply, encode, whole


@st.composite
def pairs(draw):
    """(old, new, item bytes): arbitrary bits, changed at some places, in places far apart, or everywhere."""
    item = draw(st.sampled_from([1, 2, 4, 8]))
    n = draw(st.sampled_from([0, 1, 2, 7, 300, 70_003]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    old = rng.integers(0, 256, n * item, np.uint8)
    new = old.copy()
    share = draw(st.sampled_from([0.0, 1e-5, 0.01, 0.3, 0.7, 1.0]))
    at = np.flatnonzero(rng.random(n) < share)
    if n:
        at = np.unique(np.append(at, draw(st.lists(st.integers(0, n - 1), max_size=3)))).astype(int)
    view = new.view(f"u{item}")
    view[at] += rng.integers(1, 100, len(at)).astype(view.dtype)
    return old, new, item


@settings(max_examples=200)
@given(pairs())
def test_what_was_encoded_comes_back_bit_for_bit(case):
    old, new, item = case
    found = encode(new, old, item)
    if found is None:
        return
    width, entries, payload = found
    assert payload.nbytes == entries * (width + item) and (payload.nbytes < new.nbytes or not new.nbytes)
    got = old.copy()
    apply(got, width, entries, payload, item)
    assert got.tobytes() == new.tobytes()


def test_none_changed_is_nothing_all_changed_is_the_whole_and_few_are_few():
    old = np.arange(1000, dtype=np.uint16).view(np.uint8)
    assert encode(old, old, 2)[1:2] == (0,)
    everything = (np.arange(1000, dtype=np.uint16) + 1).view(np.uint8)
    assert encode(everything, old, 2) is None
    few = np.zeros(1_000_000, np.uint16)
    few[::50] = 7
    width, entries, payload = encode(few.view(np.uint8), np.zeros(2_000_000, np.uint8), 2)
    assert (width, entries) == (1, 20_000) and payload.nbytes == 60_000


def test_values_that_compare_equal_or_never_are_bits_like_others():
    """-0.0 equals 0.0 and NaN not itself, as numbers; both travel exactly, payload and all."""
    old = np.array([0.0, np.nan, 1.0, np.nan] + [0.0] * 60, np.float32)
    new = old.copy()
    new[0] = -0.0
    new[1:2] = np.array([0x7FC00123], np.uint32).view(np.float32)
    width, entries, payload = encode(new.view(np.uint8), old.view(np.uint8), 4)
    assert entries == 2
    got = old.copy()
    apply(got.view(np.uint8), width, entries, payload, 4)
    assert got.tobytes() == new.tobytes()


@settings(max_examples=200)
@given(st.sampled_from([0, 1, 2, 3, 4]), st.integers(-1, 5), st.binary(max_size=30))
def test_any_payload_is_a_delta_or_a_delta_error(width, entries, payload):
    base = np.zeros(32, np.uint8)
    try:
        apply(base, width, entries, np.frombuffer(payload, np.uint8), 2)
    except DeltaError as error:
        assert "\n" not in str(error) and not base.any()


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from([0, 1]), st.integers(0, 3), st.booleans()), max_size=12))
def test_both_ends_follow_each_other(steps):
    """Versions of two rectangles, some dropped on the way and both ends told to forget: what comes out is what went
    in."""
    sent, kept = Sent(2), Kept(2)
    rng = np.random.default_rng(0)
    now = [rng.integers(0, 256, n, np.uint8) for n in (400, 64)]
    for rectangle, changes, fault in steps:
        data = now[rectangle]
        data.view(np.uint16)[rng.integers(0, data.size // 2, changes)] += 1
        head, payload = sent.encode(rectangle, data)
        payload = payload.copy()
        data_then = data.copy()
        if fault:
            sent.forget()
            kept.forget()
            continue
        got = kept.decode(head, payload, data.nbytes)
        assert got.tobytes() == data_then.tobytes()


def test_a_delta_against_something_else_is_an_error():
    sent, kept = Sent(2), Kept(2)
    data = np.zeros(100, np.uint8)
    first, payload = sent.encode(5, data)
    assert first == PieceHead(5, 100, 1)
    data[3] = 1
    second, delta = sent.encode(5, data)
    assert (second.base, second.counter, second.entries) == (1, 2, 1)
    with pytest.raises(DeltaError, match=r"^rectangle 5: a delta from 1 to 2, here is 0$"):
        kept.decode(second, delta, 100)
    kept.decode(first, payload, 100)
    data[4] = 1
    third, late = sent.encode(5, data)
    with pytest.raises(DeltaError, match=r"^rectangle 5: a delta from 2 to 3, here is 1$"):
        kept.decode(third, late, 100)
    with pytest.raises(DeltaError, match=r"^rectangle 5: 7 bytes arrived, it has 100$"):
        kept.decode(PieceHead(5, 7, 4), payload[:7], 100)
    with pytest.raises(DeltaError, match=r"of a delta arrived"):
        whole(second, payload, 100)  # this side keeps nothing
    with pytest.raises(DeltaError, match=r"reaches element"):
        apply(np.zeros(4, np.uint8), 1, 1, np.array([2, 1, 1], np.uint8), 2)
