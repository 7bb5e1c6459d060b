"""Every layout is the same model: logits, loss, each gradient and each exported byte, against transformers.

The reference is transformers' Qwen3MoeForCausalLM in fp32, its autograd, and the checkpoint it saved. Small models
cover the branches: `moe` (untied head, vocabulary that no tp divides, normalised gates) and `mixed` (tied embeddings, a
dense layer, plain gates, fewer key-value heads than tp 4 has ranks), `deep` (layers enough for interleaved stages).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

CONFIGS: dict[str, dict[str, Any]] = {
    "moe": {"vocab_size": 131, "num_key_value_heads": 4, "norm_topk_prob": True, "tie_word_embeddings": False},
    "mixed": {
        "vocab_size": 128,
        "num_key_value_heads": 2,
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
        "mlp_only_layers": [1],
    },
    "deep": {"vocab_size": 128, "num_key_value_heads": 4, "num_hidden_layers": 8, "hidden_size": 64},
}
COMMON = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "max_position_embeddings": 512,
}
# Four packed micro-batches of different sizes; every total is a multiple of 4, the largest tp below.
LENGTHS = [[13, 1, 20, 6], [32], [5, 7, 9, 2, 1], [17, 11]]


def micro_batches(vocab_size: int) -> list[dict[str, Any]]:
    """Token ids, and a weight for the log-probability of each next token (0 where a sequence ends)."""
    import torch

    generator = torch.Generator().manual_seed(5)
    batches = []
    for lengths in LENGTHS:
        ids = torch.randint(vocab_size, (sum(lengths),), generator=generator)
        weights = torch.randn(sum(lengths), generator=generator)
        ends = torch.tensor(lengths).cumsum(0)
        weights[ends - 1] = 0
        batches.append({"lengths": lengths, "ids": ids, "targets": ids.roll(-1), "weights": weights, "ends": ends})
    return batches


def make_reference(directory: str) -> dict[str, float]:
    """One process: save each model, its logits, and the gradients of the weighted loss. Returns the losses."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    losses = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(11)
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(COMMON | config))).float()
        losses[name] = save_reference(model, Path(directory) / name)
    return losses


def save_reference(model: Any, place: Path) -> float:
    """Save a transformers model moved far from its initialisation, its logits and gradients; the weighted loss."""
    import torch
    from safetensors.torch import save_file

    with torch.no_grad():
        for parameter in model.parameters():  # far from initialisation, so that a swapped row shows
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
    model.save_pretrained(place)
    (place / "tokenizer.json").write_text('{"stands": "for a tokenizer"}')
    outputs, total = {}, torch.zeros(())
    for i, batch in enumerate(micro_batches(model.config.vocab_size)):
        logits = torch.cat([model(ids[None]).logits[0] for ids in batch["ids"].split(batch["lengths"])])
        token_losses = torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="none")
        total = total + (token_losses * batch["weights"]).sum()
        outputs[f"logits.{i}"] = logits.detach()
    total.backward()
    for name, parameter in model.named_parameters():
        outputs |= {f"grad.{key}": value for key, value in checkpoint_names(name, parameter.grad).items()}
    save_file({key: value.contiguous() for key, value in outputs.items()}, place / "reference.safetensors.ref")
    return float(total)


def checkpoint_names(name: str, gradient: Any) -> dict[str, Any]:
    """transformers holds a layer's experts stacked; checkpoints name them one by one."""
    stem, _, last = name.rpartition(".experts.")
    if not stem:
        return {name: gradient}
    named = {}
    for expert, matrix in enumerate(gradient):
        at = f"{stem}.experts.{expert}"
        if last == "gate_up_proj":
            gate, up = matrix.chunk(2)
            named |= {f"{at}.gate_proj.weight": gate, f"{at}.up_proj.weight": up}
        else:
            named[f"{at}.down_proj.weight"] = matrix
    return named


def train_once(
    directory: str, layout: dict[str, Any], options: dict[str, Any], names: list[str], kinds: list[str], out: str
) -> dict[str, Any]:
    """All checks of one layout, for each model, on this rank; JSON numbers for the test to compare."""
    from megarubric.megatron.parallel import ParallelLayout, initialize, shutdown

    degrees = ParallelLayout(**layout)
    initialize(degrees, timeout_s=200)
    answer = {name: check_model(Path(directory) / name, degrees, options, kinds, Path(out) / name) for name in names}
    shutdown()
    return answer


def check_model(source: Path, layout: Any, options: dict[str, Any], kinds: list[str], out: Path) -> dict[str, Any]:
    import torch
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from safetensors.torch import load_file

    from megarubric.megatron.model import build_model, wrap_for_training
    from megarubric.megatron.pieces import model_pieces
    from megarubric.megatron.weights import export_hf, load_hf

    reference = load_file(source / "reference.safetensors.ref")
    answer: dict[str, Any] = {}
    for kind in kinds:
        distributed_optimizer = kind == "distributed"
        models = build_model(source, layout, **options)
        hf = load_hf(models, source, layout)
        if not distributed_optimizer:
            export_hf(models, out, hf, layout, carry_from=source, max_shard_bytes=1_000_000)
        chunks = wrap_for_training(models, distributed_optimizer=distributed_optimizer)
        run = run_schedule(chunks, hf["vocab_size"], layout, reference)
        optimizer = get_megatron_optimizer(
            OptimizerConfig(optimizer="adam", lr=0.0, use_distributed_optimizer=distributed_optimizer), chunks
        )
        optimizer.prepare_grads()
        run["grad_norm"] = float(optimizer.get_grad_norm())
        if not distributed_optimizer:
            # Here every rank holds the complete gradient of what it holds, so each piece has its reference.
            worst = 0.0
            for piece in model_pieces(chunks, hf, layout):
                theirs = reference[f"grad.{piece.hf_name}"]
                ours = piece.param.main_grad[piece.local_index]
                worst = max(worst, float((ours - theirs[piece.hf_index]).abs().max() / theirs.abs().max()))
            run["worst_gradient"] = worst
        answer[kind] = run
    owned = torch.tensor([sum(torch.Size(p.shape).numel() for p in model_pieces(chunks, hf, layout) if p.owned)])
    torch.distributed.all_reduce(owned)
    answer["owned_elements"] = int(owned)
    return answer


def run_schedule(chunks: list[Any], vocab_size: int, layout: Any, reference: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward of all micro-batches by Megatron's schedule: the loss, and how far the logits are off."""
    import torch
    from megatron.core import parallel_state as mpu
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    dp, dp_rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    cp, cp_rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
    mine = [(i, batch) for i, batch in enumerate(micro_batches(vocab_size)) if i % dp == dp_rank]
    total, logits_off = torch.zeros(()), 0.0

    def step(iterator: Any, model: Any) -> Any:
        i, batch = next(iterator)
        ends = torch.cat([torch.zeros(1, dtype=torch.int32), batch["ends"].int()])
        held, padded = share(batch["lengths"], cp, cp_rank)
        longest = int(padded.diff().max())
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            cu_seqlens_q_padded=padded,
            cu_seqlens_kv_padded=padded,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        real, at = held >= 0, held.clamp(min=0)
        ids = (batch["ids"][at] * real)[None]
        output = model(ids, torch.zeros_like(ids), None, packed_seq_params=packed)

        def loss(logits: Any) -> Any:
            nonlocal total, logits_off
            with torch.no_grad():
                whole = gather_from_tensor_model_parallel_region(logits)[0, :, :vocab_size]
                off = (whole - reference[f"logits.{i}"][at])[real]
                logits_off = max(logits_off, float(off.abs().amax())) if len(off) else logits_off
            # [1, T, V/tp] -> [T, 1, V/tp], Megatron's order
            losses = vocab_parallel_cross_entropy(logits.transpose(0, 1).contiguous(), batch["targets"][at, None])
            value = (losses[:, 0] * batch["weights"][at] * real).sum()
            total = total + value.detach()
            return value, torch.ones((), dtype=torch.int), {}

        return output, loss

    for chunk in chunks:
        chunk.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(mine) for _ in chunks] if len(chunks) > 1 else iter(mine),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(mine),
        seq_length=sum(LENGTHS[0]),
        micro_batch_size=1,
        forward_only=False,
    )
    if not mpu.is_pipeline_last_stage():
        return {"loss": None, "logits_off": None}
    torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
    return {"loss": float(total), "logits_off": logits_off}


def share(lengths: list[int], cp: int, rank: int) -> tuple[Any, Any]:
    """Positions in the batch that a context-parallel rank holds, -1 where it pads, and the ends of the padded
    sequences: each is cut into 2 cp chunks, of which the rank has the one of its number from either end."""
    import torch

    held, ends, start = [], [0], 0
    for n in lengths:
        chunk = -(-n // (2 * cp)) if cp > 1 else n
        size = 2 * cp * chunk if cp > 1 else n
        positions = torch.arange(start, start + size)
        positions[n:] = -1
        chunks = positions.split(chunk)
        held += [chunks[rank], chunks[-1 - rank]] if cp > 1 else chunks
        ends.append(ends[-1] + size)
        start += n
    return torch.cat(held), torch.tensor(ends, dtype=torch.int32)


@pytest.fixture(scope="module")
def reference(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("reference")
    (losses,) = ranks(1, make_reference, directory=str(directory), timeout_s=240)
    return {"directory": directory, "losses": losses}


LAYOUTS = [
    pytest.param(1, {}, {}, id="one-rank"),
    pytest.param(1, {}, {"recompute": "full"}, id="one-rank-recompute"),
    pytest.param(2, {}, {}, id="dp2"),
    pytest.param(2, {"ep": 2}, {}, id="ep2"),
    pytest.param(2, {"tp": 2}, {}, id="tp2"),
    pytest.param(2, {"tp": 2, "ep": 2}, {}, id="tp2-ep2"),
    pytest.param(2, {"tp": 2, "etp": 2}, {}, id="tp2-etp2"),
    pytest.param(2, {"pp": 2}, {}, id="pp2"),
    pytest.param(4, {"ep": 2, "pp": 2}, {}, id="ep2-pp2"),
    pytest.param(4, {"tp": 2, "pp": 2, "ep": 2}, {"recompute": "full"}, id="tp2-pp2-ep2-recompute"),
    pytest.param(4, {"tp": 4, "ep": 2, "etp": 2}, {}, id="tp4-ep2-etp2"),
    pytest.param(4, {"pp": 4, "vpp": 2}, {"recompute": "selective"}, id="pp4-vpp2-recompute"),
    pytest.param(2, {"cp": 2, "ep": 2}, {}, id="cp2-ep2"),
    pytest.param(4, {"cp": 2, "pp": 2}, {"recompute": "selective"}, id="cp2-pp2-recompute"),
    pytest.param(4, {"cp": 2, "tp": 2, "ep": 4}, {}, id="cp2-tp2-ep4"),
]
SHARDED: list[dict[str, Any]] = [{}, {"ep": 2}, {"tp": 2, "pp": 2, "ep": 2}, {"cp": 2, "ep": 2}]


@pytest.mark.parametrize("world,layout,options", LAYOUTS)
def test_layout_is_the_same_model(
    world: int,
    layout: dict[str, Any],
    options: dict[str, Any],
    reference: dict[str, Any],
    ranks: Any,
    tmp_path: Path,
) -> None:
    from safetensors.torch import load_file

    directory = reference["directory"]
    names = ["deep"] if layout.get("vpp") else ["moe", "mixed"]
    # Gradient buffers either whole on each rank or, for Megatron's distributed optimizer, reduced to each rank's shard.
    kinds = ["replicated", "distributed"] if layout in SHARDED else ["replicated"]
    job = {"directory": str(directory), "layout": layout, "options": options, "names": names, "kinds": kinds}
    answers = ranks(world, train_once, timeout_s=240, out=str(tmp_path), **job)
    for name in names:
        source = load_file(directory / name / "model.safetensors")
        truth = load_file(directory / name / "reference.safetensors.ref")
        norm = sum(float((v.double() ** 2).sum()) for k, v in truth.items() if k.startswith("grad.")) ** 0.5
        for kind in kinds:
            runs = [answer[name][kind] for answer in answers]
            losses = [run["loss"] for run in runs if run["loss"] is not None]
            assert losses, "no last pipeline stage"
            assert max(run["logits_off"] for run in runs if run["logits_off"] is not None) < 1e-4
            assert losses == pytest.approx([reference["losses"][name]] * len(losses), rel=1e-5)
            assert [run["grad_norm"] for run in runs] == pytest.approx([norm] * world, rel=1e-5)
        assert max(answer[name]["replicated"]["worst_gradient"] for answer in answers) < 1e-4
        # Ownership is a partition: every element of the checkpoint by one rank, so the sizes must agree ...
        assert answers[0][name]["owned_elements"] == sum(tensor.numel() for tensor in source.values())
        # ... and what the ranks wrote together is what transformers had saved.
        exported: dict[str, Any] = {}
        index = json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        for file in sorted(set(index["weight_map"].values())):
            exported |= load_file(tmp_path / name / file)
        assert exported.keys() == source.keys() == index["weight_map"].keys()
        for key, tensor in source.items():
            assert exported[key].dtype == tensor.dtype and exported[key].equal(tensor), key
        assert (tmp_path / name / "tokenizer.json").read_text() == (directory / name / "tokenizer.json").read_text()
        assert json.loads((tmp_path / name / "config.json").read_text()) == json.loads(
            (directory / name / "config.json").read_text()
        )
