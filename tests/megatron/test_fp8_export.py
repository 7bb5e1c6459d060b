"""The FP8 export: exact blocks, read back by transformers as an independent reader; refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from megarubric.errors import BadInput
from megarubric.megatron.fp8_export import BLOCK, LARGEST, dequantise, export_fp8, is_quantised, quantise, scale_shape


@given(st.integers(1, 300), st.integers(1, 300), st.floats(1e-6, 1e4), st.integers(0, 99))
def test_every_block_is_within_half_a_step(n: int, k: int, size: float, seed: int) -> None:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * size
    small, scale = quantise(weight)
    assert small.dtype == torch.float8_e4m3fn and small.shape == (n, k) and scale.shape == scale_shape((n, k))
    back = dequantise(small, scale)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            largest = weight[part].abs().max()
            assert scale[i, j] == pytest.approx(float(largest) / LARGEST, rel=1e-6)
            # three bits of mantissa: half a step is 1/16 of the value; below 2^-6 steps are constant
            bound = weight[part].abs() / 16 + scale[i, j] * 2**-10
            assert ((back[part] - weight[part]).abs() <= bound * 1.0001).all()


def test_zeros_stay_zeros() -> None:
    small, scale = quantise(torch.zeros(130, 5))
    assert (dequantise(small, scale) == 0).all() and (scale == 1).all()


def test_names() -> None:
    yes = ["self_attn.q_proj", "mlp.experts.12.down_proj", "mlp.gate_proj", "mlp.shared_expert.up_proj"]
    no = ["mlp.gate", "mlp.shared_expert_gate", "self_attn.q_norm", "input_layernorm"]
    assert all(is_quantised(f"model.layers.3.{name}.weight") for name in yes)
    assert not any(is_quantised(f"model.layers.3.{name}.weight") for name in no)
    assert not is_quantised("lm_head.weight") and not is_quantised("model.embed_tokens.weight")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(3)
    config = Qwen3MoeConfig(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("hf") / "model"
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def test_the_export_is_what_transformers_would_write_and_read(source: Path, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    target = tmp_path / "fp8"
    seen: list[tuple[int, int]] = []
    export_fp8(source, target, max_shard_bytes=300_000, progress=lambda *n: seen.append(n))
    assert seen[-1][0] == seen[-1][1] > 20 and not list(tmp_path.glob(".*"))
    shards = sorted(target.glob("*.safetensors"))
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and set(index["weight_map"].values()) == {s.name for s in shards}
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    kept = config["modules_to_not_convert"]
    assert "lm_head" in kept and "model.layers.1.mlp.gate" in kept and len(kept) == 3

    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float"))
    write, read = Fp8Quantize(quantizer), Fp8Dequantize(quantizer)
    compared = 0
    for name, tensor in load_file(source / "model.safetensors").items():
        if not is_quantised(name):
            assert torch.equal(tensors[name], tensor), name
            continue
        compared += 1
        theirs = write._quantize_one(name, tensor)
        scale = tensors[f"{name}_scale_inv"]
        assert torch.allclose(scale, theirs[f"{name}_scale_inv"], rtol=1e-6)
        off = (tensors[name].float() - theirs[name].float()).abs()
        # Their scale is the reciprocal of a reciprocal, so what lies between two values may fall to either.
        assert float((off > 0).float().mean()) < 0.05 and (off <= theirs[name].float().abs() / 8 + 2**-9).all()
        assert torch.equal(read._dequantize_one(tensors[name], scale, torch.float32), dequantise(tensors[name], scale))
    assert compared == 2 * (4 + 3 * 4)


def test_refusals_leave_nothing(source: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(BadInput, match="there: exists already"):
        export_fp8(source, tmp_path / "there")
    export_fp8(source, tmp_path / "once")
    with pytest.raises(BadInput, match="it is quantised already"):
        export_fp8(tmp_path / "once", tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    odd = Path(__file__).parents[2] / "models/tiny-qwen3-moe"
    with pytest.raises(BadInput, match="sides of whole 128s"):
        export_fp8(odd, tmp_path / "odd")
    assert [p.name for p in tmp_path.iterdir() if "odd" in p.name] == []
