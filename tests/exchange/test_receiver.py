"""The receiver's states, with workers that keep what they are told to load. (tests/rollout has a real engine.)"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from megarubric.errors import BadInput
from megarubric.exchange.buckets import (
    Bucket,
    Segment,
    TensorEntry,
    TensorSpec,
    WeightDigest,
    digest_entries,
    plan_buckets,
)
from megarubric.exchange.receiver import Receiver, State, UpdateFailed, UpdateRefused, checksum_of, manifest_of

SPECS = (
    TensorSpec("model.embed_tokens.weight", "float32", (8, 4)),
    TensorSpec("model.layers.0.mlp.weight", "float32", (4, 4)),
    TensorSpec("model.layers.1.mlp.weight", "float32", (4, 4)),
)


class Workers:
    """What vLLM's workers would do: between start and finish, read each tensor from the mapping they are given."""

    def __init__(self) -> None:
        self.model: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.fail_at: str | None = None

    def __call__(self, method: str, args: tuple[Any, ...]) -> None:
        self.calls.append(method)
        if method == self.fail_at:
            raise RuntimeError(f"{method} broke")
        if method == "update_weights":
            (info,) = args
            path = info["mapping"] if info["mapping"].startswith("/") else f"/dev/shm/{info['mapping']}"
            with open(path, "rb") as f:
                data = f.read()
            for entry in info["entries"]:
                self.model[entry["name"]] = data[entry["offset"] : entry["offset"] + entry["nbytes"]]


def weights(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {spec.name: random.standard_normal(spec.shape, np.float32) for spec in SPECS}


@pytest.fixture
def segments() -> Iterator[list[Segment]]:
    made = [Segment.create(f"megarubric-test-{uuid.uuid4().hex}", 4096) for _ in range(2)]
    yield made
    for segment in made:
        segment.close()
        segment.unlink()


def fill(segment: Segment, entries: tuple[TensorEntry, ...], tensors: dict[str, np.ndarray]) -> Bucket:
    for e in entries:
        segment.buffer[e.offset : e.offset + e.nbytes] = tensors[e.name].tobytes()
    nbytes = max(e.offset + e.nbytes for e in entries)
    return Bucket(segment.name, nbytes, entries, digest_entries(segment.buffer, entries).hexdigest())


def checksum(tensors: dict[str, np.ndarray]) -> str:
    digest = WeightDigest()
    for spec in SPECS:
        digest.add(spec, tensors[spec.name].tobytes())
    return digest.hexdigest()


def send(receiver: Receiver, segments: list[Segment], version: int, tensors: dict[str, np.ndarray]) -> None:
    """Everything up to finish, one tensor a bucket, the two segments filled in turn."""
    receiver.begin(version, SPECS)
    for i, entries in enumerate(plan_buckets(SPECS, 1).buckets):
        receiver.load(version, fill(segments[i % 2], entries, tensors))


def received(workers: Workers) -> dict[str, bytes]:
    return dict(sorted(workers.model.items()))


def as_bytes(tensors: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: tensors[name].tobytes() for name in sorted(tensors)}


@pytest.mark.parametrize("staging", ["host", "direct"])
def test_versions_follow_each_other(segments, staging):
    workers = Workers()
    receiver = Receiver(workers, SPECS, "float32", staging)
    for version in (1, 2, 7, 3):
        tensors = weights(version)
        send(receiver, segments, version, tensors)
        assert receiver.state is State.RECEIVING
        receiver.finish(version, checksum(tensors))
        assert (receiver.state, receiver.version, receiver.checksum) == (State.READY, version, checksum(tensors))
        assert received(workers) == as_bytes(tensors)
    assert workers.calls == ["start_weight_update", *["update_weights"] * 3, "finish_weight_update"] * 4


def test_the_model_is_not_touched_before_everything_is_checked(segments):
    workers = Workers()
    receiver = Receiver(workers, SPECS, "float32")
    send(receiver, segments, 1, weights(1))
    assert workers.calls == []
    with pytest.raises(UpdateRefused, match="has checksum"):
        receiver.finish(1, checksum(weights(2)))
    assert workers.calls == [] and (receiver.state, receiver.version) == (State.READY, 0)


def test_segments_may_be_filled_again_after_each_load(segments):
    """Host staging copies: what is written over a bucket later does not reach the model."""
    workers = Workers()
    receiver = Receiver(workers, SPECS, "float32")
    tensors = weights(1)
    send(receiver, segments, 1, tensors)
    for segment in segments:
        segment.buffer[:] = bytes(len(segment.buffer))
    receiver.finish(1, checksum(tensors))
    assert received(workers) == as_bytes(tensors)


def test_staging_memory_is_used_again_and_freed(segments):
    receiver = Receiver(Workers(), SPECS, "float32")

    def staging_files() -> int:
        return sum("megarubric-staging" in os.path.realpath(path) for path in Path("/proc/self/fd").iterdir())

    before = staging_files()
    counts = []
    for version in range(1, 5):
        send(receiver, segments, version, weights(version))
        receiver.finish(version, checksum(weights(version)))
        counts.append(staging_files() - before)
    assert counts[0] > 0 and counts == counts[:1] * 4
    receiver.close()
    assert staging_files() == before


@pytest.mark.parametrize("staging", ["host", "direct"])
@pytest.mark.parametrize("step", ["start_weight_update", "update_weights", "finish_weight_update"])
def test_workers_that_fail_leave_no_version_and_a_good_update_mends_it(segments, staging, step):
    workers = Workers()
    receiver = Receiver(workers, SPECS, "float32", staging)
    workers.fail_at = step
    with pytest.raises(UpdateFailed, match=f"RuntimeError: {step} broke"):
        send(receiver, segments, 1, weights(1))
        receiver.finish(1, checksum(weights(1)))
    assert (receiver.state, receiver.version, receiver.checksum) == (State.BROKEN, -1, "")
    assert workers.calls[-1] == "abandon_weight_update"
    workers.fail_at = None
    send(receiver, segments, 2, weights(2))
    receiver.finish(2, checksum(weights(2)))
    assert (receiver.state, receiver.version) == (State.READY, 2)
    assert received(workers) == as_bytes(weights(2))


def test_abort_keeps_the_old_version_when_staged_and_none_when_direct(segments):
    for staging, state, version in (("host", State.READY, 0), ("direct", State.BROKEN, -1)):
        receiver = Receiver(Workers(), SPECS, "float32", staging)  # type: ignore[arg-type]
        receiver.abort()
        assert (receiver.state, receiver.version) == (State.READY, 0)
        send(receiver, segments, 1, weights(1))
        receiver.abort()
        assert (receiver.state, receiver.version) == (state, version)
        with pytest.raises(UpdateRefused, match="no update has begun"):
            receiver.finish(1, checksum(weights(1)))


def test_messages_out_of_turn_are_refused_and_change_nothing(segments):
    receiver = Receiver(Workers(), SPECS, "float32")
    entries = plan_buckets(SPECS, 1).buckets[0]
    bucket = fill(segments[0], entries, weights(1))
    with pytest.raises(UpdateRefused, match="version 1: no update has begun"):
        receiver.load(1, bucket)
    receiver.begin(1, SPECS)
    for wrong in (lambda: receiver.load(2, bucket), lambda: receiver.finish(2, "")):
        with pytest.raises(UpdateRefused, match="version 2: version 1 is being received"):
            wrong()
    with pytest.raises(UpdateRefused, match="abort it first"):
        receiver.begin(2, SPECS)
    with pytest.raises(UpdateRefused, match="arrived twice"):
        receiver.load(1, bucket)
        receiver.load(1, bucket)
    assert receiver.state is State.READY  # content at fault: the update is forgotten
    with pytest.raises(UpdateRefused, match="counted from 0"):
        receiver.begin(-1, SPECS)


def test_what_does_not_arrive_is_named(segments):
    receiver = Receiver(Workers(), SPECS, "float32")
    receiver.begin(1, SPECS)
    receiver.load(1, fill(segments[0], plan_buckets(SPECS, 1).buckets[1], weights(1)))
    with pytest.raises(UpdateRefused, match=r"tensor model.embed_tokens.weight and 1 more did not arrive"):
        receiver.finish(1, "")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shape": (4, 8)}, r"arrived as float32\[4, 8\], the manifest says float32\[8, 4\]"),
        ({"dtype": "int32"}, "arrived as int32"),
        ({"name": "model.other"}, "tensor model.other is not in the manifest"),
        ({"offset": 1 << 40}, "leave a buffer"),
        ({"offset": -4}, "leave a buffer"),
        ({"nbytes": 12}, "12 bytes do not hold"),
    ],
)
def test_entries_that_lie_are_refused(segments, change, reason):
    receiver = Receiver(Workers(), SPECS, "float32")
    receiver.begin(1, SPECS)
    bucket = fill(segments[0], plan_buckets(SPECS, 1).buckets[0], weights(1))
    entry = msgspec.structs.replace(bucket.entries[0], **change)
    with pytest.raises(UpdateRefused, match=reason):
        receiver.load(1, msgspec.structs.replace(bucket, entries=(entry,)))
    assert (receiver.state, receiver.version) == (State.READY, 0)


@pytest.mark.parametrize("name", ["../etc/passwd", "/etc/passwd", "a/b", ""])
def test_a_segment_is_a_name_not_a_path(segments, name):
    receiver = Receiver(Workers(), SPECS, "float32")
    receiver.begin(1, SPECS)
    bucket = fill(segments[0], plan_buckets(SPECS, 1).buckets[0], weights(1))
    with pytest.raises(UpdateRefused, match="segment name"):
        receiver.load(1, msgspec.structs.replace(bucket, segment=name))


@pytest.mark.parametrize(
    ("engine", "sent", "taken"),
    [
        ("float32", "bfloat16", True),
        ("bfloat16", "bfloat16", True),
        ("bfloat16", "float32", False),
        ("float16", "bfloat16", False),
    ],
)
def test_only_dtypes_that_lose_nothing_are_taken(engine, sent, taken):
    receiver = Receiver(Workers(), SPECS, engine)
    manifest = [msgspec.structs.replace(spec, dtype=sent) for spec in SPECS]
    if taken:
        receiver.begin(1, manifest)
    else:
        with pytest.raises(UpdateRefused, match=f"is {sent}, which a {engine} engine cannot take"):
            receiver.begin(1, manifest)


def test_dropped_weights_are_not_served(segments):
    receiver = Receiver(Workers(), SPECS, "float32")
    send(receiver, segments, 1, weights(1))
    receiver.lose_weights()
    assert (receiver.state, receiver.version) == (State.BROKEN, -1)
    send(receiver, segments, 2, weights(2))
    receiver.finish(2, checksum(weights(2)))
    assert (receiver.state, receiver.version) == (State.READY, 2)


# --- Hugging Face directories ---------------------------------------------------------------------------------------


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def test_manifest_and_checksum_of_a_directory(tmp_path):
    tensors = weights(4)
    first, *rest = tensors
    write_safetensors(tmp_path / "model-00001-of-00002.safetensors", {first: tensors[first]})
    write_safetensors(tmp_path / "model-00002-of-00002.safetensors", {name: tensors[name] for name in rest})
    assert sorted(manifest_of(tmp_path), key=lambda t: t.name) == sorted(SPECS, key=lambda t: t.name)
    assert checksum_of(tmp_path) == checksum(tensors)


def test_files_that_are_not_safetensors(tmp_path):
    with pytest.raises(BadInput, match=r"no \*.safetensors file"):
        manifest_of(tmp_path)
    path = tmp_path / "model.safetensors"
    for content in (b"", b"\xff" * 100, (20).to_bytes(8, "little") + b"not json" * 3):
        path.write_bytes(content)
        with pytest.raises(BadInput, match="not a safetensors file"):
            manifest_of(tmp_path)
    header = json.dumps({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(BadInput, match="a: dtype C64 is not exchanged"):
        manifest_of(tmp_path)
