"""Trainer and engine together: log-probabilities of the same tokens agree at step 1 and after 20 exchanges.

The real Megatron trainer (two expert-parallel ranks) and the real vLLM engine, with the shipped tiny model; weights go
through shared memory, and through what stands for device memory here (host_cuda/cudart.c).
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from megarubric.config.schema import Parallel, Train
from megarubric.exchange.receiver import checksum_of
from megarubric.exchange.update import exchange
from megarubric.launch import plan
from megarubric.launch.supervisor import Supervisor
from megarubric.launch.system import System
from megarubric.megatron.messages import LossSettings, TrainBatch
from megarubric.rollout.data import ChatTokenizer, read_prompts, tokenize_prompts
from megarubric.rollout.messages import Completion, EngineConfig, GenerateRequest

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "models/tiny-qwen3-moe")
EXCHANGES = 20
pytestmark = pytest.mark.engine


def read() -> list[np.ndarray]:
    """Token ids of twelve held-out quickstart prompts."""
    rows = read_prompts(ROOT / "rubrics/quickstart/heldout.jsonl")[:12]
    return [p.token_ids for p in tokenize_prompts(rows, ChatTokenizer(Path(MODEL)), 256)]


def batch_of(prompts: list[np.ndarray], samples: list[Completion], rng: np.random.Generator) -> TrainBatch:
    tokens = [np.concatenate([p, s.token_ids]) for p, s in zip(prompts, samples)]
    lengths = np.array([len(t) for t in tokens], np.int32)
    mask = np.concatenate([(np.arange(n) >= len(p)).astype(np.float32) for n, p in zip(lengths, prompts)])
    engine = np.concatenate(
        [np.concatenate([np.zeros(len(p), np.float32), s.logprobs]) for p, s in zip(prompts, samples)]
    )
    advantages = np.repeat(rng.standard_normal(len(lengths)).astype(np.float32), lengths) * mask
    return TrainBatch(
        np.concatenate(tokens),
        lengths,
        mask,
        advantages,
        mask / mask.sum(),
        engine.astype(np.float32),
        routing=np.concatenate([s.routing for s in samples]),
    )


async def follow(dtype: str, through: Literal["host", "device"], directory: Path) -> dict[str, float]:
    """Mean and largest |trainer - engine| log-probability before any exchange and after 20, each with a training step
    before it; at the end also after prompts of random tokens. With and without routing replay."""
    worker = plan.worker_config(
        *(MODEL, dtype, "load", 1, Parallel(ranks=2, ep=2), Train(micro_batch_tokens=512)),
        **{"reference": False, "bucket_mb": 4, "through": through},
    )
    staging = "direct" if through == "device" else "host"
    engine = EngineConfig(
        **{"model_dir": MODEL, "dtype": dtype, "max_model_len": 160, "kv_cache_gib": 0.25, "threads": 2},
        **{"capture_routing": True, "staging": staging},
    )
    system = System(Supervisor(directory / "logs"), plan.socket_dir(directory))
    rng = np.random.default_rng(0)
    found: dict[str, float] = {}
    usual = read()
    strange = [np.random.default_rng(i).integers(0, 2000, len(p)).astype(np.int32) for i, p in enumerate(usual)]
    try:
        trainer = system.trainer = system.start_trainer(worker, 2, None)
        policy = system.start_engine("policy", engine)
        system.policies = [policy]
        await system.ready()

        async def compare(name: str, step: int, prompts: list[np.ndarray]) -> TrainBatch:
            requests = [GenerateRequest(p, 40, 1000 * step + i) for i, p in enumerate(prompts)]
            samples = await policy.generate(requests)
            assert all(s.error is None and s.weight_version == step for s in samples)
            batch = batch_of(prompts, samples, rng)
            for label, scored in ((name, replace(batch, routing=None)), (f"{name}, replayed", batch)):
                logprobs, _ = await trainer.logprobs(scored)
                difference = np.abs(logprobs - batch.rollout_logprobs)[batch.loss_mask > 0]
                found[label], found[f"{label}, max"] = float(difference.mean()), float(difference.max())
            return batch

        await exchange(trainer, [policy], 0)  # version 0: the engine says so with every sample
        batch = await compare("first", 0, usual)
        first = (await trainer.checksum(), (await policy.checksum()).checksum)
        assert first[0] == first[1]
        if dtype == "float32":  # the files' own
            assert first[0] == checksum_of(Path(MODEL), "sum128" if through == "device" else "xxh3")
        for version in range(1, EXCHANGES + 1):
            await trainer.train(batch, LossSettings(), 5e-4)  # the quickstart's learning rate
            report = await exchange(trainer, [policy], version)
            served = await policy.checksum()
            assert (served.version, served.checksum) == (version, report.checksum)
        assert report.checksum == await trainer.checksum() != first[0]
        await compare("last", EXCHANGES, usual)
        await compare("strange", EXCHANGES, strange)
        stale = await policy.score_tokens([np.concatenate([usual[0], np.array([3, 4, 5], np.int32)])])
        assert stale[0].weight_version == EXCHANGES
    finally:
        await system.close()
    return found


@pytest.mark.parametrize(("dtype", "through", "bound"), [("float32", "device", 1e-4), ("bfloat16", "host", 0.02)])
def test_log_probabilities_agree_before_and_after_twenty_exchanges(
    dtype: str,
    through: Literal["host", "device"],
    bound: float,
    tmp_path: Path,
    cudart: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MEGARUBRIC_CUDART", str(cudart))
    found = asyncio.run(follow(dtype, through, tmp_path))
    print(dtype, through, found)
    assert found["first"] < bound
    assert found["last"] < bound
    # A token that trainer and engine send to different experts is off by a nat and more. Replay leaves rounding.
    assert found["strange, replayed, max"] < 25 * bound
    if dtype == "bfloat16":
        assert found["strange, replayed"] < found["strange"]
