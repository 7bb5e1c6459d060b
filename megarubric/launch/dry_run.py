"""`train --dry-run`: the resolved configuration, the layout, the memory, and the commands that would start."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from megarubric.config import TrainConfig, dump
from megarubric.launch.memory import model_size, rank_memory


def gib(n: int) -> str:
    return f"{n / 2**30:.2f} GiB"


def describe(config: TrainConfig, hf: Mapping[str, Any], commands: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Everything a person checks before spending machine time."""
    p, size = config.parallel, model_size(hf)
    m = rank_memory(
        hf,
        p,
        config.model.dtype,
        config.train.micro_batch_tokens,
        config.exchange.bucket_mb << 20,
        config.train.recompute,
    )
    dp = p.ranks // (p.tp * p.pp * p.cp)
    samples = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    lines = [
        "# resolved configuration",
        dump(config).rstrip(),
        "",
        "# model and layout",
        f"parameters {size.total / 1e6:,.1f} M, active a token {size.active / 1e6:,.1f} M",
        f"{p.ranks} trainer ranks = dp {dp} x tp {p.tp} x pp {p.pp} x cp {p.cp}; experts: ep {p.ep} x etp {p.etp}",
        f"a step: {config.rollout.prompts_per_step} prompts x {config.rollout.samples_per_prompt} samples"
        f" = {samples} answers, {config.algorithm.updates_per_step} optimizer step(s)",
        "",
        "# memory of the fullest trainer rank (arithmetic; CUDA context, NCCL and fragmentation come on top)",
        f"parameters   {gib(m.parameters)}",
        f"gradients    {gib(m.gradients)}",
        f"optimizer    {gib(m.optimizer)}",
        f"activations  {gib(m.activations)}  at {config.train.micro_batch_tokens} tokens a micro-batch",
        f"buckets      {gib(m.buckets)}  shared memory of the host, once",
        f"total        {gib(m.total)}",
        "",
        "# commands",
        *(f"{name}: {shlex.join(argv)}" for name, argv in commands),
    ]
    return "\n".join(lines)
