"""Buckets: layout, shared memory, checksums."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarubric.errors import BadInput
from megarubric.exchange.buckets import (
    DTYPE_BYTES,
    SHM_DIR,
    Bucket,
    BucketError,
    Segment,
    TensorEntry,
    TensorSpec,
    WeightDigest,
    bucket_bytes_used,
    decoder_layer,
    digest_entries,
    plan_buckets,
    sweep,
    tensor_view,
    verify_bucket,
)

SPECS = st.lists(
    st.tuples(
        st.integers(-1, 3), st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(0, 9), max_size=3).map(tuple)
    ),
    min_size=1,
    max_size=30,
)


@pytest.fixture
def name():
    chosen = f"mrbuckets-{os.getpid()}"
    yield chosen
    sweep(chosen)


@settings(max_examples=200, deadline=None)
@given(specs=SPECS, size=st.integers(1, 2000), align=st.sampled_from([1, 8, 256]))
def test_a_plan_holds_every_tensor_once_aligned_in_layer_order(specs, size, align):
    tensors = [
        TensorSpec(f"t{i}" if layer < 0 else f"model.layers.{layer}.t{i}", dtype, shape)
        for i, (layer, dtype, shape) in enumerate(specs)
    ]
    table = plan_buckets(tensors, size, align)
    assert sorted(table.manifest, key=lambda t: t.name) == sorted(tensors, key=lambda t: t.name)
    layers = [decoder_layer(e.name) for bucket in table.buckets for e in bucket]
    assert layers == sorted(layers)
    for bucket in table.buckets:
        end = 0
        for e in bucket:
            assert e.offset % align == 0 and e.offset >= end
            end = e.offset + e.nbytes
        assert end <= size or len([e for e in bucket if e.nbytes]) == 1
        assert end == bucket_bytes_used(bucket) <= table.segment_bytes
    assert table.payload_bytes == sum(t.nbytes for t in tensors)


def test_repeated_names_and_unknown_dtypes_are_refused():
    spec = TensorSpec("a", "float32", (2,))
    with pytest.raises(BucketError, match="tensor a appears twice"):
        plan_buckets([spec, spec], 100)
    with pytest.raises(BucketError, match="'complex64' is not exchanged"):
        plan_buckets([TensorSpec("a", "complex64", (2,))], 100)


def filled(name: str) -> tuple[Segment, Bucket]:
    import torch

    specs = [
        TensorSpec(n, d, (3, 5))
        for n, d in (("w", "float32"), ("b", "bfloat16"), ("i", "int64"), ("f", "float8_e4m3fn"))
    ]
    (entries,) = plan_buckets(specs, 1 << 12).buckets
    segment = Segment.create(name, 1 << 12)
    for e in entries:
        tensor_view(segment.buffer, e).copy_(torch.arange(15).reshape(3, 5).to(getattr(torch, e.dtype)))
    return segment, Bucket(
        name, bucket_bytes_used(entries), entries, digest_entries(segment.buffer, entries).hexdigest()
    )


def test_another_process_reads_what_was_written(name):
    segment, bucket = filled(name)
    code = (
        "import sys, msgspec; from megarubric.exchange.buckets import *\n"
        "b = msgspec.json.decode(sys.argv[1], type=Bucket); s = Segment.open(b.segment)\n"
        "print(verify_bucket(s.buffer, b).hexdigest(), 'torch' in sys.modules)"
    )
    import msgspec

    out = subprocess.run(
        [sys.executable, "-c", code, msgspec.json.encode(bucket).decode()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.split() == [bucket.checksum, "False"]  # checking needs no torch
    assert (SHM_DIR / name).exists()  # a reader that ends takes nothing with it
    segment.close()
    segment.unlink()
    assert not (SHM_DIR / name).exists()


def test_a_changed_byte_fails_the_checksum(name):
    segment, bucket = filled(name)
    verify_bucket(segment.buffer, bucket)
    segment.buffer[bucket.entries[1].offset] ^= 1
    with pytest.raises(BucketError, match="checksum"):
        verify_bucket(segment.buffer, bucket)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"nbytes": 64}, "64 bytes do not hold float32"),
        ({"offset": 1 << 13}, "leave a buffer of 4096"),
        ({"offset": 2}, "is not aligned"),
        ({"shape": (-3, -5)}, "do not hold"),
        ({"offset": -256}, "leave a buffer"),
    ],
)
def test_an_entry_that_lies_is_refused(name, change, reason):
    import msgspec

    segment, bucket = filled(name)
    with pytest.raises(BucketError, match=reason):
        tensor_view(segment.buffer, msgspec.structs.replace(bucket.entries[0], **change))


def test_a_digest_depends_on_everything_but_the_order():
    rng = np.random.default_rng(0)
    data = {n: rng.bytes(8) for n in "abc"}

    def digest(order: str, dtype: str = "float32", shape: tuple[int, ...] = (2,), **changed: bytes) -> str:
        made = WeightDigest()
        for n in order:
            made.add(TensorEntry(n, dtype, shape, 0, 8), changed.get(n, data[n]))
        return made.hexdigest()

    assert digest("abc") == digest("cab")
    others = {digest("ab"), digest("abc", "int32"), digest("abc", shape=(1, 2)), digest("abc", b=data["a"])}
    assert len(others) == 4 and digest("abc") not in others
    with pytest.raises(BucketError, match="arrived twice"):
        digest("aa")
    parts = WeightDigest()
    for n in "ca":
        one = WeightDigest()
        one.add(TensorEntry(n, "float32", (2,), 0, 8), data[n])
        parts.update(one)
    assert parts.hexdigest() == digest("ac")


def test_segments_are_private_exclusive_and_swept(name):
    first = Segment.create(f"{name}-0", 10)
    assert (SHM_DIR / f"{name}-0").stat().st_mode & 0o777 == 0o600
    with pytest.raises(BadInput, match=f"shared memory: {name}-0: File exists"):
        Segment.create(f"{name}-0", 10)
    with pytest.raises(BucketError, match="No such file"):
        Segment.open(f"{name}-1")
    Segment.create(f"{name}-1", 10).close()
    first.close()
    assert sweep(name) == [f"{name}-0", f"{name}-1"] and sweep(name) == []
    for bad in ("../etc", "a/b", "", ".hidden"):
        with pytest.raises(BucketError, match="segment name"):
            Segment.open(bad)


def test_no_room_is_one_line_and_leaves_nothing(name):
    room = os.statvfs(SHM_DIR)
    with pytest.raises(BadInput, match="No space left on device"):
        Segment.create(name, room.f_blocks * room.f_frsize + (1 << 30))
    assert not (SHM_DIR / name).exists()
