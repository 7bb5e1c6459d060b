"""Packing is a permutation with padding: nothing lost, nothing doubled, equal counts everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarubric.megatron.packing import PackSettings, pack, plan

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(
    lengths=LENGTHS,
    budget=st.integers(1, 100),
    dp=st.integers(1, 4),
    multiple=st.integers(1, 3),
    n_updates=st.integers(1, 3),
)
def test_plan_places_each_sequence_once_with_equal_counts(lengths, budget, dp, multiple, n_updates):
    lengths = np.array(lengths, dtype=np.int32)
    n_updates = min(n_updates, len(lengths))
    updates = np.arange(len(lengths), dtype=np.int32) % n_updates
    made = plan(lengths, updates, PackSettings(budget, dp=dp, micro_batch_multiple=multiple))
    assert len(made) == n_updates
    for u, ranks in enumerate(made):
        assert len(ranks) == dp
        counts = {len(rank) for rank in ranks}
        assert len(counts) == 1 and counts.pop() % multiple == 0
        placed = np.concatenate([rows for rank in ranks for rows in rank])
        assert sorted(placed) == list(np.flatnonzero(updates == u))
        for rank in ranks:
            for rows in rank:
                assert lengths[rows].sum() <= max(budget, lengths[updates == u].max())
                assert (np.diff(rows) > 0).all()


def test_plan_balances_ranks_and_depends_on_lengths_only():
    lengths = np.random.default_rng(0).integers(20, 200, size=256).astype(np.int32)
    ranks = plan(lengths, None, PackSettings(4096, dp=4))[0]
    loads = np.array([[lengths[rows].sum() for rows in rank] for rank in ranks])
    assert loads.max() <= 4096
    assert loads.size == 4 * -(-lengths.sum() // (4096 * 4))  # no more micro-batches than the budget demands
    assert np.ptp(loads, axis=0).max() <= lengths.max()
    again = plan(lengths.copy(), None, PackSettings(4096, dp=4))[0]
    assert all(np.array_equal(a, b) for x, y in zip(ranks, again) for a, b in zip(x, y))


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, sequence_multiple=st.integers(1, 8), total_multiple=st.integers(1, 16), data=st.data())
def test_pack_and_scatter_are_inverse(lengths, sequence_multiple, total_multiple, data):
    lengths = np.array(lengths, dtype=np.int32)
    n_tokens = int(lengths.sum())
    tokens = np.arange(100, 100 + n_tokens, dtype=np.int32)
    rows = sorted(data.draw(st.sets(st.integers(0, len(lengths) - 1), max_size=len(lengths))))
    mb = pack(rows, tokens, lengths, PackSettings(64, 1, 1, sequence_multiple, total_multiple))

    assert mb.size % total_multiple == 0 and mb.size % sequence_multiple == 0
    assert mb.real_tokens == lengths[rows].sum()
    assert mb.cu_seqlens_padded[-1] == mb.size
    valid = mb.token_index >= 0
    assert valid.sum() == lengths[rows].sum() - len(rows)
    # a position and the one after it hold consecutive tokens of the batch, in one sequence
    assert np.array_equal(mb.targets[valid], tokens[mb.token_index[valid]])
    assert np.array_equal(mb.input_ids[valid] + 1, mb.targets[valid])

    values = np.zeros(n_tokens, dtype=np.float32)
    mb.scatter(mb.targets.astype(np.float32), values)
    starts = np.cumsum(lengths) - lengths
    for row in range(len(lengths)):
        piece = values[starts[row] + 1 : starts[row] + lengths[row]]
        expected = tokens[starts[row] + 1 : starts[row] + lengths[row]] if row in rows else 0
        assert (piece == expected).all() and values[starts[row]] == 0
    assert np.array_equal(mb.gather(tokens)[valid], mb.targets[valid])
    for k, (start, row) in enumerate(zip(mb.cu_seqlens_padded, rows)):
        assert list(mb.position_ids[start : start + lengths[row]]) == list(range(lengths[row]))
        assert (mb.segment[start : start + lengths[row]] == k).all()


def test_tail_padding_is_a_sequence_of_its_own():
    lengths = np.array([3, 4], dtype=np.int32)
    mb = pack([0, 1], np.arange(7, dtype=np.int32), lengths, PackSettings(64, total_multiple=8))
    assert list(mb.cu_seqlens) == [0, 3, 7, 8] == list(mb.cu_seqlens_padded)
    assert list(mb.token_index) == [1, 2, -1, 4, 5, 6, -1, -1]
    assert list(mb.segment) == [0, 0, 0, 1, 1, 1, 1, 2]


def test_empty_micro_batch_has_padding_only():
    mb = pack([], np.arange(7, dtype=np.int32), np.array([3, 4], dtype=np.int32), PackSettings(64, total_multiple=8))
    assert mb.size == 8 and mb.real_tokens == 0 and (mb.token_index == -1).all()
    assert list(mb.cu_seqlens) == [0, 8]


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_context_slices_cover_every_position_once_in_balanced_chunks(cp):
    lengths = np.array([13, 5, 40, 2], dtype=np.int32)
    mb = pack(range(4), np.arange(60, dtype=np.int32), lengths, PackSettings(64, 1, 1, 2 * cp, 1))
    slices = [mb.context_slice(cp, rank) for rank in range(cp)]
    assert {len(s) for s in slices} == {mb.size // cp}
    assert sorted(np.concatenate(slices)) == list(range(mb.size))
    if cp > 1:  # causal work of a rank: first chunk r and last chunk 2 cp - 1 - r, the same sum for all
        start, end = mb.cu_seqlens_padded[2], mb.cu_seqlens_padded[3]
        work = [(s[(s >= start) & (s < end)] - start).sum() for s in slices]
        assert len(set(work)) == 1
