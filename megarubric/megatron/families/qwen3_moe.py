"""Qwen3-MoE (30B-A3B, 235B-A22B): grouped-query attention with QK norm, SwiGLU experts, softmax top-k routing."""

from __future__ import annotations

from typing import Any

from megarubric.errors import BadInput
from megarubric.megatron.families import ParamSource, Run

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "moe_intermediate_size",
    "num_experts_per_tok",
    "rms_norm_eps",
)
# What the architecture can be configured to, that the Megatron model here does not do: key -> the values it does do.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "use_sliding_window": (False,),
}


def check(hf: dict[str, Any], where: str) -> None:
    for key in _REQUIRED:
        if not hf.get(key):
            raise BadInput(where, key, "is missing")
    if not num_experts(hf):
        raise BadInput(where, "num_experts", "is missing")
    for key, allowed in _ONLY.items():
        if hf.get(key, allowed[0]) not in allowed:
            raise BadInput(where, key, f"{hf[key]!r} is not supported for qwen3_moe, only {allowed[0]!r}")
    rope = _rope(hf)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise BadInput(where, "rope_parameters", f"rope type {kind!r} is not supported for qwen3_moe, only 'default'")
    if hf["num_attention_heads"] % hf["num_key_value_heads"]:
        raise BadInput(where, "num_key_value_heads", "must divide num_attention_heads")
    if hf["num_experts_per_tok"] > num_experts(hf):
        raise BadInput(where, "num_experts_per_tok", f"is more than the {num_experts(hf)} experts there are")
    if hf["num_experts_per_tok"] == 1 and hf.get("norm_topk_prob", False):
        # A single normalised gate is the constant 1: no gradient reaches the router.
        raise BadInput(where, "norm_topk_prob", "with one expert a token the router cannot learn")
    if not all(is_moe_layer(hf, i) for i in range(hf["num_hidden_layers"])) and not hf.get("intermediate_size"):
        raise BadInput(where, "intermediate_size", "is missing, and some layers are dense")


def num_experts(hf: dict[str, Any]) -> int:
    return int(hf.get("num_experts") or hf.get("num_local_experts") or 0)


def head_dim(hf: dict[str, Any]) -> int:
    return int(hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"])


def is_moe_layer(hf: dict[str, Any], layer: int) -> bool:
    step = hf.get("decoder_sparse_step", 1)
    return layer not in (hf.get("mlp_only_layers") or ()) and (layer + 1) % step == 0


def _rope(hf: dict[str, Any]) -> dict[str, Any]:
    # transformers 5 writes rope_parameters, earlier versions rope_scaling beside a plain rope_theta.
    return hf.get("rope_parameters") or hf.get("rope_scaling") or {}


def rope_theta(hf: dict[str, Any]) -> float:
    return float(_rope(hf).get("rope_theta") or hf.get("rope_theta") or 10_000.0)


def transformer_fields(hf: dict[str, Any]) -> dict[str, Any]:
    import torch.nn.functional as F

    return {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf.get("intermediate_size") or hf["moe_intermediate_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_query_groups": hf["num_key_value_heads"],
        "kv_channels": head_dim(hf),
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf["rms_norm_eps"],
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "num_moe_experts": num_experts(hf),
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_layer_freq": [int(is_moe_layer(hf, i)) for i in range(hf["num_hidden_layers"])],
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_router_score_function": "softmax",
        # softmax over the chosen logits equals the chosen probabilities divided by their sum (norm_topk_prob).
        "moe_router_pre_softmax": not hf.get("norm_topk_prob", False),
    }


def manifest(hf: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, vocab, d = hf["hidden_size"], hf["vocab_size"], head_dim(hf)
    q, kv = hf["num_attention_heads"] * d, hf["num_key_value_heads"] * d
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}

    def mlp(prefix: str, width: int) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = (width, hidden)
        shapes[f"{prefix}.up_proj.weight"] = (width, hidden)
        shapes[f"{prefix}.down_proj.weight"] = (hidden, width)

    for layer in range(hf["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes[f"{at}.input_layernorm.weight"] = (hidden,)
        shapes[f"{at}.self_attn.q_proj.weight"] = (q, hidden)
        shapes[f"{at}.self_attn.k_proj.weight"] = (kv, hidden)
        shapes[f"{at}.self_attn.v_proj.weight"] = (kv, hidden)
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, q)
        shapes[f"{at}.self_attn.q_norm.weight"] = (d,)
        shapes[f"{at}.self_attn.k_norm.weight"] = (d,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
        if is_moe_layer(hf, layer):
            shapes[f"{at}.mlp.gate.weight"] = (num_experts(hf), hidden)
            for expert in range(num_experts(hf)):
                mlp(f"{at}.mlp.experts.{expert}", hf["moe_intermediate_size"])
        else:
            mlp(f"{at}.mlp", hf["intermediate_size"])
    shapes["model.norm.weight"] = (hidden,)
    if not hf.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def param_source(hf: dict[str, Any], layer: int | None, name: str, expert: int | None) -> ParamSource:
    hidden, vocab = hf["hidden_size"], hf["vocab_size"]
    if layer is None:
        head = "model.embed_tokens.weight" if hf.get("tie_word_embeddings", False) else "lm_head.weight"
        return {
            "embedding.word_embeddings.weight": _whole("model.embed_tokens.weight", vocab, "rows"),
            "output_layer.weight": _whole(head, vocab, "rows"),
            "decoder.final_layernorm.weight": _whole("model.norm.weight", hidden),
        }[name]
    at = f"model.layers.{layer}"
    if expert is not None:
        return _mlp(f"{at}.mlp.experts.{expert}", hf["moe_intermediate_size"], hidden, expert=True)[name]
    d = head_dim(hf)
    sources = {
        "self_attention.linear_qkv.weight": _qkv(hf, f"{at}.self_attn"),
        "self_attention.linear_proj.weight": _whole(f"{at}.self_attn.o_proj.weight", hidden, "columns"),
        "self_attention.q_layernorm.weight": _whole(f"{at}.self_attn.q_norm.weight", d),
        "self_attention.k_layernorm.weight": _whole(f"{at}.self_attn.k_norm.weight", d),
        # The norm before a linear is a module of its own in the local spec, part of the linear in Transformer Engine's.
        "input_layernorm.weight": _whole(f"{at}.input_layernorm.weight", hidden),
        "self_attention.linear_qkv.layer_norm_weight": _whole(f"{at}.input_layernorm.weight", hidden),
        "pre_mlp_layernorm.weight": _whole(f"{at}.post_attention_layernorm.weight", hidden),
        "mlp.linear_fc1.layer_norm_weight": _whole(f"{at}.post_attention_layernorm.weight", hidden),
        "mlp.router.weight": _whole(f"{at}.mlp.gate.weight", num_experts(hf)),
    }
    if not is_moe_layer(hf, layer):
        dense = _mlp(f"{at}.mlp", hf["intermediate_size"], hidden, expert=False)
        sources |= {f"mlp.{key}": source for key, source in dense.items()}
    return sources[name]


def _whole(name: str, rows: int, split: Any = None) -> ParamSource:
    return ParamSource(parts=((Run(name, 0, rows),),), split=split)


def _mlp(prefix: str, width: int, hidden: int, *, expert: bool) -> dict[str, ParamSource]:
    gate, up, down = (f"{prefix}.{name}_proj.weight" for name in ("gate", "up", "down"))
    fc1, fc2 = (
        ("experts.linear_fc1.weight", "experts.linear_fc2.weight")
        if expert
        else ("linear_fc1.weight", "linear_fc2.weight")
    )
    return {
        fc1: ParamSource(parts=((Run(gate, 0, width),), (Run(up, 0, width),)), split="rows", expert=expert),
        fc2: ParamSource(parts=((Run(down, 0, hidden),),), split="columns", expert=expert),
    }


def _qkv(hf: dict[str, Any], prefix: str) -> ParamSource:
    """Megatron interleaves by key-value group: the queries of group 0, its key, its value, the queries of group 1..."""
    d, groups = head_dim(hf), hf["num_key_value_heads"]
    share = hf["num_attention_heads"] // groups * d
    runs: list[Run] = []
    for g in range(groups):
        runs.append(Run(f"{prefix}.q_proj.weight", g * share, (g + 1) * share))
        runs.append(Run(f"{prefix}.k_proj.weight", g * d, (g + 1) * d))
        runs.append(Run(f"{prefix}.v_proj.weight", g * d, (g + 1) * d))
    return ParamSource(parts=(tuple(runs),), split="rows")
