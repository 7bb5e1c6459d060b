"""What a trainer rank keeps on its device, and how it leaves for the engines and comes back.

Storages are emptied and filled again, and communicators suspended, so that tensors, views of them and process groups
stay the objects that modules and optimizer hold. On a CPU there is nothing to hand over, and every call does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megarubric.megatron import nccl
from megarubric.megatron.fp8_params import Stowed, drop_copies, empty, stow, unstow
from megarubric.megatron.optimizer import TrainedModel


class Residence:
    """See the module."""

    def __init__(self, model: TrainedModel, device: torch.device) -> None:
        self._model, self._on_device = model, device.type == "cuda"
        self._suspended: list[nccl.Communicator] = []
        self._stowed: list[Stowed] = []

    def offload(self, parameters: bool = False) -> None:
        """Drop gradients and move optimizer state to host memory; with `parameters` those as well, and NCCL's buffers
        are given back: no collective on the device until `onload`, but in `connected`. Collective."""
        if not self._on_device:
            return
        for chunk in self._model.chunks:
            chunk.offload_grad_buffers()
            if parameters:
                for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                    buffer.offload_to_cpu(move_params=True, move_grads=False)
        drop_copies(self._model.chunks)
        if parameters:
            self._stowed += stow(self._model.parameters())
        self._stowed += self._stow_optimizer()
        torch.cuda.empty_cache()
        if parameters:
            self._suspend()

    def onload(self) -> None:
        """Undo `offload`. Collective."""
        if not self._on_device:
            return
        self._resume()
        for chunk in self._model.chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                buffer.reload_from_cpu(move_params=True, move_grads=False)
            chunk.restore_grad_buffers()
        unstow(self._stowed)
        self._stowed = []

    def _stow_optimizer(self) -> list[Stowed]:
        """Masters and moments that lie on the device.

        Not Megatron's own `offload_to_cpu`: it copies float32 parameters, which are their own masters, out of buffers
        that may be empty already, and `restore_from_cpu` takes the state of an optimizer on the host to the device.
        """
        seen = {
            buffer.param_data.untyped_storage()._cdata
            for chunk in self._model.chunks
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
            if buffer.param_data is not None
        }
        out = []
        for tensor in self._model.optimizer_tensors():
            storage = tensor.untyped_storage()
            if tensor.is_cuda and storage.nbytes() > 0 and storage._cdata not in seen:
                seen.add(storage._cdata)
                out.append(empty(storage, pin=False))
        return out

    @contextmanager
    def connected(self) -> Iterator[None]:
        """For the duration collectives on the device can be used, whether offloaded or not."""
        suspended = bool(self._suspended)
        self._resume()
        yield
        if suspended:
            self._suspend()

    @property
    def suspended(self) -> bool:
        """Whether communicators are without their buffers."""
        return bool(self._suspended)

    def _suspend(self) -> None:
        if not self._suspended:
            torch.cuda.synchronize()
            self._suspended = nccl.communicators(nccl.groups())
            nccl.suspend(self._suspended)

    def _resume(self) -> None:
        nccl.resume(self._suspended)
        self._suspended = []
