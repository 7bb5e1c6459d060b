"""The memory arithmetic of --dry-run (launch/memory.py): against Megatron's modules on the meta device at full size,
and against what a small trainer really allocates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megarubric.config.schema import Parallel, Train
from megarubric.launch.memory import LOGPROB_CHUNKS, MASTER, model_size, stage_memory

ARCHITECTURES = Path(__file__).parents[2] / "configs/architectures"


def architecture(name: str) -> dict[str, Any]:
    return json.loads((ARCHITECTURES / f"{name}.json").read_text())


def test_published_sizes() -> None:
    """30.5 B parameters of which 3.3 B are active, 235 B and 22 B: the models' names, and their cards."""
    small, large = model_size(architecture("qwen3_30b_a3b")), model_size(architecture("qwen3_235b_a22b"))
    assert small.total == 30_532_122_624 and int(small.active / 1e8) == 33
    assert large.total == 235_093_634_560 and int(large.active / 1e9) == 22


def on_meta(name: str, layout: dict[str, int], size: int, members: list[int]) -> list[int]:
    """Parameters of Megatron's own modules on some ranks of a world that is not there."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megarubric.megatron import cpu

    cpu.ensure()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megarubric.config.layout import ParallelLayout
    from megarubric.megatron.model import build_model

    split = ParallelLayout(**layout)
    found = []
    for rank in members:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=split.tp,
            pipeline_model_parallel_size=split.pp,
            virtual_pipeline_model_parallel_size=split.vpp,
            context_parallel_size=split.cp,
            expert_model_parallel_size=split.ep,
            expert_tensor_parallel_size=split.etp,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(1)
        with torch.device("meta"):
            models = build_model(architecture(name), split, dtype=torch.bfloat16)
        found.append(sum(p.numel() for model in models for p in model.parameters()))
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return found


@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "world", "layout"),
    [
        ("qwen3_30b_a3b", 8, {"ep": 8}),
        ("qwen3_30b_a3b", 32, {"tp": 2, "pp": 2, "ep": 8}),
        ("qwen3_30b_a3b", 64, {"tp": 8, "ep": 16, "etp": 2}),
        ("qwen3_235b_a22b", 64, {"tp": 4, "pp": 2, "ep": 16}),
    ],
    ids=["30B on 8", "30B on 32", "30B, tp above the key-value heads", "235B on 64"],
)
def test_parameters_equal_megatrons_modules_on_meta(ranks, name, world, layout) -> None:
    per_stage = world // layout.get("pp", 1)
    stages = list(range(0, world, per_stage))
    found = ranks(1, on_meta, name=name, layout=layout, size=world, members=stages)[0]
    counted = stage_memory(architecture(name), Parallel(ranks=world, **layout), Train(), "bfloat16", "local")
    assert [s.n_parameters for s in counted] == found


SHAPES = [
    {},
    {"hidden_size": 192, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 16},
    {"num_experts": 32, "num_experts_per_tok": 6, "moe_intermediate_size": 96, "num_hidden_layers": 3},
    {"mlp_only_layers": [0], "tie_word_embeddings": True},
]


def small(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "vocab_size": 600,
        "hidden_size": 128,
        "intermediate_size": 224,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "rope_theta": 1e4,
    } | changes


def allocated(shapes: list[dict[str, Any]], dtype: str, tokens: int, sequences: int, cp: int) -> list[dict[str, int]]:
    """What one real rank holds: bytes of parameters, gradient buffers, optimizer state, and kept by autograd."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    from megarubric.config.layout import ParallelLayout
    from megarubric.megatron import parallel, weights
    from megarubric.megatron.model import build_model
    from megarubric.megatron.optimizer import AdamSettings, TrainedModel

    layout, kind = ParallelLayout(cp=cp), getattr(torch, dtype)
    parallel.initialize(layout, seed=1)
    out = []
    for hf in shapes:
        models = build_model(hf, layout, dtype=kind)
        weights.init_weights(models, hf, layout, 0)
        trained = TrainedModel(models, kind, AdamSettings())
        own = {p.untyped_storage().data_ptr() for p in trained.parameters()}
        kept: dict[int, Any] = {}

        def keep(t: Any, own: set[int] = own, kept: dict[int, Any] = kept) -> Any:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage
            return t

        longest = tokens * cp // sequences
        cu = torch.arange(0, tokens * cp + 1, longest, dtype=torch.int32)
        params = PackedSeqParams("thd", cu, cu, max_seqlen_q=longest, max_seqlen_kv=longest)
        ids = torch.randint(hf["vocab_size"], (1, tokens))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            logits = trained.chunks[0](ids, torch.arange(tokens)[None], attention_mask=None, packed_seq_params=params)
        out.append(
            {
                "parameters": sum(p.nbytes for p in trained.parameters()),
                "gradients": sum(b.grad_data.nbytes for c in trained.chunks for b in all_buffers(c)),
                "optimizer": sum(distinct(part.optimizer) for part in trained._parts()),
                "activations": sum(s.nbytes() for s in kept.values()),
                "logits": logits.nbytes,
            }
        )
    return out


def all_buffers(chunk: Any) -> list[Any]:
    return [*chunk.buffers, *chunk.expert_parallel_buffers]


def distinct(optimizer: Any) -> int:
    """Bytes of Adam's moments, and of float32 masters, which are the tensors that the optimizer steps."""
    import torch

    n = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            n += sum(v.nbytes for v in optimizer.state[p].values() if isinstance(v, torch.Tensor) and v.numel() > 1)
            n += 0 if getattr(p, "_is_view_of_model", False) else p.nbytes
    return n


@pytest.mark.engine
@pytest.mark.parametrize(
    ("dtype", "cp", "sequences"),
    [("float32", 1, 2), ("bfloat16", 1, 2), ("float32", 2, 1), ("bfloat16", 4, 1)],
    ids=["float32", "bfloat16", "float32, CP2", "bfloat16, CP4"],
)
def test_a_real_rank_allocates_what_is_counted(ranks, dtype, cp, sequences) -> None:
    """Under context parallelism with one sequence, whose mask is the largest there can be."""
    shapes, tokens = [small(**s) for s in SHAPES], 256
    job = {"shapes": shapes, "dtype": dtype, "tokens": tokens, "sequences": sequences, "cp": cp}
    for hf, real in zip(shapes, ranks(cp, allocated, **job)[0], strict=True):
        layout = Parallel(ranks=cp, cp=cp)
        (counted,) = stage_memory(hf, layout, Train(micro_batch_tokens=tokens), dtype, "local")
        assert counted.parameters == real["parameters"]
        assert counted.gradients == pytest.approx(real["gradients"], rel=0.01)
        masters = real["optimizer"] - (real["parameters"] / cp if dtype == "float32" else 0)
        assert counted.optimizer == pytest.approx(masters, rel=0.01), (hf, MASTER)
        assert counted.activations == pytest.approx(real["activations"], rel=0.05), hf
        assert counted.logits - LOGPROB_CHUNKS == real["logits"]


def test_offload_recompute_and_pipelines_move_bytes() -> None:
    hf, p = architecture("qwen3_30b_a3b"), Parallel(ranks=8, ep=8)

    def one(**train: Any) -> Any:
        return stage_memory(hf, p, Train(**train), "bfloat16", "transformer_engine")[0]

    plain, offloaded, recomputed = one(), one(optimizer_offload=True), one(recompute=True)
    assert offloaded.optimizer == plain.host == 0
    assert offloaded.host == pytest.approx(plain.optimizer * 16 / 12) and plain.optimizer > 40 << 30
    assert recomputed.activations < plain.activations / 8
    stages = stage_memory(hf, Parallel(ranks=32, pp=4, ep=8), Train(), "bfloat16", "transformer_engine")
    assert [s.layers for s in stages] == [12] * 4 and stages[0].activations > 3.9 * stages[3].activations
    assert sum(s.n_parameters for s in stages) < model_size(hf).total
    assert all(s.logits == 0 for s in stages[:3]) and stages[3].logits > 0


def test_fp8_weights_and_copies() -> None:
    """On Hopper a matrix and its transpose are two bytes a weight, beside a bf16 weight or in its place."""
    from megarubric.megatron.families import family_of
    from megarubric.megatron.fp8_export import is_quantised

    hf = architecture("qwen3_30b_a3b")
    inner = [f"model.layers.{layer}." for layer in range(1, 47)]  # first and last keep bf16
    n = 0
    for name, shape in family_of(hf, "config.json").manifest(hf).items():
        if is_quantised(name) and any(name.startswith(layer) for layer in inner):
            n += shape[0] * shape[1] // (8 if ".experts." in name else 1)

    def one(card: str, **train: Any) -> Any:
        p = Parallel(ranks=8, ep=8, card=card)  # type: ignore[arg-type]
        return stage_memory(hf, p, Train(**train), "bfloat16", "transformer_engine")[0]

    plain = one("h100")
    compute = one("h100", fp8="current")
    kept = one("h100", fp8="current", fp8_parameters=True)
    assert (compute.parameters, compute.fp8_copies) == (plain.parameters, 2 * n)
    assert compute.total - plain.total == 2 * n and plain.fp8_copies == 0
    assert (kept.parameters, kept.fp8_copies) == (plain.parameters, 0)  # what is saved are the copies
    assert one("b200", fp8="current", fp8_parameters=True).parameters == plain.parameters - n
    assert one("b200", fp8="mxfp8", fp8_parameters=True).parameters == plain.parameters + n // 16
    assert one("h100", fp8="blockwise").fp8_copies == 2 * n + 2 * 4 * n // 128**2
    assert one("h100", fp8="current", fp8_bf16_layers=0).fp8_copies > compute.fp8_copies


def test_the_chunks_are_those_of_the_op() -> None:
    from megarubric.megatron.logprob import CHUNK_ELEMENTS

    assert LOGPROB_CHUNKS == 3 * 4 * CHUNK_ELEMENTS == 3 * 4 * (1 << 22)
