"""Publishing a weight version, whatever road its buckets take: the order of the calls, and the version's checksum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch

from megarubric.exchange.buckets import (
    Bucket,
    BucketTable,
    DeviceBuffers,
    TensorSpec,
    WeightDigest,
    bucket_bytes_used,
    plan_buckets,
)
from megarubric.exchange.control import PublishError
from megarubric.exchange.digest import TensorHash


class Publisher(ABC):
    """One rank's part: `begin`, then `fill` for each bucket of `table` in order, then `end`. All ranks make the same
    calls in the same order.

    `segments` names both buckets for every host, `devices` those in device memory, where a road has them. After `end`,
    `network_bytes` is what all ranks together sent to other hosts, `network_raw_bytes` what that would have been
    without deltas; 0 where nothing is counted.
    """

    segments: tuple[tuple[str, str], ...]
    devices: DeviceBuffers | None = None
    network_bytes = network_raw_bytes = 0
    digest_kind: TensorHash = "xxh3"

    def __init__(self, manifest: Mapping[str, tuple[int, ...]], dtype: torch.dtype, bucket_bytes: int) -> None:
        """manifest: name -> shape of every tensor; dtype: of all of them on the wire."""
        self.wire = str(dtype).removeprefix("torch.")
        specs = [TensorSpec(name, self.wire, tuple(shape)) for name, shape in manifest.items()]
        self.table: BucketTable = plan_buckets(specs, bucket_bytes)
        self._version: int | None = None
        self._next = 0
        self._digest = WeightDigest(self.digest_kind)

    def begin(self, version: int) -> None:
        """Start publishing the present weights as `version`; one that was not finished is dropped.

        What the road needs is made at the first call, and kept.
        """
        self._version, self._next, self._digest = version, 0, WeightDigest(self.digest_kind)

    @abstractmethod
    def fill(self, version: int, index: int) -> Bucket | None:
        """Make bucket `index` whole; the bucket on rank 0, None elsewhere. Bucket index - 2 is overwritten.

        Raises PublishError when it is not the next bucket of the version that was begun.
        """

    def end(self, version: int) -> str:
        """The checksum of the version (on rank 0; of nothing elsewhere), after its last bucket.

        Raises PublishError when buckets are missing.
        """
        if version != self._version or self._next != len(self.table.buckets):
            raise PublishError(
                f"version {version} ended after {self._next} of {len(self.table.buckets)} buckets of {self._version}"
            )
        self._version = None
        return self._digest.hexdigest()

    def checksum(self) -> str:
        """Checksum of the present weights (on rank 0), by going through all buckets without publishing.

        Raises PublishError between `begin` and `end`, whose buckets it would overwrite.
        """
        if self._version is not None:
            raise PublishError(f"version {self._version} is being published")
        self.begin(-1)
        for index in range(len(self.table.buckets)):
            self.fill(-1, index)  # what ends it keeps the others from bucket index + 2 until rank 0 has read this one
        return self.end(-1)

    @abstractmethod
    def close(self) -> None:
        """Give back what the road needed."""

    def _check_turn(self, version: int, index: int) -> None:
        """Raises PublishError unless bucket `index` of `version` is the next to fill."""
        if version != self._version or index != self._next or index >= len(self.table.buckets):
            expected = f"bucket {self._next} of version {self._version}" if self._version is not None else "begin"
            raise PublishError(f"bucket {index} of version {version} asked for, expected {expected}")

    def _filled(self, name: str, index: int, digest: WeightDigest) -> Bucket:
        """On rank 0: bucket `index`, which lies in `name` and has `digest`; the version's checksum goes on."""
        self._digest.update(digest)
        entries = self.table.buckets[index]
        return Bucket(name, bucket_bytes_used(entries), entries, digest.hexdigest())
