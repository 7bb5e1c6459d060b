"""The worker side of a weight update, inside vLLM: a backend of vLLM's own weight-transfer interface.

Every worker of an engine (one, or one a tensor-parallel rank) is told to load a bucket by the name of a memory mapping,
or of a buffer on its own device that was opened before; it takes views of the Hugging Face tensors there and hands them
to the model's own weight loader, which cuts out the rank's share. Loading goes through vLLM's layerwise reload: a
layer's tensors are processed (packed, quantised) when the layer is complete and copied into the memory that the running
kernels and graphs already point to.

Naming this module's `WorkerExtension` as `worker_extension_cls` imports it in each worker, which registers the backend.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload.layerwise import (
    LAYERWISE_INFO,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from megarubric.exchange.buckets import DeviceBuffers, Segment, TensorEntry, tensor_in, tensor_view
from megarubric.exchange.device_receiver import OpenBuffers

BACKEND = "megarubric"


class WorkerExtension:
    """What a vLLM worker can do besides its own methods; vLLM mixes it into the worker's class."""

    def abandon_weight_update(self) -> None:
        """End a weight update that cannot be finished, so that another can start. The model must not run until then."""
        backend = self.weight_transfer_engine  # type: ignore[attr-defined]
        with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
            backend.abandon()
        self._weight_update_active = False

    def open_weight_buffers(self, told: bytes) -> None:
        """Have the trainer's buffers on this worker's device open (`DeviceBuffers` as msgpack)."""
        self.weight_transfer_engine.buffers.open(msgspec.msgpack.decode(told, type=DeviceBuffers))  # type: ignore[attr-defined]

    def hash_weight_bucket(self, name: str, entries: list[dict[str, Any]]) -> list[bytes]:
        """``sum128`` of each tensor of a bucket in an open buffer."""
        buffers: OpenBuffers = self.weight_transfer_engine.buffers  # type: ignore[attr-defined]
        return buffers.hashes(name, [msgspec.convert(e, TensorEntry) for e in entries])


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to connect: every bucket says where it lies."""


@dataclass
class BucketInfo(WeightTransferUpdateInfo):
    """Where a bucket lies and its tensors, as plain values of `TensorEntry`.

    `mapping` is the name of an open device buffer, else see `open_mapping`.
    """

    mapping: str
    entries: list[dict[str, Any]]


def open_mapping(name: str) -> Segment:
    """Map a bucket read-only: a shared memory segment's name, or ``/proc/PID/fd/N`` of a process of the same user."""
    if not name.startswith("/proc/"):
        return Segment.open(name)
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return Segment(name, mmap.mmap(fd, 0, access=mmap.ACCESS_READ))
    finally:
        os.close(fd)


class SharedMemoryBackend(WeightTransferEngine[InitInfo, BucketInfo]):
    """Loads weights from memory that this host's processes share, on the host or on a device."""

    init_info_cls = InitInfo
    update_info_cls = BucketInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.buffers = OpenBuffers(self.device)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        return None

    def start_weight_update(self) -> None:
        """Put every layer into the form in which weights are loaded; the model cannot run until the update finishes."""
        if self.device.type == "cpu":
            # The CPU kernel packs expert weights when it is set up, and skips that when a kernel already exists: a
            # reload would then leave unpacked weights behind the old kernel, silently wrong.
            for module in self.model.modules():
                method = getattr(module, "quant_method", None)
                if getattr(method, "moe_kernel", None) is not None:
                    method.moe_kernel = None
        initialize_layerwise_reload(self.model)

    @torch.no_grad()
    def receive_weights(self, update_info: BucketInfo) -> None:
        """Load one bucket. When this returns, nothing refers to the bucket's memory any more."""
        entries = [msgspec.convert(e, TensorEntry) for e in update_info.entries]
        if update_info.mapping in self.buffers:
            buffer = self.buffers[update_info.mapping]
            self._load(((e.name, tensor_in(buffer.tensor, e)) for e in entries), buffer.address, buffer.nbytes)
            return
        segment = open_mapping(update_info.mapping)
        try:
            start = torch.frombuffer(segment.buffer, dtype=torch.uint8, count=1).data_ptr()
            self._load(((e.name, tensor_view(segment.buffer, e)) for e in entries), start, len(segment.buffer))
        finally:
            segment.close()

    def _load(self, tensors: Iterable[tuple[str, torch.Tensor]], start: int, nbytes: int) -> None:
        """Load `tensors`, views of the `nbytes` at address `start`, which may change when this has returned."""
        self.model.load_weights(tensors)
        self._copy_out(start, start + nbytes)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def _copy_out(self, start: int, end: int) -> None:
        """Give tensors of unfinished layers, which the reload keeps by reference, memory of their own.

        On a GPU that comes from torch's ordinary allocator: vLLM makes its sleep pool current only while it loads a
        model or sets up the KV cache. So sleeping neither saves nor discards the copies. They are gone with their
        layer, at most a layer of them at a time, and the engine gives the freed blocks back when it sleeps or wakes.
        """
        for info in LAYERWISE_INFO.values():
            for _, bound in info.loaded_weights:
                for name, value in bound.arguments.items():
                    if isinstance(value, torch.Tensor) and start <= value.untyped_storage().data_ptr() < end:
                        bound.arguments[name] = value.clone()

    def finish_weight_update(self) -> None:
        """Process what is left and put the running form of every layer back."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            # A head tied to the embeddings gets no tensor of its own, so the reload leaves its packed copy as it was.
            for module in self.model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)

    def abandon(self) -> None:
        """Put back the running form of layers that are not complete; complete ones keep their new weights."""
        for info in LAYERWISE_INFO.values():
            info.loaded_weights.clear()
            info.load_numel = 0
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        self.buffers.close()


WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryBackend)
