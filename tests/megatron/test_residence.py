"""Handing the device over and back, with the host's memory in the device's place: what the optimizer keeps stays right.

Tensors say that they are on a device, but those that an optimizer on the host makes. That is asked by two modules only,
the residence and Megatron's hybrid optimizer; everything else computes as it does on a CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from small_models import QWEN3_MOE, grpo_batch, write_config

pytestmark = pytest.mark.engine

HF_CONFIG = QWEN3_MOE | {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "head_dim": 8,
    "initializer_range": 0.1,
}


def pretend(offload: bool) -> list[Any]:
    """Give this process, which ends after the test, a device; with `offload` only the storages that are then put into
    the returned list are on it when the residence asks."""
    import torch

    host: dict[int, Any] = {}  # storages that the hybrid optimizer has on the host, kept so that none comes again
    on_device: list[Any] = []

    def keep(tensor: Any) -> Any:
        host[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    def is_cuda(tensor: Any) -> bool:
        asks, storage = str(sys._getframe(1).f_globals.get("__name__")), tensor.untyped_storage()._cdata
        if offload and asks == "megarubric.megatron.residence":
            return storage in {known._cdata for known in on_device}
        return asks.endswith((".residence", ".hybrid_optimizer")) and storage not in host

    def pin_memory(tensor: Any) -> Any:
        return keep(tensor.detach().clone())

    to_float, empty = torch.Tensor.float, torch.empty

    def float_(tensor: Any) -> Any:
        out = to_float(tensor)
        return keep(out) if tensor.untyped_storage()._cdata in host else out

    def empty_(*shape: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
        return empty(*shape, **kwargs)

    torch.Tensor.is_cuda = property(is_cuda)  # type: ignore[assignment]
    torch.Tensor.pin_memory, torch.Tensor.float = pin_memory, float_  # type: ignore[assignment, method-assign]
    torch.empty = empty_
    torch.cuda.empty_cache = lambda: None
    return on_device


def taking_turns(model_dir: str, path: str, config: dict[str, Any]) -> dict[str, Any]:
    """Four steps, the same with turns between them, and the same again from checkpoints of step 0 and 2."""

    from megarubric.megatron import device
    from megarubric.megatron.messages import WorkerConfig
    from megarubric.megatron.trainer import Trainer
    from megarubric.recipe.algorithms import algorithm

    on_device = pretend(config.get("optimizer_offload", False))
    device.check = lambda config: None
    settings = {"micro_batch_tokens": 64, "shm_prefix": "mrturn", "seed": 3, "weight_decay": 0.1, "grad_clip": 0.5}
    trainer = Trainer(WorkerConfig(model_dir=model_dir, init="random", timeout_s=60, **settings, **config))  # type: ignore[arg-type]
    trainer.residence._on_device = True
    buffers = [b for c in trainer.model.chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
    on_device += [b.param_data.untyped_storage() for b in buffers]
    optimizers = [type(part.optimizer).__name__ for part in trainer.model._parts()]

    def step(number: int) -> tuple[float, float]:
        batch = grpo_batch(number, HF_CONFIG["vocab_size"])
        (metrics,) = trainer.train(batch, algorithm("grpo").settings(), 1e-3)
        return metrics.loss, metrics.grad_norm

    def turn(whole_first: bool = False) -> None:
        """The device to the engines and back, as before an exchange or, `whole_first`, as after a checkpoint."""
        if not whole_first:
            trainer.offload()
        trainer.offload(parameters=True)
        assert all(b.param_data.untyped_storage().nbytes() == 0 for b in buffers)
        moved = trainer.residence._stowed  # masters of their own, and moments
        assert bool(moved) != config.get("optimizer_offload", False)
        trainer.onload()

    trainer.save(path + "-0", "{}")
    straight = [step(n) for n in range(4)]
    trainer.load(path + "-0")
    turn(whole_first=True)
    turns = []
    for n in range(4):
        turns.append(step(n))
        turn()
        if n == 1:
            trainer.save(path + "-2", "{}")
            turn(whole_first=True)
    trainer.load(path + "-2")
    turn()
    return {"straight": straight, "turns": turns, "resumed": [step(n) for n in (2, 3)], "optimizers": optimizers}


@pytest.mark.parametrize("config", [{"dtype": "float32"}, {"dtype": "bfloat16", "optimizer_offload": True}])
def test_turns_change_no_number(ranks: Any, tmp_path: Path, config: dict[str, Any]) -> None:
    write_config(tmp_path, HF_CONFIG)
    run = {"model_dir": str(tmp_path), "path": str(tmp_path / "saved"), "config": config}
    (result,) = ranks(1, taking_turns, **run)
    assert ("HybridDeviceOptimizer" in result["optimizers"]) == ("optimizer_offload" in config)
    assert result["turns"] == result["straight"]
    assert result["resumed"] == result["straight"][2:]
    norms = [norm for _, norm in result["straight"]]
    assert len(set(norms)) == 4 and max(norms) > 0.5  # the weights move, and the gradients are clipped
