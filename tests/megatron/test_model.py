"""config.json -> Megatron: what is mapped, what is refused, and a model that behaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megarubric.config.layout import ParallelLayout
from megarubric.errors import BadInput
from megarubric.megatron.families import family_of, read_config

# Qwen3-30B-A3B's config.json, as far as the architecture goes.
QWEN3_30B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
TINY = QWEN3_30B | {
    "head_dim": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "vocab_size": 37,
}


def test_qwen3_30b_manifest_is_the_published_model() -> None:
    manifest = family_of(QWEN3_30B, "config.json").manifest(QWEN3_30B)
    assert len(manifest) == 18_867  # tensors of the released checkpoint
    elements = 0
    for shape in manifest.values():
        size = 1
        for n in shape:
            size *= n
        elements += size
    assert elements == 30_532_122_624  # parameters of the released checkpoint
    names = list(manifest)
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers)  # all of a layer before the next: vLLM's layerwise reload relies on it


def test_qwen3_30b_transformer_fields() -> None:
    fields = family_of(QWEN3_30B, "config.json").transformer_fields(QWEN3_30B)
    assert fields["kv_channels"] == 128 and fields["num_query_groups"] == 4
    assert fields["moe_router_topk"] == 8 and fields["moe_router_pre_softmax"] is False
    assert fields["moe_ffn_hidden_size"] == 768 and fields["moe_layer_freq"] == [1] * 48
    assert fields["qk_layernorm"] and fields["layernorm_epsilon"] == 1e-6


def test_dense_layers_rope_and_names_of_either_transformers_version() -> None:
    hf = TINY | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    family = family_of(hf, "config.json")
    assert family.transformer_fields(hf)["moe_layer_freq"] == [0, 1, 0, 0]
    assert "model.layers.3.mlp.up_proj.weight" in family.manifest(hf)
    newer = {k: v for k, v in TINY.items() if k not in ("rope_theta", "rope_scaling", "num_experts")}
    newer |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}, "num_local_experts": 4}
    assert family.rope_theta(TINY) == 1e6 and family.rope_theta(newer) == 5e6
    assert family_of(newer, "config.json").manifest(newer) == family.manifest(TINY)


@pytest.mark.parametrize(
    "change,item,reason",
    [
        ({"model_type": "mamba"}, "model_type", "not supported; known: qwen3_moe"),
        ({"num_key_value_heads": None}, "num_key_value_heads", "missing"),
        ({"num_experts": 0}, "num_experts", "missing"),
        ({"attention_bias": True}, "attention_bias", "True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act", "'gelu' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window", "not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters", "'yarn' is not supported"),
        ({"num_key_value_heads": 3}, "num_key_value_heads", "must divide"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok", "more than the 4 experts"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob", "router cannot learn"),
        (
            {"mlp_only_layers": [0], "intermediate_size": None},
            "intermediate_size",
            "missing, and some layers are dense",
        ),
    ],
)
def test_configs_that_cannot_be_built_exactly_are_refused(change: dict[str, Any], item: str, reason: str) -> None:
    with pytest.raises(BadInput) as caught:
        family_of(TINY | change, "dir/config.json")
    assert (caught.value.where, caught.value.item) == ("dir/config.json", item)
    assert reason in caught.value.reason


def test_read_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert read_config(tmp_path) == (TINY, str(tmp_path / "config.json"))
    assert read_config(tmp_path / "config.json")[0] == read_config(TINY)[0] == TINY
    with pytest.raises(BadInput, match="No such file"):
        read_config(tmp_path / "absent")
    for text, reason in (("{", "is not JSON"), ("[]", "is not a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(BadInput, match=reason):
            read_config(tmp_path)


@pytest.mark.parametrize(
    "layout,world,item,reason",
    [
        ({"tp": 0}, 1, "tp", "at least 1"),
        ({"tp": 2}, 3, "tp * cp * pp", "3 ranks cannot be divided by tp 2 * cp 1 * pp 1 = 2"),
        ({"ep": 4}, 6, "etp * ep * pp", "6 ranks cannot be divided by etp 1 * ep 4 * pp 1 = 4"),
        ({"pp": 2, "ep": 4}, 4, "etp * ep * pp", "= 8"),
        ({"tp": 3}, 3, "tp", "32 attention heads cannot be divided by tp 3"),
        ({"tp": 16}, 24, "tp * cp * pp", "24 ranks"),
        ({"tp": 2}, 2, "tp", "3 key-value heads neither divide tp 2"),
        ({"pp": 5}, 5, "pp", "48 layers cannot be divided by pp 5"),
        ({"pp": 4, "vpp": 5}, 4, "pp", "48 layers cannot be divided by pp 4 * vpp 5"),
        ({"pp": 2, "vpp": 2}, 2, "vpp", "pp of at least 3"),
        ({"pp": 4, "vpp": 1}, 4, "vpp", "at least 2"),
        ({"ep": 3}, 3, "ep", "128 experts cannot be divided by ep 3"),
        ({"etp": 5}, 5, "etp", "moe_intermediate_size 768 cannot be divided by etp 5"),
    ],
)
def test_layouts_that_cannot_run_are_refused(layout: dict[str, int], world: int, item: str, reason: str) -> None:
    hf = QWEN3_30B | ({"num_key_value_heads": 3} if "key-value" in reason else {})
    with pytest.raises(BadInput) as caught:
        ParallelLayout(**layout).check(world, hf)
    assert (caught.value.where, caught.value.item) == ("parallel layout", item)
    assert reason in caught.value.reason and "\n" not in str(caught.value)


def test_layout_arithmetic() -> None:
    layout = ParallelLayout(tp=4, pp=2, ep=8)
    assert layout.sequence_parallel and layout.smallest_world == 16
    assert (layout.dp(64), layout.edp(64)) == (8, 4)
    layout.check(64, QWEN3_30B)
    assert not ParallelLayout(ep=8).sequence_parallel


# ------------------------------------------------------------------------------------------------------------- ranks


def behave(seed: int) -> dict[str, Any]:
    """On two ranks, tp 2: properties of the built model beside its equality with transformers (test_layouts.py)."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    from megarubric.megatron.model import PADDING_LOGIT, build_model, padded_vocab_size
    from megarubric.megatron.parallel import initialize, shutdown
    from megarubric.megatron.weights import init_weights

    layout = ParallelLayout(tp=2)
    initialize(layout, timeout_s=200)
    answer: dict[str, Any] = {"refused": []}
    ids = torch.randint(TINY["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(seed))
    packed_ids, ends = ids.reshape(1, 24), torch.tensor([0, 12, 24], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=12, max_seqlen_kv=12)
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        (model,) = build_model(TINY, layout, dtype=dtype)
        init_weights([model], TINY, layout, seed=seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(4)
            whole = gather_from_tensor_model_parallel_region(
                model(packed_ids, packed_ids, None, packed_seq_params=packed)
            )
            again = gather_from_tensor_model_parallel_region(
                model(packed_ids, packed_ids, None, packed_seq_params=packed)
            )
            batch = gather_from_tensor_model_parallel_region(model(ids, ids, None))
        answer[f"{dtype}"] = {
            "shape": list(whole.shape),
            "dtype": str(whole.dtype),
            "same_again": whole.equal(again),
            "padding": bool((whole[..., TINY["vocab_size"] :].float() <= PADDING_LOGIT * 0.99).all()),
            "batch_off": float((whole.reshape(batch.shape) - batch)[..., : TINY["vocab_size"]].abs().max()),
            "parameters": sorted({str(p.dtype) for p in model.parameters()}),
        }
        logits[dtype] = whole[..., : TINY["vocab_size"]].float().log_softmax(-1)
    answer["padded"] = padded_vocab_size(TINY, layout)
    answer["precision_off"] = float((logits[torch.float32] - logits[torch.bfloat16]).abs().mean())
    try:
        build_model(TINY | {"num_attention_heads": 3, "num_key_value_heads": 3}, layout)
    except BadInput as error:
        answer["refused"] = str(error)
    shutdown()
    return answer


@pytest.mark.engine
def test_model_on_two_ranks(ranks: Any) -> None:
    for answer in ranks(2, behave, seed=3):
        assert answer["padded"] == 38  # 37 tokens, a multiple of tp 2
        for dtype in ("float32", "bfloat16"):
            run = answer[f"torch.{dtype}"]
            assert run["shape"] == [1, 24, 38] and run["dtype"] == f"torch.{dtype}"
            assert run["parameters"] == [f"torch.{dtype}"]
            assert run["same_again"], "a forward pass is not deterministic"
            assert run["padding"], "a column that pads the vocabulary has probability"
        # A batch of equal sequences and the same sequences packed are one computation.
        assert answer["torch.float32"]["batch_off"] < 1e-5
        assert answer["precision_off"] < 0.02
        assert "3 attention heads cannot be divided by tp 2" in answer["refused"]


@pytest.mark.parametrize("recipe", ["delayed", "current", "blockwise", "mxfp8"])
def test_megatron_takes_the_fields_of_every_fp8_recipe(recipe, monkeypatch):
    """Only its question whether Transformer Engine is there is answered for it: this machine has none."""
    import torch

    from megarubric.megatron.model import fp8_fields, transformer_config  # installs the CPU bridge before Megatron

    from megatron.core.transformer import transformer_config as megatron  # isort: skip

    monkeypatch.setattr(megatron, "is_te_min_version", lambda *_: True)
    hf = Path(__file__).parents[2] / "configs/architectures/qwen3_30b_a3b.json"
    fields = fp8_fields(recipe, 0 if recipe == "delayed" else 2)
    config = transformer_config(hf, ParallelLayout(), dtype=torch.bfloat16, **fields)
    assert config.fp8 and config.fp8_recipe == {"current": "tensorwise"}.get(recipe, recipe)
    assert config.moe_router_padding_for_quantization and config.moe_router_dtype == "fp32" and not config.fp8_param
