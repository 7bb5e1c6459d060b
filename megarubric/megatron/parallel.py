"""How the ranks share one model: the layout, its checks, and the process groups made from it.

Megatron's own terms. A rank has a place on the dense axes tp x cp x dp x pp and, for expert layers, on
etp x ep x edp x pp; both have the same number of ranks: ``dp = world / (tp * cp * pp)`` and
``edp = world / (etp * ep * pp)``. Expert parallelism therefore takes its ranks out of data, tensor and context
parallelism; it needs none of its own.
"""

from __future__ import annotations

import math
import os
from datetime import timedelta
from typing import Any

import msgspec
import torch

from megarubric.errors import BadInput
from megarubric.megatron import cpu

cpu.ensure()  # before the megatron imports below

from megatron.core import parallel_state, tensor_parallel  # noqa: E402

WHERE = "parallel layout"


class ParallelLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Degrees of parallelism. `vpp` is the number of model chunks a pipeline rank holds (None: not interleaved).

    `etp` is the tensor parallelism inside one expert; 1 keeps experts whole, which is what fine-grained experts want.
    `sequence_parallel` follows `tp`: Megatron's expert layers need it with tp > 1, and it saves activations anyway.
    """

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    etp: int = 1
    cp: int = 1

    @property
    def sequence_parallel(self) -> bool:
        return self.tp > 1

    @property
    def smallest_world(self) -> int:
        """The least number of ranks this layout can run on; every valid world size is a multiple of it."""
        dense, expert = self.tp * self.cp * self.pp, self.etp * self.ep * self.pp
        return math.lcm(dense, expert)

    def dp(self, world_size: int) -> int:
        """Data parallel size: how many ranks read different tokens with the same dense weights."""
        return world_size // (self.tp * self.cp * self.pp)

    def edp(self, world_size: int) -> int:
        """Expert data parallel size: how many ranks hold the same experts."""
        return world_size // (self.etp * self.ep * self.pp)

    def check(self, world_size: int, hf_config: dict[str, Any] | None = None) -> None:
        """Raise BadInput, one line, when `world_size` ranks cannot run it or `hf_config`'s model does not divide so."""
        for name in ("tp", "pp", "ep", "etp", "cp"):
            if getattr(self, name) < 1:
                raise BadInput(WHERE, name, f"must be at least 1, not {getattr(self, name)}")
        if self.vpp is not None and self.vpp < 2:
            raise BadInput(WHERE, "vpp", f"counts the chunks of a pipeline rank and must be at least 2, not {self.vpp}")
        if self.vpp is not None and self.pp < 2:
            raise BadInput(WHERE, "vpp", "interleaving needs pp of at least 2")
        dense, expert = self.tp * self.cp * self.pp, self.etp * self.ep * self.pp
        if world_size % dense:
            raise BadInput(
                WHERE,
                "tp * cp * pp",
                f"{world_size} ranks cannot be divided by tp {self.tp} * cp {self.cp} * pp {self.pp} = {dense}",
            )
        if world_size % expert:
            raise BadInput(
                WHERE,
                "etp * ep * pp",
                f"{world_size} ranks cannot be divided by etp {self.etp} * ep {self.ep} * pp {self.pp} = {expert}",
            )
        if hf_config is not None:
            self._check_model(hf_config)

    def _check_model(self, hf: dict[str, Any]) -> None:
        heads, groups, layers = hf["num_attention_heads"], hf["num_key_value_heads"], hf["num_hidden_layers"]
        if heads % self.tp:
            raise BadInput(WHERE, "tp", f"{heads} attention heads cannot be divided by tp {self.tp}")
        if groups % self.tp and self.tp % groups:
            raise BadInput(WHERE, "tp", f"{groups} key-value heads neither divide tp {self.tp} nor are divided by it")
        chunks = self.pp * (self.vpp or 1)
        if layers % chunks:
            what = f"pp {self.pp}" + (f" * vpp {self.vpp}" if self.vpp else "")
            raise BadInput(WHERE, "pp", f"{layers} layers cannot be divided by {what}")
        experts = hf.get("num_experts") or hf.get("num_local_experts") or 0
        if self.ep > 1 and (not experts or experts % self.ep):
            raise BadInput(WHERE, "ep", f"{experts or 'no'} experts cannot be divided by ep {self.ep}")
        width = hf.get("moe_intermediate_size")
        if width and width % self.etp:
            raise BadInput(WHERE, "etp", f"moe_intermediate_size {width} cannot be divided by etp {self.etp}")
        if self.cp > 1 and not torch.cuda.is_available():
            raise BadInput(WHERE, "cp", "context parallelism needs Transformer Engine's attention, hence a GPU")


def initialize(layout: ParallelLayout, *, seed: int = 1, backend: str | None = None, timeout_s: float = 600.0) -> None:
    """Make torch.distributed and Megatron's process groups of `layout` on this rank.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (without WORLD_SIZE: one rank alone). `backend` is
    nccl with CUDA and gloo without. `seed` seeds the random states Megatron tracks (dropout; weights come from files or
    from `weights.init_weights`), offset by pipeline stage as Megatron-LM does. `timeout_s` bounds every collective, so
    that ranks whose peer died end. Calling it again after `shutdown` is fine.

    Raises BadInput when the world size does not fit the layout.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    layout.check(world_size)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not torch.distributed.is_initialized():
        backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
        alone: dict[str, Any] = {} if world_size > 1 else {"store": torch.distributed.HashStore()}
        torch.distributed.init_process_group(
            backend,
            rank=int(os.environ.get("RANK", "0")),
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
            **alone,
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


def shutdown() -> None:
    """Destroy the process groups of `initialize`."""
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
