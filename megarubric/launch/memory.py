"""Memory of one trainer rank by arithmetic, from a Hugging Face config and a layout: for `train --dry-run`.

Counts what is allocated for the whole run: parameters, gradients (float32 buffer), distributed-optimizer state
(float32 master copy and two Adam moments, shared by the data-parallel ranks), the activations of one micro-batch, and
the exchange buckets. Fragmentation, NCCL and the CUDA context come on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from megarubric.config.schema import Parallel

_BYTES = {"float32": 4, "bfloat16": 2}


class ModelSize(msgspec.Struct, frozen=True):
    """Parameter counts of a Qwen3-MoE (or dense) decoder."""

    embedding: int  # one table; the head is another of the same size unless tied
    tied: bool
    attention: int  # a layer: q, k, v, o projections and QK norms
    norms: int  # a layer
    router: int  # a MoE layer
    expert: int  # one expert (or the dense MLP of a dense model)
    experts: int  # experts a layer; 1 for a dense model
    active_experts: int
    layers: int

    @property
    def total(self) -> int:
        layer = self.attention + self.norms + self.router + self.experts * self.expert
        return self.embedding * (1 if self.tied else 2) + self.layers * layer

    @property
    def active(self) -> int:
        """Parameters used for one token."""
        layer = self.attention + self.norms + self.router + self.active_experts * self.expert
        return self.embedding * (1 if self.tied else 2) + self.layers * layer


def model_size(hf: Mapping[str, Any]) -> ModelSize:
    """Counts from config.json keys of the Qwen3 families."""
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hidden // heads
    kv = hf.get("num_key_value_heads", heads)
    experts = hf.get("num_experts") or 1
    width = hf["moe_intermediate_size"] if experts > 1 else hf["intermediate_size"]
    return ModelSize(
        embedding=hf["vocab_size"] * hidden,
        tied=bool(hf.get("tie_word_embeddings", False)),
        attention=hidden * head_dim * (2 * heads + 2 * kv) + 2 * head_dim,
        norms=2 * hidden,
        router=hidden * experts if experts > 1 else 0,
        expert=3 * hidden * width,
        experts=experts,
        active_experts=hf.get("num_experts_per_tok", 1) if experts > 1 else 1,
        layers=hf["num_hidden_layers"],
    )


class RankMemory(msgspec.Struct, frozen=True):
    """Bytes on the fullest rank (an end pipeline stage)."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buckets: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buckets


def rank_memory(
    hf: Mapping[str, Any], p: Parallel, dtype: str, micro_batch_tokens: int, bucket_bytes: int, recompute: bool
) -> RankMemory:
    """Bytes of the fullest rank. Activations: the tensors a decoder layer keeps for its backward pass, without fusion
    (about 34 hidden-sized values a token in attention and norms, and the routed experts' inputs and hidden units); with
    recompute only each layer's input is kept, plus one layer's worth."""
    size, width = model_size(hf), _BYTES[dtype]
    hidden = hf["hidden_size"]
    layers = -(-size.layers // p.pp)
    dense = layers * (size.attention // p.tp + size.norms + size.router) + size.embedding // p.tp
    routed = layers * size.experts * size.expert // (p.ep * p.etp)
    dp = max(1, p.ranks // (p.tp * p.pp * p.cp))
    expert_dp = max(1, p.ranks // (p.pp * p.ep * p.etp))
    state = 12 * (dense // (dp * p.cp) + routed // expert_dp)
    tokens = micro_batch_tokens // p.cp
    expert_width = size.expert // (3 * hidden)
    layer = tokens * width * (34 * hidden // p.tp + size.active_experts * (2 * hidden + 4 * expert_width))
    kept = tokens * width * hidden * layers + layer if recompute else layer * layers
    logits = tokens * hf["vocab_size"] // p.tp * 4
    return RankMemory((dense + routed) * width, (dense + routed) * 4, state, kept + logits, 2 * bucket_bytes)
