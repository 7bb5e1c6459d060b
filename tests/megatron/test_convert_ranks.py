"""What convert writes is what the trainer and Megatron load, on any layout; what the trainer saves, convert reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from megarubric.megatron.convert import Options, convert, verify
from megarubric.megatron.convert.verb import Lines

pytestmark = pytest.mark.engine

# Vocabulary that tp does not divide, a dense layer, two key-value heads.
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def make_trainer(model_dir: str, config: dict[str, Any], init: str = "load") -> Any:
    import os

    from megarubric.megatron.messages import WorkerConfig
    from megarubric.megatron.trainer import Trainer

    prefix = f"mrconv-{os.getppid()}"
    return Trainer(
        WorkerConfig(model_dir=model_dir, init=init, timeout_s=60, micro_batch_tokens=64, shm_prefix=prefix, **config)
    )


def train_step(trainer: Any) -> dict[str, Any]:
    import msgspec

    from megarubric.megatron.messages import TrainBatch
    from megarubric.recipe.algorithms import algorithm

    rng = np.random.default_rng(3)
    lengths = rng.integers(4, 30, size=8).astype(np.int32)
    mask = np.ones(int(lengths.sum()), dtype=np.float32)
    mask[np.cumsum(lengths) - lengths] = 0
    batch = TrainBatch(
        tokens=rng.integers(0, CONFIG["vocab_size"], size=len(mask)).astype(np.int32),
        lengths=lengths,
        loss_mask=mask,
        advantages=np.repeat(rng.normal(size=8), lengths).astype(np.float32),
        weights=algorithm("grpo").token_weights(mask, lengths, 32),
    )
    return msgspec.to_builtins(trainer.train(batch, algorithm("grpo").settings(), 1e-3)[0])


SHARED = CONFIG | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 48, "mlp_only_layers": []}


def make_checkpoints(root: str, hf: dict[str, Any], config: dict[str, Any]) -> None:
    """On this layout: a Hugging Face export, then a training checkpoint and the export of the same weights."""
    Path(root).mkdir(exist_ok=True)
    (Path(root) / "fresh").mkdir(exist_ok=True)
    (Path(root) / "fresh" / "config.json").write_text(json.dumps(hf))
    trainer = make_trainer(f"{root}/fresh", config, init="random")
    trainer.export_hf(f"{root}/hf")
    train_step(trainer)
    trainer.save(f"{root}/step_1", "{}")
    trainer.export_hf(f"{root}/trained")
    trainer.barrier()
    trainer.close()


def start_from(directory: str, config: dict[str, Any], read_by_megatron: bool = False) -> dict[str, Any]:
    """A trainer's weights as it starts from `directory`, bit for bit, and its first step.

    `read_by_megatron`: overwrite the weights first, and have dist_checkpointing load them.
    """
    import hashlib

    import torch

    trainer = make_trainer(directory, config)
    if read_by_megatron:
        from megatron.core import dist_checkpointing

        model = trainer.model.chunks[0].module
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7)
            state = model.sharded_state_dict(metadata={"distrib_optim_sharding_type": "dp_reshardable"})
            model.load_state_dict(dist_checkpointing.load(state, f"{directory}/weights"), strict=True)
    weights = {
        name: hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest()
        for name, parameter in trainer.model.chunks[0].named_parameters()
    }
    result = {"weights": weights, "checksum": trainer.sender.checksum()}
    if not read_by_megatron:
        result["step"] = train_step(trainer)
    trainer.barrier()
    trainer.close()
    return result


@pytest.fixture(scope="module")
def checkpoints(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved by two ranks that divide columns of dense and expert linears between them; a directory a family."""
    root = tmp_path_factory.mktemp("checkpoints")
    for hf in (CONFIG, SHARED):
        place = root / hf["model_type"]
        ranks(2, make_checkpoints, root=str(place), hf=hf, config={"tp": 2, "etp": 2})
        convert(place / "hf", place / "converted", Options(processes=1), Lines())
    return root


@pytest.mark.parametrize(
    "family,layout",
    [("qwen3_moe", {"tp": 2, "ep": 2}), ("qwen3_moe", {"pp": 2}), ("qwen2_moe", {"tp": 2, "ep": 2})],
    ids=["tp2-ep2", "pp2", "shared-tp2-ep2"],
)
def test_training_starts_from_a_converted_checkpoint(
    family: str, layout: dict[str, int], ranks: Any, checkpoints: Path
) -> None:
    checkpoints = checkpoints / family
    theirs = ranks(2, start_from, directory=str(checkpoints / "hf"), config=layout)
    ours = ranks(2, start_from, directory=str(checkpoints / "converted"), config=layout)
    assert ours == theirs
    assert all(found["step"]["grad_norm"] > 0 and len(found["weights"]) > 5 for found in ours)
    job = {"directory": str(checkpoints / "converted"), "config": layout, "read_by_megatron": True}
    for megatron, found in zip(ranks(2, start_from, **job), ours):
        assert megatron == {"weights": found["weights"], "checksum": found["checksum"]}


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_a_training_checkpoint_becomes_a_hugging_face_one(family: str, checkpoints: Path, tmp_path: Path) -> None:
    checkpoints = checkpoints / family
    saved, trained = checkpoints / "step_1", checkpoints / "trained"
    options = Options(processes=2, config=checkpoints / "hf")
    convert(saved, tmp_path / "out", options, Lines())
    assert verify(saved, tmp_path / "out", options, Lines()) == len(load_file(trained / "model.safetensors"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in trained.iterdir()
    }
