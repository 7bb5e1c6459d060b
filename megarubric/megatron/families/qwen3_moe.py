"""Qwen3-MoE (30B-A3B, 235B-A22B): grouped-query attention with QK norm, SwiGLU experts, softmax top-k routing."""

from __future__ import annotations

from typing import Any, ClassVar

from megarubric.megatron.families.decoder import Decoder


class Qwen3Moe(Decoder):
    model_type = "qwen3_moe"
    moe = True
    qk_norm = True
    only: ClassVar[dict[str, tuple[Any, ...]]] = {"attention_bias": (False,)}


FAMILY = Qwen3Moe()
