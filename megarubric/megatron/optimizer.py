"""Megatron's gradient buffers and distributed Adam around the model chunks of a rank.

Gradients are *summed* over data-parallel ranks and micro-batches, never averaged: the weights of a batch already carry
its normalisation, so the result is the gradient of one global sum, whatever the layout and the split.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megarubric.megatron import cpu

cpu.ensure()  # before the megatron imports below

from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer.optimizer import ChainedOptimizer  # noqa: E402

from megarubric.megatron.model import wrap_for_training  # noqa: E402


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
        self.chunks = wrap_for_training(models)
        self.clip = adam.clip
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
        )
        self.optimizer: Any = get_megatron_optimizer(settings, self.chunks)
        for part in self._parts():
            _start_state(part.optimizer)

    def _parts(self) -> list[Any]:
        chained = isinstance(self.optimizer, ChainedOptimizer)
        return list(self.optimizer.chained_optimizers) if chained else [self.optimizer]

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        for chunk in self.chunks:
            yield from chunk.parameters()

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
            grads = [p.grad for p in part.get_parameters() if p.grad is not None]
            if grads:
                torch._foreach_mul_(grads, scale)

    def load_optimizer(self, state: Any) -> None:
        """Restore the optimizer from what dist_checkpointing loaded into its sharded state dict."""
        self.optimizer.load_state_dict(state)
        for part in self._parts():
            if isinstance(part.optimizer, torch.optim.AdamW):
                _restore_steps(part.optimizer)

    def weights_changed(self) -> None:
        """Take the model's present weights as the optimizer's masters (after weights were written from outside)."""
        self.optimizer.reload_model_params()


def _start_state(optimizer: torch.optim.Optimizer) -> None:
    """Make torch AdamW's lazily created state now, as its first step would: a run can be saved before any step."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return  # Transformer Engine's FusedAdam keeps its step in the group, and Megatron copes with it being empty
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p not in optimizer.state:
                optimizer.state[p] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }


def _restore_steps(optimizer: torch.optim.AdamW) -> None:
    """Give each parameter the step count that was loaded, as a tensor of its own.

    Megatron 0.19 leaves two faults with torch's AdamW in the dp_reshardable format: it restores a group's step but then
    copies the running optimizer's over the parameters' (0 in a new process: a wrong bias correction, silently), and all
    parameters share one tensor, which then advances once a parameter.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p]["step"] = torch.tensor(float(group["step"]))
