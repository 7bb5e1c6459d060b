"""An engine worker's end of a weight exchange on the GPU: the trainer's buffers on its own device, opened once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megarubric.exchange.buckets import BucketError, DeviceBuffers, TensorEntry, check_entry
from megarubric.exchange.cuda_memory import CudaRuntime, DeviceBuffer, ordinal
from megarubric.exchange.digest import sum128_of


class OpenBuffers:
    """The buffers of a trainer that lie on `device`, by their names; kept between versions."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._handles: tuple[bytes, bytes] | None = None
        self._open: dict[str, DeviceBuffer] = {}

    def open(self, told: DeviceBuffers) -> None:
        """Map the buffers, unless these very ones are mapped; those of an earlier trainer are unmapped first.

        Raises BucketError when the trainer has none on this device, CudaError when they cannot be opened.
        """
        runtime = CudaRuntime()
        uuid = runtime.uuid(ordinal(self._device))
        handles = told.handles.get(uuid)
        if handles is None:
            raise BucketError(f"no trainer rank is on this engine's device {uuid}: exchange.through: host")
        if handles == self._handles and tuple(self._open) == told.names:
            return
        self.close()
        try:
            for name, handle in zip(told.names, handles, strict=True):
                self._open[name] = DeviceBuffer.open(handle, told.nbytes, self._device, runtime)
        except BaseException:
            self.close()
            raise
        self._handles = handles

    def __contains__(self, name: str) -> bool:
        return name in self._open

    def __getitem__(self, name: str) -> DeviceBuffer:
        """Raises BucketError for a buffer that is not open."""
        if name not in self._open:
            raise BucketError(f"device buffer {name} is not open")
        return self._open[name]

    def hashes(self, name: str, entries: Sequence[TensorEntry]) -> list[bytes]:
        """``sum128`` of each tensor of a bucket, as this device has it. Raises BucketError for entries that lie."""
        buffer = self[name]
        for entry in entries:
            check_entry(entry, buffer.nbytes)
        return sum128_of(buffer.tensor, [(e.offset, e.nbytes) for e in entries])

    def close(self) -> None:
        """Unmap everything. Views of the buffers must be gone."""
        for buffer in self._open.values():
            buffer.close()
        self._open, self._handles = {}, None
