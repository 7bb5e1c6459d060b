"""How answers are written: the section of a run configuration, and what is refused in it."""

from __future__ import annotations

import msgspec

from megarubric.config.section import positive

MOST_OVERSAMPLE = 4.0


class Rollout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How answers are written: groups of `samples_per_prompt` for `prompts_per_step` prompts."""

    engines: int = 1
    tensor_parallel: int = 1
    prompts_per_step: int = 16
    samples_per_prompt: int = 8
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    max_num_seqs: int = 256
    gpu_memory_utilization: float = 0.45  # of a GPU shared with a trainer rank
    cpu_kv_gib: float = 0.5
    ignore_eos: bool = False  # benchmarks only: every answer has max_new_tokens
    dynamic_rounds: int = 1  # groups whose answers have equal rewards are replaced in up to so many rounds - 1 (DAPO)
    oversample: float = 1.0  # begin so many times the groups, end with prompts_per_step, go on with the rest next step
    max_staleness: int = 4  # a sample left from a step is begun anew when its first token is more versions old
    replay: str | None = None  # a run's rollouts/ directory: train on those answers, sample none


def check_rollout(r: Rollout, tis_cap: float) -> str | None:
    """First thing wrong with the section, as ``key: sentence``, or None. `tis_cap`: `algorithm.tis_cap`."""
    counts = (
        "engines",
        "tensor_parallel",
        "prompts_per_step",
        "samples_per_prompt",
        "max_new_tokens",
        "dynamic_rounds",
    )
    if wrong := positive(r, "rollout", *counts, "temperature", "max_num_seqs", "cpu_kv_gib"):
        return wrong
    if not 0 < r.top_p <= 1:
        return f"rollout.top_p: must be in (0, 1], is {r.top_p}"
    if r.samples_per_prompt < 2:
        return "rollout.samples_per_prompt: a group needs at least 2 samples to have an advantage"
    if not 1 <= r.oversample <= MOST_OVERSAMPLE:
        return f"rollout.oversample: must be from 1 (off) to {MOST_OVERSAMPLE:g}, is {r.oversample}"
    if r.max_staleness < 0:
        return f"rollout.max_staleness: must not be negative, is {r.max_staleness}"
    if r.replay is not None and r.dynamic_rounds > 1:
        return "rollout.dynamic_rounds: rollout.replay draws no prompts; its files say which answers were used"
    if r.replay is not None and r.oversample > 1:
        return "rollout.oversample: rollout.replay writes no answers that could be left for the next step"
    if r.oversample > 1 and tis_cap == 0:
        return (
            "rollout.oversample: older weights write a part of the answers, so algorithm.tis_cap must correct for them"
        )
    return None
