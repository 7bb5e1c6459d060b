"""The trainer on real ranks: one loss on every layout, exact zeros where theory says zero, refusals, no orphans."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import QWEN3_MOE, write_config

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_config(tmp_path_factory.mktemp("model"), QWEN3_MOE)


def make_batch(n_seqs: int = 12, seed: int = 0, n_updates: int = 1, algorithm: str = "grpo") -> Any:
    from megarubric.megatron.messages import TrainBatch
    from megarubric.recipe import algorithms

    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 30, size=n_seqs).astype(np.int32)
    prompts = rng.integers(1, lengths)
    mask = np.concatenate([[0.0] * p + [1.0] * (n - p) for n, p in zip(lengths, prompts)]).astype(np.float32)
    updates = (np.arange(n_seqs) % n_updates).astype(np.int32)
    return TrainBatch(
        tokens=rng.integers(0, QWEN3_MOE["vocab_size"], size=int(lengths.sum())).astype(np.int32),
        lengths=lengths,
        loss_mask=mask,
        advantages=np.repeat(rng.normal(size=n_seqs), lengths).astype(np.float32),
        weights=algorithms.algorithm(algorithm).token_weights(mask, lengths, 32, updates),
        rollout_logprobs=rng.normal(-5, 1, size=len(mask)).astype(np.float32),
        updates=updates if n_updates > 1 else None,
    )


def make_trainer(model_dir: str, **config: Any) -> Any:
    from megarubric.megatron.messages import WorkerConfig
    from megarubric.megatron.trainer import Trainer

    config = {"micro_batch_tokens": 64, "bucket_bytes": 1 << 16, "shm_prefix": f"mrtest-{os.getppid()}"} | config
    return Trainer(WorkerConfig(model_dir=model_dir, init="random", timeout_s=30, **config))


def replaced(batch: Any, **arrays: Any) -> Any:
    import dataclasses

    return dataclasses.replace(batch, **arrays)


# ------------------------------------------------------------------------------------------------- layouts agree


def publish(trainer: Any, out: str) -> dict[str, Any]:
    """Publish, read the buckets as an engine would, and compare with the Hugging Face export."""
    import torch
    from safetensors.torch import load_file

    from megarubric.exchange.buckets import Segment, WeightDigest, decoder_layer, tensor_view, verify_bucket
    from megarubric.exchange.control import PublishError

    trainer.export_hf(out)
    exported = load_file(Path(out) / "model.safetensors")
    sender = trainer.sender
    sender.begin(7)
    whole, layers, equal = WeightDigest(), [], 0
    for index in range(len(sender.table.buckets)):
        bucket = sender.fill(7, index)
        if bucket is not None:
            segment = Segment.open(bucket.segment)
            whole.update(verify_bucket(segment.buffer, bucket))
            for entry in bucket.entries:
                layers.append(decoder_layer(entry.name))
                equal += bool(torch.equal(tensor_view(segment.buffer, entry), exported[entry.name]))
            segment.close()
        trainer.barrier()
    refused = ""
    try:
        sender.fill(7, 0)
    except PublishError as error:
        refused = str(error)
    return {
        "buckets": len(sender.table.buckets),
        "equal": equal == len(exported) == len(layers),
        "ordered": layers == sorted(layers),
        "checksum": sender.end(7),
        "received": whole.hexdigest(),
        "refused": refused,
    }


def train_on_layout(model_dir: str, config: dict[str, Any], out: str) -> dict[str, Any]:
    """Two batches of two updates with every term of the loss, one batch too small for the ranks, one of GSPO."""
    import msgspec

    from megarubric.exchange.buckets import SHM_DIR
    from megarubric.recipe.algorithms import algorithm

    trainer = make_trainer(model_dir, reference=True, **config)
    published = publish(trainer, out)
    dapo = algorithm("dapo").settings(tis_cap=2.0, kl_coef=0.1, entropy_coef=0.01, temperature=0.9)
    updates = []
    for seed in range(2):
        batch = make_batch(seed=seed, n_updates=2, algorithm="dapo")
        reference, _ = trainer.logprobs(batch, "reference", 0.9)
        updates += trainer.train(replaced(batch, ref_logprobs=reference), dapo, 1e-4)
    updates += trainer.train(make_batch(1, seed=3), algorithm("grpo").settings(), 1e-4)
    updates += trainer.train(
        make_batch(seed=4, n_updates=2), algorithm("gspo").settings(clip_low=0.1, clip_high=0.1), 1e-4
    )
    scored = replaced(make_batch(seed=5), loss_mask=None)
    logprobs, entropy = trainer.logprobs(scored)
    trainer.barrier()
    trainer.close()
    return {
        "updates": [msgspec.to_builtins(u) for u in updates],
        "logprobs": logprobs.tolist(),
        "entropy": entropy.tolist(),
        "first": scored.starts.tolist(),
        "published": published,
        "segments": [f.name for f in SHM_DIR.glob(f"{trainer.config.shm_prefix}*")] if trainer.rank == 0 else [],
    }


@pytest.fixture(scope="module")
def one_rank(ranks, model_dir, tmp_path_factory):
    return ranks(1, train_on_layout, model_dir=model_dir, config={}, out=str(tmp_path_factory.mktemp("one") / "hf"))[0]


def check_published(result: dict[str, Any]) -> None:
    published = result["published"]
    assert published["buckets"] > 2 and published["equal"] and published["ordered"]
    assert published["checksum"] == published["received"]
    assert published["refused"].startswith("bucket 0 of version 7 asked for, expected bucket")
    assert result["segments"] == []  # none left behind


def test_one_rank_trains_and_scores_every_token(one_rank):
    check_published(one_rank)
    updates = one_rank["updates"]
    assert len(updates) == 7 and not any(u["skipped"] for u in updates)
    assert all(u["grad_norm"] > 0 and u["trained_tokens"] > 0 for u in updates)
    logprobs = np.array(one_rank["logprobs"])
    assert (logprobs[one_rank["first"]] == 0).all() and (np.delete(logprobs, one_rank["first"]) < 0).all()
    # the first update of a batch is on policy, exactly; the second is not
    for first, second in ((0, 1), (2, 3)):
        assert updates[first]["kl"] == 0.0 and updates[first]["ratio_max_deviation"] == 0.0
        assert updates[second]["kl"] > 0.0
    assert updates[0]["kl_ref"] == 0.0 and updates[2]["kl_ref"] > 0.0
    assert updates[0]["micro_batches"] > 1


@pytest.mark.parametrize(
    ("world", "config"),
    [
        (1, {"micro_batch_tokens": 4096}),
        (1, {"micro_batch_tokens": 1}),
        (1, {"recompute": True}),
        (2, {"ep": 2}),
        (2, {"tp": 2}),
        (2, {"pp": 2}),
        (4, {"ep": 2, "pp": 2}),
    ],
    ids=["one micro-batch", "not packed", "recompute", "EP2", "TP2", "PP2", "EP2xPP2"],
)
def test_losses_gradient_norms_and_weights_equal_one_rank(ranks, model_dir, one_rank, world, config, tmp_path):
    results = ranks(world, train_on_layout, model_dir=model_dir, config=config, out=str(tmp_path / "hf"))
    check_published(results[0])
    assert results[0]["published"]["checksum"] == one_rank["published"]["checksum"]  # one model, byte for byte
    for rank in results:  # every rank knows every result
        assert rank["logprobs"] == results[0]["logprobs"]
    for ours, theirs in zip(results[0]["updates"], one_rank["updates"], strict=True):
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name
        for name in ("kl", "kl_ref", "entropy", "logprob_abs_diff", "tis_mean"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
        assert ours["trained_tokens"] == theirs["trained_tokens"] and ours["tokens"] == theirs["tokens"]
        assert (ours["kl"] == 0.0) == (theirs["kl"] == 0.0)
    assert np.allclose(results[0]["logprobs"], one_rank["logprobs"], atol=2e-5)
    assert np.allclose(results[0]["entropy"], one_rank["entropy"], atol=2e-5)


# ----------------------------------------------------------------------------------------------- exact invariants


def exact_invariants(model_dir: str, dtype: str) -> dict[str, Any]:
    from megarubric.megatron.checks import BadBatch
    from megarubric.megatron.loss import LOG_RATIO_LIMIT
    from megarubric.megatron.trainer import NoReference
    from megarubric.recipe.algorithms import algorithm

    grpo = algorithm("grpo").settings(kl_coef=0.05)
    trainer = make_trainer(model_dir, dtype=dtype, reference=True)
    batch = make_batch(n_updates=2)
    old, _ = trainer.logprobs(batch)
    reference, _ = trainer.logprobs(batch, "reference")
    full = replaced(batch, old_logprobs=old, ref_logprobs=reference, rollout_logprobs=old)
    before = trainer.sender.checksum()
    first, second = trainer.train(full, grpo, 1e-3)
    trained = trainer.sender.checksum()
    again, _ = trainer.logprobs(batch, "reference")

    huge = replaced(full, weights=np.full_like(full.weights, 3e38), advantages=np.full_like(full.advantages, 1e10))
    steps = trainer.steps
    (skipped, *_) = trainer.train(huge, grpo, 1e-3)
    unchanged = (trainer.sender.checksum(), trainer.steps - steps)

    refused = []
    for bad in (
        replaced(full, tokens=full.tokens + 131),
        replaced(full, weights=None),
        replaced(full, ref_logprobs=None),
    ):
        try:
            trainer.train(bad, grpo, 1e-3)
        except BadBatch as error:
            refused.append(str(error))
    trainer._reference = None
    try:
        trainer.logprobs(batch, "reference")
    except NoReference as error:
        refused.append(str(error))
    (after, _) = trainer.train(full, grpo, 1e-3)
    trainer.close()
    return {
        "first": [first.kl, first.kl_ref, first.ratio_max_deviation, first.logprob_max_diff],
        "second_kl": second.kl,
        "changed": before != trained,
        "reference_kept": bool(np.array_equal(reference, again)) and trained == unchanged[0],
        "skipped": [skipped.skipped, unchanged[1]],
        "refused": refused,
        "alive": np.isfinite(after.loss) and LOG_RATIO_LIMIT > 0 and not after.skipped,
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_invariants(ranks, model_dir, dtype):
    (got,) = ranks(1, exact_invariants, model_dir=model_dir, dtype=dtype)
    assert got["first"] == [0.0, 0.0, 0.0, 0.0]  # the engine's log-probabilities were given as ours
    assert got["second_kl"] > 0 and got["changed"]
    assert got["reference_kept"]
    assert got["skipped"] == [True, 0]
    assert got["refused"] == [
        "token id 261 is outside the vocabulary of 131",
        "training needs weights",
        "kl_coef is set, but the batch has no ref_logprobs",
        "this trainer keeps no reference: start it with reference = true",
    ]
    assert got["alive"]


def sft_curve(model_dir: str) -> list[float]:
    from megarubric.recipe.algorithms import algorithm

    sft = algorithm("sft")
    trainer = make_trainer(model_dir, micro_batch_tokens=512)
    batch = replaced(make_batch(8, algorithm="sft"), rollout_logprobs=None)
    batch = replaced(batch, advantages=np.ones_like(batch.advantages))
    curve = [trainer.train(batch, sft.settings(), 3e-3)[0].loss for _ in range(30)]
    trainer.close()
    return curve


def test_supervised_training_learns_a_batch_by_heart(ranks, model_dir):
    (curve,) = ranks(1, sft_curve, model_dir=model_dir)
    assert curve[-1] < 0.3 * curve[0]


# ---------------------------------------------------------------------------------------------- the worker process

PARENT = """
import json, subprocess, sys
ranks = [subprocess.Popen(argv, env=env, stdout=open(log, "wb"), stderr=subprocess.STDOUT)
         for argv, env, log in json.load(open(sys.argv[1]))]
print(json.dumps([r.pid for r in ranks]), flush=True)
for r in ranks:
    r.wait()
"""


class Job:
    """A parent process with two trainer ranks, as the controller is one."""

    def __init__(self, directory: Path, model_dir: str) -> None:
        from megarubric.launch.supervisor import free_port
        from megarubric.megatron.client import TrainerClient

        config = directory / "worker.json"
        config.write_text(
            json.dumps({"model_dir": model_dir, "init": "random", "ep": 2, "shm_prefix": f"mrtest-{os.getpid()}-job"})
        )
        endpoint = f"ipc://{directory}/trainer"
        port = free_port()
        spec = []
        self.logs = [directory / f"rank{rank}.log" for rank in range(2)]
        for rank, log in enumerate(self.logs):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
            env |= {k: str(v) for k, v in place.items()}
            env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
            argv = [sys.executable, "-m", "megarubric.megatron.worker", "--config", str(config), "--endpoint", endpoint]
            spec.append((argv, env, str(log)))
        (directory / "spec.json").write_text(json.dumps(spec))
        self.parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(directory / "spec.json")], stdout=subprocess.PIPE, text=True
        )
        assert self.parent.stdout is not None
        self.pids: list[int] = json.loads(self.parent.stdout.readline())
        self.client = TrainerClient(endpoint, peer_status=self.status)

    def status(self) -> str | None:
        dead = [rank for rank, pid in enumerate(self.pids) if not alive(pid)]
        return f"ranks {dead} ended: {self.logs[dead[0]].read_text()[-2000:]}" if dead else None

    def gone_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while any(alive(pid) for pid in self.pids):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def stop(self) -> None:
        for pid in (self.parent.pid, *self.pids):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.parent.wait()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_worker_answers_refuses_and_ends_when_a_rank_is_killed(model_dir, tmp_path):
    from megarubric.errors import ProcessDied
    from megarubric.exchange.buckets import SHM_DIR
    from megarubric.exchange.rpc import RemoteError
    from megarubric.recipe.algorithms import algorithm

    job = Job(tmp_path, model_dir)

    async def talk() -> None:
        who = await job.client.describe(timeout_s=400)
        assert (who.world_size, who.layout["ep"], who.layout["dp"]) == (2, 2, 2)
        assert sorted(who.pids) == sorted(job.pids)
        batch = make_batch()
        old, entropy = await job.client.logprobs(batch)
        assert old.shape == entropy.shape == batch.tokens.shape
        for bad, reason in (
            (replaced(batch, tokens=batch.tokens + 131), "BadBatch: token id 261 is outside the vocabulary of 131"),
            (replaced(batch, advantages=None), "BadBatch: training needs advantages"),
        ):
            with pytest.raises(RemoteError) as refused:
                await job.client.train(bad, algorithm("grpo").settings(), 1e-3)
            assert str(refused.value) == reason
        with pytest.raises(RemoteError, match=r"BadInput: .*is not a checkpoint directory"):
            await job.client.load(str(tmp_path / "nothing"))
        before = await job.client.checksum()
        trained = await job.client.train(replaced(batch, old_logprobs=old), algorithm("grpo").settings(), 1e-3)
        assert trained.steps == 1 and trained.updates[0].kl == 0.0
        assert [f.index async for f in job.client.publish(1)] == [0]
        assert before != (await job.client.end_publish(1)).checksum

        os.kill(job.pids[1], signal.SIGKILL)
        with pytest.raises(ProcessDied):
            for _ in range(100):
                await job.client.logprobs(batch)

    async def talk_and_close() -> None:
        try:
            await talk()
        finally:
            await job.client.close()

    try:
        asyncio.run(talk_and_close())
        assert job.gone_within(15), "rank 0 outlived rank 1"
        assert job.parent.wait(10) == 0  # it waited for both ranks and had nothing left
        assert "lost another one" in job.logs[0].read_text().splitlines()[-1]
        assert list(SHM_DIR.glob(f"mrtest-{os.getpid()}-job*")) == []  # nor did it leave its segments
    finally:
        job.stop()


def test_no_rank_outlives_a_killed_parent(model_dir, tmp_path):
    """Killed as early as can be: the ranks are still importing."""
    job = Job(tmp_path, model_dir)
    try:
        deadline = time.monotonic() + 300
        while not all("libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in job.pids):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(job.parent.pid, signal.SIGKILL)
        assert job.gone_within(10), "trainer ranks outlived their parent"
    finally:
        job.stop()


@pytest.mark.parametrize(
    ("written", "line"),
    [
        ('{"model_dir": "nowhere"}', "nowhere: No such file or directory"),
        ('{"model_dir": "x", "layers": 3}', "worker.json: Object contains unknown field `layers`"),
    ],
)
def test_a_worker_that_cannot_start_says_why_in_one_line(tmp_path, written, line):
    (tmp_path / "worker.json").write_text(written)
    done = subprocess.run(
        [sys.executable, "-m", "megarubric.megatron.worker", "--config", "worker.json", "--endpoint", "ipc://none"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == line
