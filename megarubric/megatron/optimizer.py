"""Megatron's gradient buffers and distributed Adam around the model chunks of a rank.

Gradients are *summed* over data-parallel ranks and micro-batches, never averaged: the weights of a batch already carry
its normalisation, so the result is the gradient of one global sum, whatever the layout and the split.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megarubric.megatron import cpu

cpu.ensure()  # before the megatron imports below

from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer  # noqa: E402
from megatron.core.optimizer.optimizer import ChainedOptimizer  # noqa: E402

from megarubric.megatron.fp8_params import is_quantised  # noqa: E402
from megarubric.megatron.model import wrap_for_training  # noqa: E402

_SHARDING = "distrib_optim_sharding_type"
_METADATA = {_SHARDING: "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": True}


@dataclass(frozen=True)
class AdamSettings:
    """Decoupled-decay Adam (AdamW) and the global gradient-norm clip; `clip` 0 = none."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    offload: bool = False  # states and steps on the host (Megatron's HybridDeviceOptimizer)


class TrainedModel:
    """The model chunks with gradient buffers (`chunks`, what the pipeline schedules run) and their optimizer."""

    def __init__(self, models: Sequence[GPTModel], dtype: torch.dtype, adam: AdamSettings) -> None:
        """`models`: chunks with their weights set (the optimizer copies its float32 masters from them)."""
        self.config: Any = models[0].config
        self.quantised = any(is_quantised(p) for model in models for p in model.parameters())
        self.chunks = wrap_for_training(models)
        self.clip, self.offloaded = adam.clip, adam.offload
        settings = OptimizerConfig(
            optimizer="adam",
            lr=0.0,  # set at each step
            weight_decay=adam.weight_decay,
            adam_beta1=adam.beta1,
            adam_beta2=adam.beta2,
            adam_eps=adam.eps,
            clip_grad=adam.clip,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            optimizer_cpu_offload=adam.offload,
            optimizer_offload_fraction=1.0 if adam.offload else 0.0,
            # What the hybrid optimizer is written for: the host alone has float32 masters. With Megatron's own as well,
            # those would stay on the device, and no checkpoint could be loaded.
            use_precision_aware_optimizer=adam.offload,
            fp8_recipe=self.config.fp8_recipe if self.quantised else None,
            reuse_grad_buf_for_mxfp8_param_ag=self._staged,
        )
        self.optimizer: Any = get_megatron_optimizer(settings, self.chunks)
        for part in self._parts():
            _start_state(part)
        if self.quantised:
            self.weights_from_masters()

    @property
    def _staged(self) -> bool:
        """MXFP8 weights are gathered in bf16, through the gradient buffers: they are scaled along rows and columns."""
        return self.chunks[0].ddp_config.reuse_grad_buf_for_mxfp8_param_ag  # type: ignore[no-any-return]

    def _parts(self) -> list[Any]:
        chained = isinstance(self.optimizer, ChainedOptimizer)
        return list(self.optimizer.chained_optimizers) if chained else [self.optimizer]

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        for chunk in self.chunks:
            yield from chunk.parameters()

    def optimizer_tensors(self) -> Iterator[torch.Tensor]:
        """What Adam steps (masters, and parameters that are their own masters) and its state."""
        for part in self._parts():
            if part.optimizer is None:
                continue
            for group in part.optimizer.param_groups:
                yield from group["params"]
            for state in part.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, torch.Tensor))

    def zero_grad(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self, lr: float) -> tuple[float, bool]:
        """Clip the reduced gradients and step with learning rate `lr`.

        Returns the global gradient norm before clipping (L2, over all parameters of all ranks) and whether the step was
        taken: with a gradient that is not finite nothing changes, on any rank.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):
            return norm, False
        self._clip(norm)
        return norm, bool(self.optimizer.step_with_ready_grads())

    def _clip(self, norm: float) -> None:
        if self.clip <= 0 or norm <= self.clip:
            return
        scale = self.clip / (norm + 1e-6)
        for part in self._parts():
            name = "decoupled_grad" if self.offloaded else "grad"  # float32, of a bf16 parameter
            grads = [g for p in part.get_parameters() if (g := getattr(p, name, None)) is not None]
            if grads:
                torch._foreach_mul_(grads, scale)

    def sharded_state(self, model_state: Any, *, loading: bool) -> dict[int, Any]:
        """The optimizer for dist_checkpointing: masters and moments under the parameters' own names and shapes, so that
        any layout loads what any other saved. The first data-parallel rank gathers, over gloo into host memory, what
        the distributed optimizer has shared out. Groups (rates, steps) are not in it: they are the run's own."""
        state: dict[int, Any] = {}
        for number, part in enumerate(self._parts()):
            part.get_parameter_state_dp_zero = partial(_with_padding, part)
            try:
                whole = part.sharded_state_dict(model_state, is_loading=loading, metadata=_METADATA)
            finally:
                del part.get_parameter_state_dp_zero
            state[number] = whole["param_state"] or {}
        return state

    def load_optimizer(self, state: dict[int, Any], steps: int) -> None:
        """Restore the optimizer from what dist_checkpointing loaded into its sharded state, after `steps` steps."""
        for number, part in enumerate(self._parts()):
            whole = part.state_dict()
            for group in whole["optimizer"]["param_groups"]:
                group["step"] = steps
            whole |= {"param_state": state[number], "param_state_sharding_type": _METADATA[_SHARDING]}
            torch_adam = isinstance(part.optimizer, torch.optim.AdamW)
            if torch_adam:
                # Megatron looks for each of a parameter's states in the checkpoint, and torch's have a step.
                part._set_main_param_and_optimizer_states = partial(_set_without_step, part)
            part.load_state_dict(whole)
            if torch_adam:
                del part._set_main_param_and_optimizer_states
                _restore_steps(part.optimizer, steps)

    @torch.no_grad()
    def weights_from_masters(self) -> None:
        """Set the weights from the optimizer's float32 masters, as the end of a step does. Collective.

        Changes nothing where they are what a step left. Needs the gradient buffers, which hold nothing afterwards.
        """
        for part in self._parts():
            if self._staged:
                part._copy_main_params_to_param_buffer()
            else:
                part._copy_main_params_to_model_params()
            part.start_param_sync_for_bucket_group_subset()


def _with_padding(part: Any, *args: Any, **kwargs: Any) -> Any:
    """The gathered states, with the padding between a buffer's buckets put back.

    Megatron 0.19 gathers them without it and then cuts parameters out by their places in the padded buffer: with more
    than one bucket, and a first one that is padded, every later parameter gets its neighbour's values.
    """
    state = type(part).get_parameter_state_dp_zero(part, *args, **kwargs)
    if state is None:
        return None
    for number, buffer in enumerate(part.buffers):
        for tensors in state[number].values():
            for key, flat in tensors.items():
                if not isinstance(flat, torch.Tensor):
                    continue
                padded, at = flat.new_zeros(buffer.numel), 0
                for bucket in buffer.buckets:
                    padded[bucket.offset : bucket.offset + bucket.numel_unpadded] = flat[
                        at : at + bucket.numel_unpadded
                    ]
                    at += bucket.numel_unpadded
                tensors[key] = padded
    return state


def _set_without_step(part: Any, param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
    type(part)._set_main_param_and_optimizer_states(part, param, {"step": None, **tensors})  # None is left as it is


def _start_state(part: Any) -> None:
    """Make Adam's lazily created state now, as its first step would: a run can be saved before any step."""
    optimizer = part.optimizer
    if isinstance(optimizer, HybridDeviceOptimizer):
        for inner in optimizer.sub_optimizers:
            _start_adamw(inner)
        optimizer._sync_sub_optimizers_state_to_hdo()
    elif isinstance(optimizer, torch.optim.AdamW):
        _start_adamw(optimizer)
    elif optimizer is not None:
        part.init_state_fn(optimizer, part.config)  # Transformer Engine's FusedAdam, which counts steps by group


def _start_adamw(optimizer: torch.optim.AdamW) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p not in optimizer.state:
                optimizer.state[p] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }


def _restore_steps(optimizer: torch.optim.AdamW, steps: int) -> None:
    """Give each parameter its step count, as a tensor of its own: Megatron leaves all with one, or with none."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p]["step"] = torch.tensor(float(steps))
