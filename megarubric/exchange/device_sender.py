"""The trainer's end of a weight exchange that stays on the GPUs: every device gets every bucket, engines read it there.

Each rank has two buffers in its device's memory (`cuda_memory.DeviceBuffer`), which the engine on that device opens
once. A bucket becomes whole everywhere by one sum over the ranks: a rank zeroes its buffer, writes the pieces it owns,
and as every byte is owned by exactly one rank, the sum of all buffers is the bucket. It is summed as 64-bit integers:
where one rank has a byte all others have zeros, so nothing carries from byte to byte, and NCCL's reduction inside the
NVLink switches takes these and no bytes.

What that costs, against gathering pieces from their owners: zeroing writes a bucket once more, and a ring sum sends
every byte twice where a gather would send it once (2 (n-1)/n of a bucket a device). In return there is one collective a
bucket whatever the layout, no lists of owners, no packing of column slices, and ranks of other hosts are covered by the
same call. It crosses hosts with whole buckets even where each host holds all pieces; between hosts with a slow network
the road through host memory (`sender`) sends less.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
import torch.distributed as dist

from megarubric.errors import MegarubricError
from megarubric.exchange.buckets import (
    Bucket,
    DeviceBuffers,
    bucket_bytes_used,
    digest_hashes,
    tensor_in,
)
from megarubric.exchange.control import gather_bytes, settle
from megarubric.exchange.cuda_memory import CudaRuntime, DeviceBuffer, ordinal
from megarubric.exchange.digest import sum128_of
from megarubric.exchange.publisher import Publisher
from megarubric.megatron.pieces import Piece


class DeviceSender(Publisher):
    """One rank's part in publishing through device memory.

    pieces: this rank's; only owned ones are written. group: all ranks, over gloo; sums: all ranks, over what moves
    tensors of `device` (None: the default group).

    The buffers are made at the first publish and live as long as the process: an engine may have them open, and CUDA
    leaves it undefined what happens to an allocation that is freed under it. What crosses hosts is NCCL's, and not
    counted.
    """

    digest_kind = "sum128"

    def __init__(
        self,
        manifest: dict[str, tuple[int, ...]],
        dtype: torch.dtype,
        pieces: Sequence[Piece],
        *,
        group: dist.ProcessGroup,
        device: torch.device,
        name: str,
        bucket_bytes: int,
        sums: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(manifest, dtype, bucket_bytes)
        self.segments = ((f"{name}-device-0", f"{name}-device-1"),)
        self._group, self._sums, self._device = group, sums, device
        self._rank, self._world = dist.get_rank(group), dist.get_world_size(group)
        by_name: dict[str, list[Piece]] = {}
        for piece in pieces:
            if piece.owned:
                by_name.setdefault(piece.hf_name, []).append(piece)
        self._owned = [[(e, p) for e in bucket for p in by_name.get(e.name, [])] for bucket in self.table.buckets]
        self._buffers: list[DeviceBuffer] = []

    def begin(self, version: int) -> None:
        """Raises CudaError when a device has no room for the two buffers (PublishError on the other ranks)."""
        if self.devices is None:
            self._open()
        super().begin(version)

    def fill(self, version: int, index: int) -> Bucket | None:
        """Make bucket `index` whole on every device."""
        self._check_turn(version, index)
        buffer, entries = self._buffers[index % 2], self.table.buckets[index]
        words = buffer.tensor[: -(-bucket_bytes_used(entries) // 8) * 8].view(torch.int64)
        with torch.no_grad():
            if self._world > 1:
                words.zero_()
            for entry, piece in self._owned[index]:
                tensor_in(buffer.tensor, entry)[piece.hf_index].copy_(piece.local)
            if self._world > 1:
                dist.all_reduce(words, group=self._sums)
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # another process reads next, and knows nothing of this one's streams
        settle(None, self._group)  # whole on rank 0 does not yet mean whole on the other devices
        self._next += 1
        if self._rank != 0:
            return None
        hashes = sum128_of(buffer.tensor, [(e.offset, e.nbytes) for e in entries])
        return self._filled(self.segments[0][index % 2], index, digest_hashes(entries, hashes))

    def close(self) -> None:
        """Forget the version under way. The buffers stay until the process ends; see the class."""
        self._version = None

    def _open(self) -> None:
        """Make this rank's buffers, and tell all ranks the handles of all."""
        error: MegarubricError | None = None
        buffers: list[DeviceBuffer] = []
        uuid = ""
        try:
            runtime = CudaRuntime()
            uuid = runtime.uuid(ordinal(self._device))
            for _ in range(2):
                buffers.append(DeviceBuffer.create(self.table.segment_bytes, self._device, runtime))
        except MegarubricError as caught:
            error = caught
        try:
            settle(error, self._group)
        except MegarubricError:
            for buffer in buffers:
                buffer.close()  # nobody has its handle yet
            raise
        own = msgspec.msgpack.encode((uuid, [b.handle for b in buffers]))
        told = msgspec.msgpack.Decoder(tuple[str, tuple[bytes, bytes]])
        handles = dict(told.decode(data) for data in gather_bytes(own, self._group))
        self._buffers, self.devices = buffers, DeviceBuffers(self.segments[0], buffers[0].nbytes, handles)
