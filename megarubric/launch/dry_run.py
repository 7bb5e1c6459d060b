"""`train --dry-run`: the resolved configuration, the layout, the memory, and the commands that would start."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from megarubric.config import TrainConfig, dump
from megarubric.launch import plan
from megarubric.launch.judge import engines_of, second_index
from megarubric.launch.memory import WIDTH, Kernels, StageMemory, model_size, stage_memory
from megarubric.launch.network import received_bytes
from megarubric.megatron.families import family_of

CONTEXT_GB = 3.0  # of a GPU: the CUDA context and NCCL's buffers


def describe(config: TrainConfig, hf: Mapping[str, Any], commands: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Everything a person checks before spending machine time."""
    p, size = config.parallel, model_size(hf)
    dp = p.ranks // (p.tp * p.pp * p.cp)
    on_hosts = f" on {p.nodes} hosts" if p.nodes > 1 else ""
    samples = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    lines = [
        "# resolved configuration",
        dump(config).rstrip(),
        "",
        "# model and layout",
        f"parameters {size.total / 1e6:,.1f} M, active a token {size.active / 1e6:,.1f} M",
        f"{p.ranks} trainer ranks{on_hosts} = dp {dp} x tp {p.tp} x pp {p.pp} x cp {p.cp};"
        f" experts: ep {p.ep} x etp {p.etp}",
        f"a step: {config.rollout.prompts_per_step} prompts x {config.rollout.samples_per_prompt} samples"
        f" = {samples} answers, {config.algorithm.updates_per_step} optimizer step(s)",
        "",
        *memory_table(config, hf),
        *_network(config, hf),
        "",
        "# commands",
        *(f"{name}: {shlex.join(argv)}" for name, argv in commands),
    ]
    return "\n".join(lines)


def memory_table(c: TrainConfig, hf: Mapping[str, Any]) -> list[str]:
    """Lines: a rank of every kind of pipeline stage, and for a GPU what each phase of a step needs of it."""
    fast = c.parallel.device_gb and c.model.dtype == "bfloat16"  # as megatron.model.kernels, with Transformer Engine
    kernels: Kernels = "transformer_engine" if fast else "local"
    stages = stage_memory(hf, c.parallel, c.train, c.model.dtype, kernels)
    lines = [
        f"# memory of a trainer rank in GB (arithmetic; micro-batches of {c.train.micro_batch_tokens} tokens)",
        "stage  layers  parameters  gradients  optimizer  activations  logits   total  on the host"
        + ("  FP8 copies of the weights" if any(s.fp8_copies for s in stages) else ""),
    ]
    for s in _kinds(stages):
        columns = (s.parameters, s.gradients, s.optimizer, s.activations, s.logits, s.total, s.host)
        widths = (10, 9, 9, 11, 6, 6, 11)
        lines.append(
            f"{s.stage:>5}  {s.layers:>6}  "
            + "  ".join(f"{n / 1e9:>{w}.2f}" for n, w in zip(columns, widths))
            + (f"  {s.fp8_copies / 1e9:>25.2f}" if s.fp8_copies else "")
        )
    if c.parallel.device_gb is None:
        return [*lines, f"exchange buckets {_buckets_gb(c, hf):.2f} GB in shared memory, once a host"]
    return [*lines, "", *_phases(c, hf, stages, c.parallel.device_gb)]


def _network(c: TrainConfig, hf: Mapping[str, Any]) -> list[str]:
    if c.parallel.nodes == 1:
        return []
    most = max(received_bytes(hf, c.parallel, c.model.dtype))
    if not most:
        return ["between hosts    no weights: the trainer ranks of each host hold a whole model"]
    share = most / (model_size(hf).total * WIDTH[c.model.dtype])
    changed = ", or what of it changed" if c.exchange.delta else ""
    return [f"between hosts  {most / 1e9:8.2f} GB to a host with every version{changed} ({share:.0%} of the weights)"]


def _kinds(stages: Sequence[StageMemory]) -> list[StageMemory]:
    """First, second, last: those between are like the second but for their activations."""
    return [stages[i] for i in sorted({0, min(1, len(stages) - 1), len(stages) - 1})]


def _phases(c: TrainConfig, hf: Mapping[str, Any], stages: Sequence[StageMemory], device: float) -> list[str]:
    """A GPU that a trainer rank, a policy engine and a judge engine share by turns. Engines of one kind have their own
    GPUs, so two judges meet only where the second finds none left."""
    r, own = c.rollout, engines_of(c)
    policy = model_size(hf).total * WIDTH[c.model.dtype] / r.tensor_parallel / 1e9
    judges = 2 if len(own) > 1 and own[-1] == "second-judge" and second_index(c) == 0 else len(own[:1])
    judge = judges * c.judge.gpu_memory_utilization
    standing = max(s.parameters for s in stages) / 1e9
    # In device memory they stay for as long as the run lives; in the host's they are on no device at all.
    kept = _buckets_gb(c, hf) if plan.weights_through(c, gpus=True) == "device" else 0.0
    stay = ", two buckets" if kept else ""
    need = {
        "write and judge": (
            device * (r.gpu_memory_utilization + judge) + kept,
            f"policy {r.gpu_memory_utilization:.0%} of the device"
            + (f", {'both judges' if judges > 1 else 'judge'} {judge:.0%}" if judges else "")
            + stay,
        ),
        "train": (max(s.total for s in stages) / 1e9 + kept, f"the fullest rank, engines asleep{stay}"),
        "exchange": (
            standing + policy + kept,
            f"a rank's parameters, the policy's weights / {r.tensor_parallel}{stay}",
        ),
    }
    lines = [f"# a GPU of {device:g} GB, phase by phase, {CONTEXT_GB:g} GB of it for CUDA and NCCL"]
    for name, (gb, what) in need.items():
        verdict = "fits" if gb + CONTEXT_GB <= device else f"DOES NOT FIT: {gb + CONTEXT_GB - device:.1f} GB too much"
        lines.append(f"{name:<16} {gb:6.1f} GB  {verdict}  ({what})")
    kv = device * r.gpu_memory_utilization - policy
    lines.append(
        f"KV cache         {kv:6.1f} GB a policy GPU"
        if kv > 0
        else f"KV cache         DOES NOT FIT: the policy's weights are {policy:.1f} GB a GPU,"
        f" its share {device * r.gpu_memory_utilization:.1f} GB (rollout.tensor_parallel, gpu_memory_utilization)"
    )
    away = c.parallel.ranks_per_node * max(s.parameters + s.optimizer + s.host for s in stages) / 1e9
    lines.append(f"a host's memory  {away:6.1f} GB  (parameters and optimizer of its ranks, away from the GPUs)")
    return lines


def _buckets_gb(c: TrainConfig, hf: Mapping[str, Any]) -> float:
    """Both buckets; a tensor that is larger than one gets one of its size."""
    config = dict(hf)
    largest = max(math.prod(shape) for shape in family_of(config, "config.json").manifest(config).values())
    return 2 * max(c.exchange.bucket_mb * 2**20, largest * WIDTH[c.model.dtype]) / 1e9
