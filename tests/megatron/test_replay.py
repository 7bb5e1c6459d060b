"""Routing replay: the experts of the record are used, gates stay live, on every layout, with recompute too."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.engine

HF_CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "initializer_range": 0.3,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
NONE = 255


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(HF_CONFIG))
    return str(directory)


def make_batch(routed: bool) -> Any:
    """Ten sequences; with `routed`, experts at random, none for the last token of a sequence nor for a few others."""
    from megarubric.megatron.messages import TrainBatch

    rng = np.random.default_rng(7)
    lengths = rng.integers(5, 25, size=10).astype(np.int32)
    n = int(lengths.sum())
    mask = np.ones(n, np.float32)
    mask[np.cumsum(lengths) - lengths] = 0
    order = rng.random((n, HF_CONFIG["num_hidden_layers"], HF_CONFIG["num_experts"])).argsort(-1)
    routing = order[:, :, : HF_CONFIG["num_experts_per_tok"]].astype(np.uint8)
    routing[np.cumsum(lengths) - 1] = NONE
    routing[rng.random(n) < 0.1] = NONE
    return TrainBatch(
        tokens=rng.integers(0, HF_CONFIG["vocab_size"], size=n).astype(np.int32),
        lengths=lengths,
        loss_mask=mask,
        advantages=np.repeat(rng.normal(size=10), lengths).astype(np.float32),
        weights=np.full(n, 1.0 / n, np.float32),
        updates=(np.arange(10) % 2).astype(np.int32),
        routing=routing if routed else None,
    )


def make_trainer(model_dir: str, **config: Any) -> Any:
    from megarubric.megatron.messages import WorkerConfig
    from megarubric.megatron.trainer import Trainer

    config = {"micro_batch_tokens": 48, "bucket_bytes": 1 << 16, "shm_prefix": f"mrreplay-{os.getppid()}"} | config
    return Trainer(WorkerConfig(model_dir=model_dir, init="random", timeout_s=60, **config))


def train_with_record(model_dir: str, config: dict[str, Any], routed: bool) -> dict[str, Any]:
    from megarubric.recipe.algorithms import algorithm

    trainer = make_trainer(model_dir, **config)
    settings = algorithm("grpo").settings()
    batch = make_batch(routed)
    logprobs, _ = trainer.logprobs(batch)
    updates = trainer.train(batch, settings, 1e-3)
    updates += trainer.train(batch, settings, 1e-3)
    trainer.close()
    return {
        "logprobs": logprobs.tolist(),
        "loss": [u.loss for u in updates],
        "norm": [u.grad_norm for u in updates],
        "kl": [u.kl for u in updates],
        "waiting": sum(len(r.waiting) for layers in trainer.replay.layers for r in layers),
    }


@pytest.fixture(scope="module")
def one_rank(ranks: Any, model_dir: str) -> dict[str, Any]:
    return ranks(1, train_with_record, model_dir=model_dir, config={}, routed=True)[0]


@pytest.mark.parametrize(
    ("world", "config"),
    [
        (1, {"recompute": True, "micro_batch_tokens": 4096}),
        (2, {"tp": 2, "recompute": True}),
        (2, {"ep": 2}),
        (2, {"pp": 2, "recompute": True}),
        (4, {"pp": 4, "recompute": True}),
    ],
    ids=["one micro-batch, recompute", "TP2, recompute", "EP2", "PP2, recompute", "PP4, recompute"],
)
def test_every_layout_replays_the_same(ranks, model_dir, one_rank, world, config):
    result = ranks(world, train_with_record, model_dir=model_dir, config=config, routed=True)[0]
    assert result["loss"] == pytest.approx(one_rank["loss"], rel=1e-5, abs=1e-8)
    assert result["norm"] == pytest.approx(one_rank["norm"], rel=1e-5)
    assert np.allclose(result["logprobs"], one_rank["logprobs"], atol=2e-5)
    assert result["kl"][0] == 0.0 and result["kl"][2] == 0.0  # the first update on fresh log-probabilities, exactly
    assert result["waiting"] == 0  # every record put aside for a second forward was used


def test_without_a_record_the_routers_choose(ranks, model_dir, one_rank):
    result = ranks(1, train_with_record, model_dir=model_dir, config={}, routed=False)[0]
    assert not np.allclose(result["logprobs"], one_rank["logprobs"], atol=1e-2)
    assert result["kl"][0] == 0.0


def own_choices(model_dir: str) -> dict[str, Any]:
    """Record what the routers choose by themselves, replay it, compare bit for bit; then the refusals."""
    from megarubric.megatron.checks import BadBatch
    from megarubric.megatron.replay import LayerReplay
    from megarubric.recipe.algorithms import algorithm

    trainer = make_trainer(model_dir, micro_batch_tokens=4096)
    batch = replaced(make_batch(False), updates=None)
    chosen: dict[int, Any] = {}
    ask = LayerReplay.get_replay_topk

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        scores, indices = ask(self, *args, **kwargs)
        chosen[self.layer] = indices.numpy().astype(np.uint8)
        return scores, indices

    LayerReplay.get_replay_topk = spy
    free, _ = trainer.logprobs(batch)
    LayerReplay.get_replay_topk = ask
    order = np.argsort(np.concatenate(placed(trainer, batch)))
    routing = np.stack([chosen[k] for k in sorted(chosen)], axis=1)[: len(batch.tokens)][order]
    bound, _ = trainer.logprobs(replaced(batch, routing=routing))

    refused = []
    for bad in (routing[:, :3], np.full_like(routing, 9), routing[:, :, :1]):
        try:
            trainer.train(replaced(batch, routing=np.ascontiguousarray(bad)), algorithm("grpo").settings(), 1e-3)
        except BadBatch as error:
            refused.append(str(error))
    trainer.close()
    return {"equal": bool(np.array_equal(free, bound)), "layers": len(chosen), "refused": refused}


def replaced(batch: Any, **arrays: Any) -> Any:
    import dataclasses

    return dataclasses.replace(batch, **arrays)


def placed(trainer: Any, batch: Any) -> list[Any]:
    """Flat batch index of every position, micro-batch by micro-batch, without padding."""
    from megarubric.megatron.packing import pack, plan

    out = []
    for rows in plan(batch.lengths, None, trainer.packing)[0][0]:
        index = pack(rows, batch.tokens, batch.lengths, trainer.packing).input_index
        out.append(index[index >= 0])
    return out


def test_replaying_own_choices_changes_nothing_and_misfits_are_refused(ranks, model_dir):
    result = ranks(1, own_choices, model_dir=model_dir)[0]
    assert result["layers"] == HF_CONFIG["num_hidden_layers"] and result["equal"]
    assert [r.split(" has ")[0].split(" names ")[0] for r in result["refused"]] == ["routing", "routing", "routing"]
    assert "names expert 9, the model has 8" in result["refused"][1]


def against_transformers(model_dir: str) -> float:
    """Largest difference of log-probabilities from transformers' model with its routers forced to the record."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    trainer = make_trainer(model_dir)
    batch = make_batch(True)
    ours, _ = trainer.logprobs(batch)
    out = Path(model_dir) / f"hf-{os.getpid()}"
    trainer.export_hf(str(out))
    trainer.close()
    model = Qwen3MoeForCausalLM.from_pretrained(out, config=Qwen3MoeConfig.from_pretrained(out), dtype=torch.float32)
    model.eval()
    worst, start = 0.0, 0
    for n in batch.lengths.tolist():
        rows = torch.from_numpy(batch.routing[start : start + n].astype(np.int64))
        for layer, block in enumerate(model.model.layers):
            block.mlp.gate.forward = forced(block.mlp.gate, rows[:, layer])
        ids = torch.from_numpy(batch.tokens[start : start + n].astype(np.int64))
        with torch.no_grad():
            logp = torch.log_softmax(model(ids[None]).logits[0].double(), -1)
        theirs = logp[:-1].gather(1, ids[1:, None])[:, 0].numpy()
        worst = max(worst, float(np.abs(ours[start + 1 : start + n] - theirs).max()))
        start += n
    return worst


def forced(gate: Any, record: Any) -> Any:
    """A router whose experts are the record's where there is one; gates are the softmax over all, renormalised."""
    import torch

    def forward(hidden: Any) -> Any:
        logits = torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), gate.weight).float()
        probabilities = logits.softmax(-1)
        own = probabilities.topk(record.shape[1], -1).indices
        chosen = torch.where(record[:, :1] == NONE, own, record)
        gates = probabilities.gather(1, chosen)
        return logits, gates / gates.sum(-1, keepdim=True), chosen

    return forward


def test_agrees_with_transformers_forced_to_the_record(ranks, model_dir):
    assert ranks(1, against_transformers, model_dir=model_dir)[0] < 1e-4
