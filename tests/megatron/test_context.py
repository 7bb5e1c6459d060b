"""Context parallelism: the attention is plain attention, and a run is the run of one rank, whatever else is combined.

Every layout here trains with packing on and off, recompute on and off, routing replay on and off, and must give the
log-probabilities, losses and gradient norms of one rank. tests/megatron/test_layouts.py compares context-parallel
layouts with transformers, gradient by gradient; test_checkpoint.py resumes from one.
"""

from __future__ import annotations

import itertools
import json
import os
from typing import Any

import numpy as np
import pytest
from small_models import QWEN3_MOE

pytestmark = pytest.mark.engine

SPARSE = QWEN3_MOE | {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "head_dim": 16,
}
DENSE = {k: v for k, v in SPARSE.items() if "expert" not in k and not k.startswith(("moe", "norm_"))}
DENSE |= {"model_type": "qwen3", "tie_word_embeddings": True}


# ------------------------------------------------------------------------------------------------ the attention alone


def attention_off(lengths: list[int], heads: int, groups: list[int]) -> dict[str, float]:
    """Largest differences on this rank, by degree, from attention over whole sequences: outputs, gradients, and rotated
    vectors from those of the positions."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megarubric.megatron.layers import PackedCoreAttention, PackedRotary
    from megarubric.megatron.packing import context_share
    from megarubric.megatron.parallel import ParallelLayout, initialize, shutdown

    ends = [0, *itertools.accumulate(lengths)]
    cu = torch.tensor(ends, dtype=torch.int32)
    params = PackedSeqParams("thd", cu, cu, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(ends[-1], heads, 16, generator=generator)
    inputs, truths = {}, {}
    for n in groups:
        whole = [torch.randn(ends[-1], h, 16, generator=generator) for h in (heads, n, n)]
        wide = [x.double().requires_grad_() for x in whole]
        out = torch.cat([plain(*(x[a:b] for x in wide)) for a, b in itertools.pairwise(ends)])
        (out * weight).sum().backward()
        inputs[n], truths[n] = whole, [out.detach(), *(x.grad for x in wide)]

    off = {}
    for cp in (2, 4):
        initialize(ParallelLayout(cp=cp), timeout_s=60)
        mine = torch.from_numpy(context_share(ends, cp, parallel_state.get_context_parallel_rank()))
        config = TransformerConfig(
            num_layers=1,
            hidden_size=16 * heads,
            num_attention_heads=heads,
            context_parallel_size=cp,
            attention_dropout=0.0,
        )
        attention = PackedCoreAttention(config, 1, AttnMaskType.causal, "self")
        for n, dtype in itertools.product(groups, (torch.float32, torch.bfloat16)):
            share = [x[mine].to(dtype).requires_grad_() for x in inputs[n]]
            out = attention(*share, None, packed_seq_params=params)
            (out * weight[mine]).sum().backward()
            found = [out.detach(), *(x.grad for x in share)]
            for name, ours, theirs in zip("oqkv", found, truths[n], strict=True):
                off[f"{name} {dtype} {cp} {n}"] = float((ours - theirs[mine]).abs().max() / theirs.abs().max())
        with pytest.raises(ValueError, match="takes packed sequences"):
            attention(*(x[:, None] for x in share), None)

        rotary = PackedRotary(RotaryEmbedding(16, 1.0, use_cpu_initialization=True))
        table = rotary(rotary.get_rotary_seq_len(None, None, None, config, params), packed_seq=True)
        group = parallel_state.get_context_parallel_group()
        query = inputs[groups[0]][0][mine]
        ours = apply_rotary_pos_emb(query, table, config, cu_seqlens=cu, cp_group=group)
        at = torch.cat([torch.arange(n) for n in lengths])[mine]
        angles = rotary.inner(max(lengths), packed_seq=True)[at]
        theirs = apply_rotary_pos_emb(query[:, None], angles, config)[:, 0]
        off[f"rotated angles {cp}"] = float((ours - theirs).abs().max())
        parallel_state.destroy_model_parallel()  # the ranks stay connected
    shutdown()
    return off


def plain(query: Any, key: Any, value: Any) -> Any:
    """Causal attention of one sequence, [t, heads, d], written out."""
    import torch

    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    scores = torch.einsum("ihd,jhd->hij", query, key) / query.shape[2] ** 0.5
    scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), value)


def test_shares_of_the_queries_see_what_whole_sequences_do(ranks):
    """Two and four ranks, chunks of one token to 128. Rotary angles are those of the positions, bit for bit."""
    allowed = {"torch.float32": 2e-6, "torch.bfloat16": 2e-2, "angles": 0.0}
    for off in ranks(4, attention_off, lengths=[8, 16, 88, 8, 512, 24], heads=4, groups=[4, 2]):
        assert len(off) == 2 * (2 * 2 * 4 + 1)
        for name, value in off.items():
            assert value <= allowed[name.split()[1]], (name, value)


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = {}
    for name, config in {"sparse": SPARSE, "dense": DENSE}.items():
        directory = tmp_path_factory.mktemp(name)
        (directory / "config.json").write_text(json.dumps(config))
        out[name] = str(directory)
    return out


def make_batch(n_seqs: int, seed: int, routed: bool) -> Any:
    """Two updates of sequences of which no two fit into the longest one's place; a single one is short, with nothing
    to train in some ranks' shares. Experts are drawn at random."""
    from megarubric.megatron.messages import TrainBatch
    from megarubric.recipe.algorithms import algorithm

    rng = np.random.default_rng(seed)
    lengths = rng.integers(*((16, 30) if n_seqs > 1 else (5, 8)), size=n_seqs).astype(np.int32)
    n = int(lengths.sum())
    prompts = rng.integers(1, lengths)
    mask = np.concatenate([[0.0] * p + [1.0] * (n - p) for n, p in zip(lengths, prompts)]).astype(np.float32)
    updates = (np.arange(n_seqs) % 2).astype(np.int32)
    routing = rng.random((n, SPARSE["num_hidden_layers"], SPARSE["num_experts"])).argsort(-1)[:, :, :2].astype(np.uint8)
    routing[np.cumsum(lengths) - 1] = 255
    return TrainBatch(
        tokens=rng.integers(0, SPARSE["vocab_size"], size=n).astype(np.int32),
        lengths=lengths,
        loss_mask=mask,
        advantages=np.repeat(rng.normal(size=n_seqs), lengths).astype(np.float32),
        weights=algorithm("dapo").token_weights(mask, lengths, 32, updates),
        rollout_logprobs=rng.normal(-5, 1, size=n).astype(np.float32),
        updates=updates if n_seqs > 1 else None,
        routing=routing if routed else None,
    )


def train(model_dir: str, config: dict[str, Any], routed: bool) -> dict[str, Any]:
    """Log-probabilities, then five optimizer steps: every term of the loss; ratio and rejection by sequence; a batch
    of one sequence, which leaves ranks without work."""
    import dataclasses

    import msgspec
    from megatron.core import parallel_state

    from megarubric.megatron.messages import WorkerConfig
    from megarubric.megatron.trainer import Trainer
    from megarubric.recipe.algorithms import algorithm

    prefix = f"mrcontext-{os.getppid()}"
    options = {"micro_batch_tokens": 64, "bucket_bytes": 1 << 16, "shm_prefix": prefix, "reference": True} | config
    trainer = Trainer(WorkerConfig(model_dir=model_dir, init="random", timeout_s=60, **options))
    checksum = trainer.sender.checksum()
    batch = make_batch(6, 0, routed)
    everything = algorithm("dapo").settings(tis_cap=2.0, kl_coef=0.1, entropy_coef=0.01, temperature=0.9)
    by_sequence = algorithm("gspo").settings(clip_low=1e-4, clip_high=1e-4, reject_below=0.3, reject_above=5.0)
    scored = trainer.logprobs(batch, temperature=0.9)
    reference, _ = trainer.logprobs(batch, "reference", 0.9)
    known = dataclasses.replace(batch, ref_logprobs=reference, old_logprobs=scored[0])
    updates = trainer.train(known, everything, 1e-4)
    updates += trainer.train(make_batch(4, 1, routed), by_sequence, 1e-4)
    updates += trainer.train(make_batch(1, 2, routed), algorithm("grpo").settings(), 1e-4)
    last = trainer.logprobs(dataclasses.replace(batch, loss_mask=None))
    waiting = sum(len(r.waiting) for layers in trainer.replay.layers for r in layers)
    trainer.barrier()
    trainer.sender.close()
    parallel_state.destroy_model_parallel()  # the ranks stay connected: other runs follow
    return {
        "checksum": checksum,
        "updates": [msgspec.to_builtins(u) for u in updates],
        "scored": [x.tolist() for x in scored],
        "last": [x.tolist() for x in last],
        "waiting": waiting,
    }


def train_all(model_dir: str, config: dict[str, Any], options: list[list[bool]]) -> list[dict[str, Any]]:
    """One run for each of `options`: packed, recomputed, replayed."""
    budget = 64 // config.get("cp", 1)
    return [
        train(model_dir, config | {"micro_batch_tokens": budget if packed else 1, "recompute": recompute}, routed)
        for packed, recompute, routed in options
    ]


@pytest.fixture(scope="module")
def one_rank(ranks: Any, model_dirs: dict[str, str]) -> dict[tuple[str, bool], dict[str, Any]]:
    """Runs of one rank by model and replay; packed, without recompute."""
    sparse, replayed = ranks(1, train_all, model_dir=model_dirs["sparse"], config={}, options=[[1, 0, 0], [1, 0, 1]])[0]
    (dense,) = ranks(1, train_all, model_dir=model_dirs["dense"], config={}, options=[[1, 0, 0]])[0]
    return {("sparse", False): sparse, ("sparse", True): replayed, ("dense", False): dense}


ALL = [list(options) for options in itertools.product([True, False], repeat=3)]
PAIRS = [options for options in ALL if sum(options) % 2]  # half of them, in which every two meet in all four ways
# Packed, these layouts are in test_trainer.py and, with recompute and replay, in test_replay.py.
UNPACKED = [options for options in PAIRS if not options[0]]
LAYOUTS = [
    pytest.param("sparse", 1, {}, ALL, id="one rank"),
    pytest.param("sparse", 2, {}, UNPACKED, id="DP2"),
    pytest.param("sparse", 2, {"tp": 2}, UNPACKED, id="TP2"),
    pytest.param("sparse", 2, {"pp": 2}, UNPACKED, id="PP2"),
    pytest.param("sparse", 2, {"ep": 2}, [ALL[0], *UNPACKED], id="EP2"),
    pytest.param("sparse", 2, {"cp": 2}, PAIRS, id="CP2"),
    pytest.param("sparse", 2, {"cp": 2, "ep": 2}, PAIRS, id="CP2xEP2"),
    pytest.param("sparse", 4, {"cp": 4}, [[True, False, False], [False, True, True]], id="CP4"),
    pytest.param("sparse", 4, {"cp": 2, "tp": 2}, PAIRS, id="CP2xTP2"),
    pytest.param("sparse", 4, {"cp": 2, "pp": 2}, PAIRS, id="CP2xPP2"),
    pytest.param("dense", 4, {"cp": 2, "tp": 2}, [[True, False, False]], id="dense, CP2xTP2"),
]


@pytest.mark.parametrize(("model", "world", "config", "options"), LAYOUTS)
def test_packing_recompute_and_replay_change_nothing(ranks, model_dirs, one_rank, model, world, config, options):
    results = ranks(world, train_all, model_dir=model_dirs[model], config=config, options=options)
    dp = world // (config.get("tp", 1) * config.get("pp", 1) * config.get("cp", 1))
    for (packed, recompute, routed), *runs in zip(options, *results, strict=True):
        case = f"packed {packed}, recompute {recompute}, replay {routed}"
        ours, theirs = runs[0], one_rank[model, bool(routed)]
        assert ours["checksum"] == theirs["checksum"], case  # one set of weights, each element sent once
        for rank in runs:
            assert rank["scored"] == ours["scored"] and rank["last"] == ours["last"], case  # every rank has them all
            assert rank["waiting"] == 0, case
        for name in ("scored", "last"):
            for x, y in zip(ours[name], theirs[name], strict=True):
                assert np.allclose(x, y, atol=1e-5), (case, name)
                assert ((np.array(x) == 0) == (np.array(y) == 0)).all(), (case, name)
        for mine, other in zip(ours["updates"], theirs["updates"], strict=True):
            for name in ("loss", "grad_norm"):
                assert mine[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), (case, name)
            for name in ("kl", "kl_ref", "entropy", "logprob_abs_diff", "logprob_max_diff"):
                assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), (case, name)
            # e to the largest difference of two log-probabilities: their absolute error is its relative one
            assert mine["ratio_max_deviation"] == pytest.approx(other["ratio_max_deviation"], abs=2e-5), case
            for name in ("clip_fraction", "tis_mean", "tis_clipped_fraction", "rejected_fraction"):
                assert mine[name] == pytest.approx(other[name], rel=1e-5, abs=1e-9), (case, name)
            assert mine["trained_tokens"] == other["trained_tokens"] and mine["tokens"] == other["tokens"], case
            assert (mine["kl"] == 0.0) == (other["kl"] == 0.0), case
        assert ours["updates"][0]["micro_batches"] == -(-(2 if packed else 3) // dp), case  # of three sequences


def test_the_runs_meet_what_they_are_about(one_rank):
    """The steps clip, cut off and reject, so that what is counted above is not nothing; and replay changes the run."""
    updates = one_rank["sparse", False]["updates"]
    for name in ("clip_fraction", "tis_clipped_fraction", "rejected_fraction", "kl_ref", "kl"):
        assert max(u[name] for u in updates) > 0, name
    assert 0 < updates[2]["rejected_fraction"] < 1
    assert not np.allclose(one_rank["sparse", False]["scored"], one_rank["sparse", True]["scored"], atol=1e-2)
