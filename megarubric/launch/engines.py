"""One engine for a verb that needs nothing else: a judge for `score` and `eval --suite judge`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from megarubric.launch import plan
from megarubric.launch.supervisor import Supervisor
from megarubric.launch.system import System
from megarubric.rollout.client import EngineClient
from megarubric.rollout.messages import EngineConfig


@asynccontextmanager
async def judge_engine(model_dir: Path, device: Literal["cpu", "cuda"] = "cpu") -> AsyncIterator[EngineClient]:
    """An engine that serves `model_dir` as a judge while the block lasts; its log goes with it.

    `device` is where scores are aggregated; the engine takes a GPU when there is one. Raises ProcessDied with the
    engine's last words when it cannot start.
    """
    hf = plan.read_hf_config(str(model_dir))
    context = min(int(hf.get("max_position_embeddings", 4096)), 8192)
    with tempfile.TemporaryDirectory(prefix="megarubric-") as name:
        system = System(Supervisor(Path(name) / "logs"), plan.socket_dir(Path(name)))
        try:
            dtype: Literal["float32", "bfloat16"] = "float32" if hf["hidden_size"] < 1024 else "bfloat16"
            config = EngineConfig(
                model_dir=str(model_dir), role="judge", dtype=dtype, max_model_len=context, threads=os.cpu_count() or 1
            )
            system.judge_engine = system.start_engine("judge", config)
            await system.ready()
            yield system.judge_engine
        finally:
            await system.close()
