"""The sending side of an exchange, from a Hugging Face directory: shared-memory buckets and the engine calls."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from megarubric.exchange.buckets import (
    Bucket,
    Segment,
    TensorEntry,
    WeightDigest,
    digest_entries,
    plan_buckets,
    tensor_view,
)
from megarubric.exchange.receiver import manifest_of
from megarubric.rollout.client import EngineClient
from megarubric.rollout.messages import Weights


def state_dict(model_dir: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(model_dir.glob("*.safetensors")) for k, v in load_file(path).items()}


def fill(segment: Segment, entries: tuple[TensorEntry, ...], tensors: dict[str, torch.Tensor]) -> Bucket:
    """Write `entries` to `segment`; the bucket that describes them."""
    for entry in entries:
        tensor_view(segment.buffer, entry).copy_(tensors[entry.name])
    nbytes = max(e.offset + e.nbytes for e in entries)
    return Bucket(segment.name, nbytes, entries, digest_entries(segment.buffer, entries).hexdigest())


async def publish(
    client: EngineClient,
    model_dir: Path,
    version: int,
    *,
    bucket_bytes: int = 100_000,
    spoil: Callable[[int, Bucket, Segment], Bucket | None] = lambda i, bucket, segment: bucket,
    checksum: str | None = None,
    in_flight: str = "wait",
) -> Weights:
    """Put `model_dir`'s weights in service, through two segments that are filled in turn.

    `spoil` sees every bucket before it is sent and returns what is sent instead, None for nothing.
    """
    tensors = state_dict(model_dir)
    specs = manifest_of(model_dir)
    table = plan_buckets(specs, bucket_bytes)
    digest = WeightDigest()
    segments = [Segment.create(f"megarubric-test-{uuid.uuid4().hex}", table.segment_bytes) for _ in range(2)]
    try:
        await client.begin_update(version, table.manifest)
        for i, entries in enumerate(table.buckets):
            bucket = fill(segments[i % 2], entries, tensors)
            digest.update(digest_entries(segments[i % 2].buffer, entries))
            sent = spoil(i, bucket, segments[i % 2])
            if sent is not None:
                await client.load_bucket(version, sent)
        return await client.finish_update(version, checksum or digest.hexdigest(), in_flight)  # type: ignore[arg-type]
    finally:
        for segment in segments:
            segment.close()
            segment.unlink()
