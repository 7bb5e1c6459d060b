"""The trainer's end of a weight exchange: every rank writes the parts it owns straight to their place in a bucket.

The plan is made once, from shapes alone. A version is published bucket by bucket into two shared memory segments in
turn: `begin`, then for each bucket in order `fill`, then `end`. Nothing is gathered on a rank: a tensor-parallel slice,
an expert, a pipeline stage's layer is written by its owner, and a barrier makes the bucket whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megarubric.errors import MegarubricError
from megarubric.exchange.buckets import (
    Bucket,
    BucketTable,
    Segment,
    TensorSpec,
    WeightDigest,
    digest_entries,
    plan_buckets,
    sweep,
    tensor_view,
)
from megarubric.megatron.pieces import Piece


class PublishError(MegarubricError):
    """A publish call out of order."""


class Sender:
    """One rank's part in publishing. All ranks make the same calls in the same order.

    manifest: name -> shape of every tensor; dtype: of all of them on the wire. pieces: this rank's. barrier: returns
    when all ranks have called it. All ranks are on one host; `rank` 0 makes and removes the segments.
    """

    def __init__(
        self,
        manifest: dict[str, tuple[int, ...]],
        dtype: torch.dtype,
        pieces: Sequence[Piece],
        *,
        rank: int,
        shm_prefix: str,
        bucket_bytes: int,
        barrier: Callable[[], None],
    ) -> None:
        wire = str(dtype).removeprefix("torch.")
        specs = [TensorSpec(name, wire, tuple(shape)) for name, shape in manifest.items()]
        self.table: BucketTable = plan_buckets(specs, bucket_bytes)
        self.segment_names = (f"{shm_prefix}-weights-0", f"{shm_prefix}-weights-1")
        self._rank, self._barrier, self._prefix = rank, barrier, f"{shm_prefix}-weights-"
        by_name: dict[str, list[Piece]] = {}
        for piece in pieces:
            if piece.owned:
                by_name.setdefault(piece.hf_name, []).append(piece)
        self._owned = [[(entry, by_name.get(entry.name, [])) for entry in bucket] for bucket in self.table.buckets]
        self._segments: list[Segment] = []
        self._version: int | None = None
        self._next = 0
        self._digest = WeightDigest()

    def begin(self, version: int) -> None:
        """Start publishing the present weights as `version`; one that was not finished is dropped.

        Raises BadInput when there is no room for the segments (made at the first call, kept until `close`).
        """
        self._open()
        self._version, self._next, self._digest = version, 0, WeightDigest()

    def fill(self, version: int, index: int) -> Bucket | None:
        """Write bucket `index`; the bucket on rank 0, None elsewhere. Bucket index - 2 is overwritten.

        Raises PublishError when it is not the next bucket of the version that was begun.
        """
        if version != self._version or index != self._next or index >= len(self.table.buckets):
            expected = f"bucket {self._next} of version {self._version}" if self._version is not None else "begin"
            raise PublishError(f"bucket {index} of version {version} asked for, expected {expected}")
        segment = self._segments[index % 2]
        with torch.no_grad():
            for entry, pieces in self._owned[index]:
                if pieces:
                    place = tensor_view(segment.buffer, entry)
                    for piece in pieces:
                        place[piece.hf_index].copy_(piece.local)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies to the host have ended before others are told so
        self._barrier()
        self._next += 1
        if self._rank != 0:
            return None
        entries = self.table.buckets[index]
        digest = digest_entries(segment.buffer, entries)
        self._digest.update(digest)
        nbytes = max(e.offset + e.nbytes for e in entries)
        return Bucket(segment.name, nbytes, entries, digest.hexdigest())

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
            self.fill(-1, index)  # its barrier keeps the others from bucket index + 2 until rank 0 has read this one
        return self.end(-1)

    def close(self) -> None:
        """Unmap the segments; rank 0 removes their names."""
        for segment in self._segments:
            segment.close()
            if self._rank == 0:
                segment.unlink()
        self._segments = []

    def _open(self) -> None:
        if self._segments:
            return
        nbytes = self.table.segment_bytes
        if self._rank == 0:
            sweep(self._prefix)  # of a trainer of this run that was killed
            try:
                for name in self.segment_names:
                    self._segments.append(Segment.create(name, nbytes))
            except MegarubricError:
                self.close()
                raise
            finally:
                self._barrier()
        else:
            self._barrier()
            self._segments = [Segment.open(name, writable=True) for name in self.segment_names]
