"""`megarubric score`: the arguments, and a judge engine of its own when the judge is a model directory."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from megarubric.exchange.rpc import ipc_endpoint
from megarubric.judging.score import Device
from megarubric.judging.verb import run_score
from megarubric.launch import plan
from megarubric.launch.supervisor import Supervisor
from megarubric.rollout.client import EngineClient
from megarubric.rollout.messages import EngineConfig

_MOST_CONTEXT = 8192  # tokens of judge prompt; more would only take KV cache from the batch


def run_score_verb(a: argparse.Namespace) -> int:
    """The verb; returns the exit status."""
    return run_score(Path(a.rubrics), Path(a.responses), Path(a.out), a.judge, a.device, engine_factory=judge_engine)


@contextlib.asynccontextmanager
async def judge_engine(model_dir: Path, device: Device) -> AsyncIterator[EngineClient]:
    """An engine process that serves `model_dir` as a judge; ended on exit, with its logs. Raises ProcessDied."""
    hf = plan.read_hf_config(str(model_dir))
    threads = os.cpu_count() or 1
    config = EngineConfig(
        model_dir=str(model_dir),
        role="judge",
        dtype="bfloat16" if device == "cuda" else "float32",
        max_model_len=min(int(hf.get("max_position_embeddings", _MOST_CONTEXT)), _MOST_CONTEXT),
        gpu_memory_utilization=0.8,
        threads=threads,
    )
    with (
        tempfile.TemporaryDirectory(prefix="megarubric-") as directory,
        Supervisor(Path(directory) / "logs") as children,
    ):
        endpoint = ipc_endpoint(Path(directory), "judge")
        path = plan.write_json(Path(directory) / "judge.json", config)
        child = children.start("judge", plan.command("engine", path, endpoint), plan.quiet_environment(threads))
        client = EngineClient(endpoint, peer_status=child.status)
        try:
            await client.ready()
            yield client
        finally:
            await client.close()
