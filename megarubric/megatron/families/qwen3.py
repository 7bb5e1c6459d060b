"""Qwen3 dense (0.6B to 32B): Qwen3-MoE's attention over a plain SwiGLU MLP; the small ones tie their embeddings."""

from __future__ import annotations

from typing import Any, ClassVar

from megarubric.megatron.families.decoder import Decoder


class Qwen3(Decoder):
    model_type = "qwen3"
    moe = False
    qk_norm = True
    only: ClassVar[dict[str, tuple[Any, ...]]] = {"attention_bias": (False,)}
    required = (*Decoder.required, "intermediate_size")


FAMILY = Qwen3()
