"""Pieces tile every tensor, and checkpoint files are read and written exactly or refused by name."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megarubric.errors import BadInput
from megarubric.megatron.families import family_of, param_source
from megarubric.megatron.hf_files import open_checkpoint, plan_shards
from megarubric.megatron.pieces import cut_parameter

HF: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "mlp_only_layers": [1],
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
MOE_LAYER = [
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "input_layernorm.weight",
    "pre_mlp_layernorm.weight",
]


def all_sources(hf: dict[str, Any]) -> list[Any]:
    """The source of every parameter of the whole model, whatever rank it would live on."""
    family = family_of(hf, "config.json")
    keys: list[Any] = [
        (None, name, None)
        for name in ("embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight")
    ]
    for layer in range(hf["num_hidden_layers"]):
        keys += [(layer, name, None) for name in MOE_LAYER]
        if layer in hf["mlp_only_layers"]:
            keys += [(layer, f"mlp.linear_fc{i}.weight", None) for i in (1, 2)]
        else:
            keys += [(layer, "mlp.router.weight", None)]
            keys += [(layer, f"experts.linear_fc{i}.weight", e) for i in (1, 2) for e in range(hf["num_experts"])]
    return [param_source(family, hf, *key) for key in keys]


@given(
    tp=st.sampled_from([1, 2, 4, 8]),
    etp=st.sampled_from([1, 2, 4]),
    groups=st.sampled_from([1, 2, 4, 8]),
    vocab=st.integers(8, 70),
)
@settings(max_examples=40, deadline=None)
def test_pieces_of_all_ranks_tile_every_tensor(tp: int, etp: int, groups: int, vocab: int) -> None:
    """Also where key-value heads are fewer than ranks (a head is cut), and where the vocabulary does not divide."""
    hf = HF | {"num_key_value_heads": groups, "vocab_size": vocab}
    manifest = family_of(hf, "config.json").manifest(hf)
    owners = {name: np.zeros(shape, np.int8) for name, shape in manifest.items()}
    for source in all_sources(hf):
        size = etp if source.expert else tp
        whole = sum(run.stop - run.start for part in source.parts for run in part)
        columns = manifest[source.parts[0][0].name][1:]
        for rank in range(size):
            rows = sum(-(-sum(r.stop - r.start for r in part) // size) for part in source.parts)
            shape = (
                rows if source.split == "rows" else whole,
                *(n // size if source.split == "columns" else n for n in columns),
            )
            seen = torch.zeros(shape, dtype=torch.int8)
            for piece in cut_parameter(source, seen, manifest, rank, size, owned=True):
                assert piece.local.shape == piece.shape
                piece.local.add_(1)
                if piece.owned:
                    owners[piece.hf_name][piece.hf_index] += 1
            padding = rank * rows + rows - whole if source.split == "rows" and len(source.parts) == 1 else 0
            filled = shape[0] - min(max(padding, 0), rows)
            assert (seen[:filled] == 1).all() and (seen[filled:] == 0).all()
    for name, count in owners.items():
        assert (count == 1).all(), name


def test_parameter_that_does_not_fit_its_source_is_an_error() -> None:
    family = family_of(HF, "config.json")
    source = param_source(family, HF, 0, "self_attention.linear_qkv.weight", None)
    with pytest.raises(ValueError, match="q_proj"):
        cut_parameter(source, torch.zeros(90, 32), family.manifest(HF), 0, 1, owned=True)


# ------------------------------------------------------------------------------------------------------------- files


def write_checkpoint(directory: Path, hf: dict[str, Any] = HF) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(shape, generator=generator)
        for name, shape in family_of(hf, "config.json").manifest(hf).items()
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf))
    save_file(tensors, directory / "model.safetensors")
    return tensors


def test_open_checkpoint_finds_every_tensor(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path)
    hf, places = open_checkpoint(tmp_path)
    assert hf == HF and places.keys() == tensors.keys()
    data = (tmp_path / "model.safetensors").read_bytes()
    for name, place in places.items():
        found = np.frombuffer(data, np.float32, tensors[name].numel(), place.offset).reshape(place.shape)
        assert (found == tensors[name].numpy()).all()


def drop(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in tensors.items() if k != "model.layers.0.mlp.experts.2.up_proj.weight"}


def misshape(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"model.norm.weight": torch.ones(33)}


def add(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"model.layers.2.input_layernorm.weight": torch.ones(32)}


def quantize(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}


@pytest.mark.parametrize(
    "change,item,reason",
    [
        (drop, "model.layers.0.mlp.experts.2.up_proj.weight", "missing"),
        (misshape, "model.norm.weight", "has shape [33], config.json asks for [32]"),
        (add, "model.layers.2.input_layernorm.weight", "unexpected"),
        (quantize, "model.norm.weight", "F8_E4M3"),
    ],
)
def test_checkpoint_that_does_not_fit_its_config(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], item: str, reason: str, tmp_path: Path
) -> None:
    save_file(change(write_checkpoint(tmp_path)), tmp_path / "model.safetensors")
    with pytest.raises(BadInput) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.item == item and reason in caught.value.reason
    assert str(tmp_path) in caught.value.where and "\n" not in str(caught.value)


def test_tied_checkpoint_may_repeat_the_head(tmp_path: Path) -> None:
    hf = HF | {"tie_word_embeddings": True}
    tensors = write_checkpoint(tmp_path, hf)
    assert "lm_head.weight" not in tensors
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    open_checkpoint(tmp_path)


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()

    def refused(content: bytes | None, reason: str) -> None:
        if content is None:
            weights.unlink()
        else:
            weights.write_bytes(content)
        with pytest.raises(BadInput, match=reason) as caught:
            open_checkpoint(tmp_path)
        assert str(weights) in str(caught.value)

    refused(data[:-4], "cut short")
    refused(data[:100], "cut short")
    refused(b"", "not a safetensors file")
    refused(b"\x80\x04K\x01." * 10, "cut short|not a safetensors file")
    refused(struct.pack("<Q", 4) + b"[12]" + data, "not a safetensors file")
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    refused(struct.pack("<Q", len(header)) + header + b"\0" * 4, "does not fit its shape")
    refused(None, "No such file")


def test_index_is_checked(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*tensors, "ghost"], "model.safetensors")}))
    with pytest.raises(BadInput, match=r"ghost: is not in model\.safetensors"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(BadInput, match="outside the directory"):
        open_checkpoint(tmp_path)
    index.write_text("[]")
    with pytest.raises(BadInput, match="weight_map: cannot be read"):
        open_checkpoint(tmp_path)


def test_plan_shards_fills_files_in_order_and_aligns_the_data() -> None:
    manifest = family_of(HF, "config.json").manifest(HF)
    plan = plan_shards(manifest, dict.fromkeys(manifest, "BF16"), Path("out"), max_shard_bytes=8_000)
    assert list(plan) == list(manifest)
    files = [info.path.name for info in plan.values()]
    assert files == sorted(files) and files[0].startswith("model-00001-of-") and len(set(files)) > 3
    for file in set(files):
        inside = [(info.offset, 2 * int(np.prod(info.shape))) for info in plan.values() if info.path.name == file]
        assert inside[0][0] % 8 == 0
        assert all(a + n == b for (a, n), (b, _) in itertools.pairwise(inside))  # no holes: the format forbids them
        assert sum(n for _, n in inside) <= 8_000
    whole = plan_shards(manifest, dict.fromkeys(manifest, "F32"), Path("out"), 1 << 30)
    assert {info.path.name for info in whole.values()} == {"model.safetensors"}


# ------------------------------------------------------------------------------------------------------------- ranks


def draw_and_export(layout: dict[str, int], dtype: str, out: str) -> list[str]:
    """On a rank: draw weights, export them, load them into another model, export that."""
    from megarubric.megatron.model import build_model
    from megarubric.megatron.parallel import ParallelLayout, initialize, shutdown
    from megarubric.megatron.weights import export_hf, init_weights, load_hf

    degrees = ParallelLayout(**layout)
    initialize(degrees, timeout_s=200)
    models = build_model(HF, degrees, dtype=getattr(torch, dtype))
    init_weights(models, HF, degrees, seed=7)
    export_hf(models, f"{out}/first", HF, degrees)
    again = build_model(HF, degrees, dtype=getattr(torch, dtype))
    load_hf(again, f"{out}/first", degrees)
    export_hf(again, f"{out}/second", HF, degrees, carry_from=f"{out}/first")
    export_hf(again, f"{out}/second", HF, degrees)  # replaces what is there
    refused = []
    for target in (f"{out}/first/config.json/below", f"{out}/first"):
        try:
            export_hf(again, target, HF | {"model_type": "other"} if target.endswith("first") else HF, degrees)
        except BadInput as error:
            refused.append(str(error))
    shutdown()
    return refused


@pytest.mark.engine
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drawn_weights_do_not_depend_on_the_layout(dtype: str, ranks: Any, tmp_path: Path) -> None:
    runs = {"one": (1, {}), "two": (2, {"tp": 2, "ep": 2}), "stages": (2, {"pp": 2})}
    for name, (world, layout) in runs.items():
        (tmp_path / name).mkdir()
        refused = ranks(world, draw_and_export, layout=layout, dtype=dtype, out=str(tmp_path / name))
        for answers in refused:  # every rank is told, and nothing half-written stays
            assert "the export failed" in answers[0] and "model_type" in answers[1]
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["first", "second"]
    first = load_file(tmp_path / "one" / "first" / "model.safetensors")
    matrix = first["model.layers.0.self_attn.q_proj.weight"].float()
    assert matrix.std().item() == pytest.approx(0.02, rel=0.1) and abs(matrix.mean().item()) < 0.002
    assert not matrix.equal(first["model.layers.1.self_attn.q_proj.weight"].float())
    assert (first["model.layers.0.self_attn.q_norm.weight"] == 1).all()
    bytes_ = (tmp_path / "one" / "first" / "model.safetensors").read_bytes()
    for name in runs:
        for copy in ("first", "second"):
            assert (tmp_path / name / copy / "model.safetensors").read_bytes() == bytes_
    with safe_open(tmp_path / "two" / "first" / "model.safetensors", "pt") as file:  # read by the format's own library
        assert file.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / "one" / "first" / "config.json").read_text())
    assert config == HF | {"torch_dtype": dtype}
