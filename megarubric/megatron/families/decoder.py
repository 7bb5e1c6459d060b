"""What the Qwen decoders share: grouped-query attention, SwiGLU, RMS norms, and an MoE or a dense MLP in each layer.

A family is an instance of a subclass that says what differs. Names and shapes are written once, here.
"""

from __future__ import annotations

from typing import Any, ClassVar

from megarubric.errors import BadInput
from megarubric.megatron.families import ParamSource, Run

Shapes = dict[str, tuple[int, ...]]


def whole(name: str, rows: int, split: Any = None) -> ParamSource:
    """A parameter that is one Hugging Face tensor."""
    return ParamSource(parts=((Run(name, 0, rows),),), split=split)


class Decoder:
    """See `families.Family`. `moe`, `qk_norm` and `qkv_bias` say what a layer of the architecture has."""

    model_type: ClassVar[str]
    moe: ClassVar[bool]
    qk_norm: ClassVar[bool]
    # What the architecture can be configured to, that the Megatron model here does not do: key -> values it does do.
    only: ClassVar[dict[str, tuple[Any, ...]]] = {}
    required: ClassVar[tuple[str, ...]] = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
    )

    # Configuration ---------------------------------------------------------------------------------------------------

    def check(self, hf: dict[str, Any], where: str) -> None:
        for key in self.required + (("moe_intermediate_size", "num_experts_per_tok") if self.moe else ()):
            if not hf.get(key):
                raise BadInput(where, key, "is missing")
        if self.moe and not self.num_experts(hf):
            raise BadInput(where, "num_experts", "is missing")
        shared = {"hidden_act": ("silu",), "attention_dropout": (0, 0.0), "use_sliding_window": (False,)}
        for key, allowed in {**shared, **self.only}.items():
            if hf.get(key, allowed[0]) not in allowed:
                reason = f"{hf[key]!r} is not supported for {self.model_type}, only {allowed[0]!r}"
                raise BadInput(where, key, reason)
        kind = _rope(hf).get("rope_type", _rope(hf).get("type", "default"))
        if kind != "default":
            reason = f"rope type {kind!r} is not supported for {self.model_type}, only 'default'"
            raise BadInput(where, "rope_parameters", reason)
        if hf["num_attention_heads"] % hf["num_key_value_heads"]:
            raise BadInput(where, "num_key_value_heads", "must divide num_attention_heads")
        if self.moe:
            if hf["num_experts_per_tok"] > self.num_experts(hf):
                reason = f"is more than the {self.num_experts(hf)} experts there are"
                raise BadInput(where, "num_experts_per_tok", reason)
            if hf["num_experts_per_tok"] == 1 and hf.get("norm_topk_prob", False):
                # A single normalised gate is the constant 1: no gradient reaches the router.
                raise BadInput(where, "norm_topk_prob", "with one expert a token the router cannot learn")
        dense = [i for i in range(hf["num_hidden_layers"]) if not self.is_moe_layer(hf, i)]
        if dense and not hf.get("intermediate_size"):
            raise BadInput(where, "intermediate_size", "is missing, and some layers are dense")

    def num_experts(self, hf: dict[str, Any]) -> int:
        return int(hf.get("num_experts") or hf.get("num_local_experts") or 0)

    def head_dim(self, hf: dict[str, Any]) -> int:
        return int(hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"])

    def is_moe_layer(self, hf: dict[str, Any], layer: int) -> bool:
        step = hf.get("decoder_sparse_step", 1)
        return self.moe and layer not in (hf.get("mlp_only_layers") or ()) and (layer + 1) % step == 0

    def qkv_bias(self, hf: dict[str, Any]) -> bool:
        return False

    def shared_expert_width(self, hf: dict[str, Any]) -> int:
        """Intermediate size of the expert every token goes through; 0 when there is none."""
        return 0

    def rope_theta(self, hf: dict[str, Any]) -> float:
        return float(_rope(hf).get("rope_theta") or hf.get("rope_theta") or 10_000.0)

    def transformer_fields(self, hf: dict[str, Any]) -> dict[str, Any]:
        import torch.nn.functional as F

        fields = {
            "num_layers": hf["num_hidden_layers"],
            "hidden_size": hf["hidden_size"],
            "ffn_hidden_size": hf.get("intermediate_size") or hf["moe_intermediate_size"],
            "num_attention_heads": hf["num_attention_heads"],
            "num_query_groups": hf["num_key_value_heads"],
            "kv_channels": self.head_dim(hf),
            "normalization": "RMSNorm",
            "layernorm_epsilon": hf["rms_norm_eps"],
            "qk_layernorm": self.qk_norm,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "add_bias_linear": False,
            "add_qkv_bias": self.qkv_bias(hf),
        }
        if self.moe:
            fields |= {
                "num_moe_experts": self.num_experts(hf),
                "moe_ffn_hidden_size": hf["moe_intermediate_size"],
                "moe_layer_freq": [int(self.is_moe_layer(hf, i)) for i in range(hf["num_hidden_layers"])],
                "moe_router_topk": hf["num_experts_per_tok"],
                "moe_router_score_function": "softmax",
                # softmax over the chosen logits equals the chosen probabilities divided by their sum (norm_topk_prob).
                "moe_router_pre_softmax": not hf.get("norm_topk_prob", False),
            }
        if self.shared_expert_width(hf):
            fields |= {
                "moe_shared_expert_intermediate_size": self.shared_expert_width(hf),
                "moe_shared_expert_gate": True,
            }
        return fields

    # Tensors of the checkpoint ---------------------------------------------------------------------------------------

    def manifest(self, hf: dict[str, Any]) -> Shapes:
        hidden, vocab, d = hf["hidden_size"], hf["vocab_size"], self.head_dim(hf)
        q, kv = hf["num_attention_heads"] * d, hf["num_key_value_heads"] * d
        shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}

        def mlp(prefix: str, width: int) -> None:
            shapes[f"{prefix}.gate_proj.weight"] = (width, hidden)
            shapes[f"{prefix}.up_proj.weight"] = (width, hidden)
            shapes[f"{prefix}.down_proj.weight"] = (hidden, width)

        for layer in range(hf["num_hidden_layers"]):
            at = f"model.layers.{layer}"
            shapes[f"{at}.input_layernorm.weight"] = (hidden,)
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, hidden)
                if self.qkv_bias(hf):
                    shapes[f"{at}.self_attn.{name}_proj.bias"] = (rows,)
            shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, q)
            if self.qk_norm:
                shapes[f"{at}.self_attn.q_norm.weight"] = (d,)
                shapes[f"{at}.self_attn.k_norm.weight"] = (d,)
            shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
            if not self.is_moe_layer(hf, layer):
                mlp(f"{at}.mlp", hf["intermediate_size"])
                continue
            shapes[f"{at}.mlp.gate.weight"] = (self.num_experts(hf), hidden)
            for expert in range(self.num_experts(hf)):
                mlp(f"{at}.mlp.experts.{expert}", hf["moe_intermediate_size"])
            if self.shared_expert_width(hf):
                mlp(f"{at}.mlp.shared_expert", self.shared_expert_width(hf))
                shapes[f"{at}.mlp.shared_expert_gate.weight"] = (1, hidden)
        shapes["model.norm.weight"] = (hidden,)
        if not hf.get("tie_word_embeddings", False):
            shapes["lm_head.weight"] = (vocab, hidden)
        return shapes

    # Megatron's parameters -------------------------------------------------------------------------------------------

    def model_params(self, hf: dict[str, Any]) -> dict[str, ParamSource]:
        hidden, vocab = hf["hidden_size"], hf["vocab_size"]
        params = {
            "embedding.word_embeddings.weight": whole("model.embed_tokens.weight", vocab, "rows"),
            "decoder.final_layernorm.weight": whole("model.norm.weight", hidden),
        }
        if not hf.get("tie_word_embeddings", False):
            params["output_layer.weight"] = whole("lm_head.weight", vocab, "rows")
        return params

    def layer_params(self, hf: dict[str, Any], layer: int) -> dict[str, ParamSource]:
        at, hidden, d = f"model.layers.{layer}", hf["hidden_size"], self.head_dim(hf)
        params = {
            "self_attention.linear_qkv.layer_norm_weight": whole(f"{at}.input_layernorm.weight", hidden),
            "self_attention.linear_qkv.weight": self._qkv(hf, f"{at}.self_attn", "weight"),
            "self_attention.linear_proj.weight": whole(f"{at}.self_attn.o_proj.weight", hidden, "columns"),
        }
        if self.qkv_bias(hf):
            params["self_attention.linear_qkv.bias"] = self._qkv(hf, f"{at}.self_attn", "bias")
        if self.qk_norm:
            params["self_attention.q_layernorm.weight"] = whole(f"{at}.self_attn.q_norm.weight", d)
            params["self_attention.k_layernorm.weight"] = whole(f"{at}.self_attn.k_norm.weight", d)
        norm = whole(f"{at}.post_attention_layernorm.weight", hidden)
        if not self.is_moe_layer(hf, layer):
            params["mlp.linear_fc1.layer_norm_weight"] = norm
            return params | _mlp("mlp", f"{at}.mlp", hf["intermediate_size"], hidden)
        params["pre_mlp_layernorm.weight"] = norm
        params["mlp.router.weight"] = whole(f"{at}.mlp.gate.weight", self.num_experts(hf))
        if width := self.shared_expert_width(hf):
            params |= _mlp("mlp.shared_experts", f"{at}.mlp.shared_expert", width, hidden)
            params["mlp.shared_experts.gate_weight"] = whole(f"{at}.mlp.shared_expert_gate.weight", 1)
        return params

    def expert_params(self, hf: dict[str, Any], layer: int, expert: int) -> dict[str, ParamSource]:
        prefix = f"model.layers.{layer}.mlp.experts.{expert}"
        return _mlp("experts", prefix, hf["moe_intermediate_size"], hf["hidden_size"], expert=True)

    def _qkv(self, hf: dict[str, Any], prefix: str, kind: str) -> ParamSource:
        """Megatron interleaves by key-value group: queries of group 0, its key, its value, queries of group 1..."""
        d, groups = self.head_dim(hf), hf["num_key_value_heads"]
        share = hf["num_attention_heads"] // groups * d
        runs: list[Run] = []
        for g in range(groups):
            runs.append(Run(f"{prefix}.q_proj.{kind}", g * share, (g + 1) * share))
            runs.append(Run(f"{prefix}.k_proj.{kind}", g * d, (g + 1) * d))
            runs.append(Run(f"{prefix}.v_proj.{kind}", g * d, (g + 1) * d))
        return ParamSource(parts=(tuple(runs),), split="rows")


def _rope(hf: dict[str, Any]) -> dict[str, Any]:
    # transformers 5 writes rope_parameters, earlier versions rope_scaling beside a plain rope_theta.
    return hf.get("rope_parameters") or hf.get("rope_scaling") or {}


def _mlp(at: str, prefix: str, width: int, hidden: int, *, expert: bool = False) -> dict[str, ParamSource]:
    rows = {"gate": width, "up": width, "down": hidden}
    gate, up, down = (Run(f"{prefix}.{name}_proj.weight", 0, n) for name, n in rows.items())
    return {
        f"{at}.linear_fc1.weight": ParamSource(parts=((gate,), (up,)), split="rows", expert=expert),
        f"{at}.linear_fc2.weight": ParamSource(parts=((down,),), split="columns", expert=expert),
    }
