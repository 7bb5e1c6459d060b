"""Publishing from trainer ranks on two hosts (both this machine, with segments of their own): the same bytes on both,
whatever the layout, whole or as deltas, and one line when a rank of the other host is gone."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from small_models import QWEN3_MOE, write_config

from megarubric.errors import BadInput, MegarubricError
from megarubric.exchange.rpc import CurveKeys

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Model directory and the run's keys."""
    directory = tmp_path_factory.mktemp("model")
    for tied in (False, True):
        (directory / f"tied_{tied}").mkdir()
        write_config(directory / f"tied_{tied}", QWEN3_MOE | {"tie_word_embeddings": tied})
    CurveKeys.generate().save(directory / "keys")
    return {"model_dir": str(directory / "tied_False"), "tied_dir": str(directory / "tied_True")} | {
        "keys": str(directory / "keys")
    }


def make_trainer(model_dir: str, keys: str | None, **config: Any) -> Any:
    from megarubric.megatron.messages import WorkerConfig
    from megarubric.megatron.trainer import Trainer

    config = {"bucket_bytes": 1 << 16, "shm_prefix": f"mrhosts-{os.getppid()}", "dtype": "bfloat16"} | config
    worker = WorkerConfig(model_dir=model_dir, init="random", timeout_s=20, **config)
    return Trainer(worker, CurveKeys.load(Path(keys)) if keys else None)


def change(trainer: Any, amount: float) -> None:
    """Every replica alike: a few elements of each tensor, by place in the Hugging Face tensor."""
    import torch

    with torch.no_grad():
        for piece in trainer.pieces:
            rows = torch.arange(piece.hf_index[0].start, piece.hf_index[0].stop)
            some = piece.local[rows % 7 == 3]
            piece.local[rows % 7 == 3] = some + amount


def read_hosts(trainer: Any, version: int) -> list[str]:
    """Publish, and digest what each host's segments hold, by its first rank; the checksum of each host on all ranks."""
    import torch.distributed as dist

    from megarubric.exchange.buckets import Segment, WeightDigest, digest_entries

    sender = trainer.sender
    host = trainer.rank * trainer.config.hosts // trainer.world_size
    sender.begin(version)
    found = WeightDigest()
    for index, entries in enumerate(sender.table.buckets):
        sender.fill(version, index)
        segment = Segment.open(sender.segments[host][index % 2])
        found.update(digest_entries(segment.buffer, entries))
        segment.close()
        trainer.barrier()
    checksum = sender.end(version)
    all_found: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(all_found, found.hexdigest(), group=trainer.control)
    if trainer.rank == 0:
        assert checksum == all_found[0]
    return all_found


def publish(model_dir: str, keys: str | None, config: dict[str, Any], deltas: list[bool]) -> dict[str, Any]:
    """Three versions, each followed by a checksum without publishing: weights as made, a few changed, unchanged."""
    from megarubric.exchange.buckets import SHM_DIR
    from megarubric.exchange.sender import Sender

    trainer = make_trainer(model_dir, keys, **config)
    out: dict[str, Any] = {"checksums": [], "sent": [], "raw": []}
    for delta in deltas:
        trainer.sender.close()
        if delta:
            c = trainer.config
            trainer.sender = Sender(
                trainer.manifest,
                trainer.dtype,
                trainer.pieces,
                group=trainer.control,
                shm_prefix=c.shm_prefix,
                bucket_bytes=c.bucket_bytes,
                hosts=c.hosts,
                keys=CurveKeys.load(Path(keys)) if keys else None,
                delta=True,
                timeout_s=c.timeout_s,
            )
        for version, amount in enumerate((0.0, 1.0 / 64, 0.0)):
            if amount:
                change(trainer, amount)
            out["checksums"].append(read_hosts(trainer, version))
            out["sent"].append(trainer.sender.network_bytes)
            out["raw"].append(trainer.sender.network_raw_bytes)
    again = trainer.sender.checksum()
    out["same"] = trainer.rank != 0 or again == out["checksums"][-1][0]
    trainer.barrier()
    trainer.close()
    trainer_left = list(SHM_DIR.glob(f"{trainer.config.shm_prefix}*")) if trainer.rank == 0 else []
    return out | {"left": [f.name for f in trainer_left]}


@pytest.fixture(scope="module")
def one_rank(ranks, job):
    """What one rank on one host publishes: whole tensors, nothing sent."""
    got = {}
    for tied in ("model_dir", "tied_dir"):
        (got[tied],) = ranks(1, publish, model_dir=job[tied], keys=None, config={}, deltas=[False, True])
        assert got[tied]["sent"] == [0] * 6
    return got


@pytest.mark.parametrize(
    ("config", "share", "model"),
    [
        ({"ep": 2}, 0.0, "model_dir"),  # every host has all: data parallel over hosts
        ({"pp": 2}, 1.0, "model_dir"),  # half a model to each host
        ({"ep": 4}, None, "model_dir"),  # dense layers everywhere, half of the experts to each host
        ({"tp": 2, "pp": 2}, 1.0, "model_dir"),
        ({"pp": 2}, None, "tied_dir"),  # the embedding is on both hosts: on one as a copy
    ],
    ids=["EP2", "PP2", "EP4", "TP2xPP2", "PP2 tied"],
)
def test_both_hosts_hold_what_one_rank_publishes(ranks, job, one_rank, config, share, model):
    results = ranks(
        4, publish, model_dir=job[model], keys=job["keys"], config=config | {"hosts": 2}, deltas=[False, True]
    )
    first, single = results[0], one_rank[model]
    assert [set(c) for c in first["checksums"]] == [set(c) for c in single["checksums"]]  # all ranks of both hosts
    assert len({c[0] for c in first["checksums"]}) == 3  # as made, changed, changed again; and unchanged twice
    assert all(r["same"] for r in results) and first["left"] == []
    assert all(r["sent"] == first["sent"] and r["raw"] == first["raw"] for r in results)
    raw, sent = first["raw"], first["sent"]
    assert len(set(raw)) == 1
    if share == 0.0:
        assert sent == [0] * 6 and raw == [0] * 6
        return
    whole = 2 * sum(_elements(job[model]).values())
    if share is not None:
        assert raw[0] == share * whole
    else:
        assert 0 < raw[0] < whole
    assert all(raw[0] < n < 1.05 * raw[0] for n in sent[:3])  # headers
    assert raw[0] < sent[3] < 1.05 * raw[0] and sent[4] < 0.6 * raw[0] and sent[5] < 0.05 * raw[0]  # one row in seven


def _elements(model_dir: str) -> dict[str, int]:
    from megarubric.megatron.families import family_of, read_config

    hf, where = read_config(model_dir)
    return {name: math.prod(shape) for name, shape in family_of(hf, where).manifest(hf).items()}


def lose_a_rank(model_dir: str, keys: str) -> str:
    """Rank 3 ends before the last bucket; what the others are told."""
    trainer = make_trainer(model_dir, keys, pp=2, hosts=2)
    sender = trainer.sender
    sender.begin(1)
    for index in range(len(sender.table.buckets) - 1):
        sender.fill(1, index)
    if trainer.rank == 3:
        return ""  # the process ends at once, as if killed
    try:
        sender.fill(1, len(sender.table.buckets) - 1)
    except (MegarubricError, RuntimeError) as error:
        told = f"{type(error).__name__}: {error}"
    sender.close()
    return told


def test_a_rank_that_is_gone_is_named(ranks, job):
    """Rank 2, which shares the pipeline stage, may have ended over it before rank 0 or 1 looks."""
    told = ranks(4, lose_a_rank, model_dir=job["model_dir"], keys=job["keys"])
    found = [
        re.fullmatch(r"ProcessDied: trainer rank [23] on host 1 has ended; .* waits for its weights", t) for t in told
    ]
    assert any(found[:2]) and all(told[:3])


def fail_once(model_dir: str, keys: str) -> dict[str, Any]:
    """Rank 0 loses what it keeps of the last version: a delta cannot be applied there."""
    trainer = make_trainer(model_dir, keys, pp=2, hosts=2, exchange_delta=True)
    first = read_hosts(trainer, 1)
    if trainer.rank == 0:
        trainer.sender._kept.forget()
    try:
        read_hosts(trainer, 2)
        told = ""
    except MegarubricError as error:
        told = f"{type(error).__name__}: {error}"
    again = read_hosts(trainer, 3)
    raw, sent = trainer.sender.network_raw_bytes, trainer.sender.network_bytes
    trainer.close()
    return {"told": told, "same": again == first, "whole": sent > raw}


def test_a_fault_of_one_rank_is_told_to_all_and_the_next_version_is_sent_whole(ranks, job):
    results = ranks(4, fail_once, model_dir=job["model_dir"], keys=job["keys"])
    assert all(r["same"] and r["whole"] for r in results)
    line = r"rectangle \d+: a delta from 1 to 2, here is 0"
    assert re.fullmatch(f"DeltaError: {line}", results[0]["told"])
    assert all(re.fullmatch(f"PublishError: trainer rank 0: {line}", r["told"]) for r in results[1:])


def test_several_hosts_need_keys(ranks, job):
    assert (
        ranks(2, without_keys, model_dir=job["model_dir"])
        == ["trainer: keys: ranks on several hosts need the run's keys: --keys FILE"] * 2
    )
    assert ranks(1, without_keys, model_dir=job["model_dir"]) == ["trainer: hosts: 2 hosts for 1 ranks"]


def without_keys(model_dir: str) -> str:
    try:
        make_trainer(model_dir, None, hosts=2)
    except BadInput as error:
        return str(error)
    return ""
