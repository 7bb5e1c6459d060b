"""Arrays of unequal length on the wire, and the settings an engine starts with."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarubric.exchange.rpc import Array, Frames, WireError
from megarubric.rollout.messages import EngineConfig, FinishUpdate, Ragged, Request, pack_ragged, unpack_ragged


@given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5), max_size=6))
def test_ragged_comes_back(rows):
    frames = Frames()
    spec = pack_ragged(frames, [np.array(row, np.int32) for row in rows], np.int32)
    spec = msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=Ragged)
    assert [row.tolist() for row in unpack_ragged(spec, frames.buffers)] == rows


@pytest.mark.parametrize("lengths", [[2, 2], [4], [-1, 4], [3, 0, 1]])
def test_lengths_that_do_not_add_up_are_a_wire_error(lengths):
    frames = Frames()
    spec = Ragged(frames.add(np.zeros(3, np.int32)), frames.add(np.array(lengths, np.int32)))
    with pytest.raises(WireError):
        unpack_ragged(spec, frames.buffers)


def test_two_dimensional_values_are_a_wire_error():
    frames = Frames()
    frames.add(np.zeros(4, np.int32))
    frames.add(np.array([4], np.int32))
    with pytest.raises(WireError):
        unpack_ragged(Ragged(Array(0, "int32", (2, 2)), Array(1, "int32", (1,))), frames.buffers)


def test_requests_are_told_apart_by_their_tag():
    sent = FinishUpdate(3, "00", "keep")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=Request) == sent


@pytest.mark.parametrize(
    "wrong", [{"max_num_seqs": 0}, {"gpu_memory_utilization": 0.0}, {"kv_cache_gib": -1.0}, {"threads": 0}]
)
def test_settings_that_cannot_run_are_refused(wrong):
    with pytest.raises((ValueError, msgspec.ValidationError), match=next(iter(wrong))):
        msgspec.json.decode(msgspec.json.encode({"model_dir": "m", **wrong}), type=EngineConfig)
