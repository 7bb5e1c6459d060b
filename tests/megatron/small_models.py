"""Small models and batches that several tests train: their configs, random checkpoints of them, random batches.

A rank job finds this module beside the rank server, a test by tests/conftest.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

# An untied head, a vocabulary that no tp divides, grouped heads, every layer a mixture of experts.
QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 131,
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
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "initializer_range": 0.3,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def write_config(directory: Path, config: dict[str, Any]) -> str:
    """`directory` with a config.json, and no weights: for trainers that draw theirs."""
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def write_bf16_checkpoint(directory: Path, config: dict[str, Any], scale: float) -> str:
    """`directory` as a Hugging Face checkpoint: norms of one, everything else normal with deviation `scale`."""
    import torch
    from safetensors.torch import save_file

    from megarubric.megatron.families import family_of

    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: (torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * scale).bfloat16()
        for name, shape in family_of(config, "config.json").manifest(config).items()
    }
    save_file(tensors, str(directory / "model.safetensors"))
    return write_config(directory, config)


def grpo_batch(seed: int, vocab_size: int) -> Any:
    """Eight sequences of 4 to 29 random tokens, trained on but for the first of each (`TrainBatch`)."""
    from megarubric.megatron.messages import TrainBatch
    from megarubric.recipe.algorithms import algorithm

    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 30, size=8).astype(np.int32)
    mask = np.ones(int(lengths.sum()), dtype=np.float32)
    mask[np.cumsum(lengths) - lengths] = 0
    return TrainBatch(
        tokens=rng.integers(0, vocab_size, size=len(mask)).astype(np.int32),
        lengths=lengths,
        loss_mask=mask,
        advantages=np.repeat(rng.normal(size=8), lengths).astype(np.float32),
        weights=algorithm("grpo").token_weights(mask, lengths, 32),
    )
