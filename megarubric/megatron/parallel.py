"""Process groups and random states of a `ParallelLayout`, on this rank."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.rendezvous import rendezvous

from megarubric.config.layout import ParallelLayout
from megarubric.megatron import cpu

cpu.ensure()  # before the megatron imports below

from megatron.core import parallel_state, tensor_parallel  # noqa: E402

__all__ = ["ParallelLayout", "initialize", "shutdown"]

_stores: dict[tuple[str | None, str | None, int, int], Any] = {}  # by address and rank
_calls = 0  # of `initialize` that made groups: the same on all ranks


def initialize(layout: ParallelLayout, *, seed: int = 1, backend: str | None = None, timeout_s: float = 600.0) -> None:
    """Make torch.distributed and Megatron's process groups of `layout` on this rank.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (without WORLD_SIZE: one rank alone). `backend` is
    nccl with CUDA and gloo without. `seed` seeds the random states Megatron tracks (dropout; weights come from files or
    from `weights.init_weights`), offset by pipeline stage as Megatron-LM does. `timeout_s` bounds every collective, so
    that ranks whose peer died end. Calling it again after `shutdown` is fine, when all ranks do.

    Raises BadInput when the world size does not fit the layout.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    layout.check(world_size)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not torch.distributed.is_initialized():
        backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
        timeout, rank = timedelta(seconds=timeout_s), int(os.environ.get("RANK", "0"))
        torch.distributed.init_process_group(
            backend, rank=rank, world_size=world_size, timeout=timeout, store=_meeting_place(rank, world_size, timeout)
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=timeout_s / 60,
    )
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def _meeting_place(rank: int, world_size: int, timeout: timedelta) -> Any:
    """The store in which the ranks of one `initialize` find each other.

    One server lives as long as the process, and every call has a prefix of its own. Torch would start again at the same
    address with the same keys: a rank that is early there reads what the last groups left, and waits for ever.
    """
    global _calls
    _calls += 1
    if world_size == 1:
        return torch.distributed.HashStore()
    where = (os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"), rank, world_size)
    if where not in _stores:
        _stores[where], _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    return torch.distributed.PrefixStore(f"megarubric/{_calls}", _stores[where])


def shutdown() -> None:
    """Destroy the process groups of `initialize`."""
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
