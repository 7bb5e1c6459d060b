"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): biased QKV without QK norm, and one shared expert behind a gate.

The shared expert sees every token; its output is scaled by a sigmoid of one learned projection of the token.
"""

from __future__ import annotations

from typing import Any

from megarubric.megatron.families.decoder import Decoder


class Qwen2Moe(Decoder):
    model_type = "qwen2_moe"
    moe = True
    qk_norm = False
    required = (*Decoder.required, "shared_expert_intermediate_size")

    def qkv_bias(self, hf: dict[str, Any]) -> bool:
        return bool(hf.get("qkv_bias", True))

    def shared_expert_width(self, hf: dict[str, Any]) -> int:
        return int(hf["shared_expert_intermediate_size"])


FAMILY = Qwen2Moe()
