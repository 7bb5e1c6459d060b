"""One engine for a verb that needs nothing else: a judge for `score` and `eval --suite judge`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from megarubric.judging.backends import Dtype, context_length, serving_dtype
from megarubric.launch import plan
from megarubric.launch.supervisor import Supervisor
from megarubric.launch.system import System
from megarubric.rollout.client import EngineClient
from megarubric.rollout.messages import EngineConfig


@asynccontextmanager
async def judge_engine(
    model_dir: Path,
    device: Literal["cpu", "cuda"] = "cpu",
    *,
    dtype: Dtype | None = None,
    structured_output: bool = False,
) -> AsyncIterator[EngineClient]:
    """An engine that serves `model_dir` as a judge while the block lasts; its log goes with it.

    `device` is where scores are aggregated; the engine takes a GPU when there is one. `dtype` None is
    `judging.backends.serving_dtype`. Raises ProcessDied with the engine's last words when it cannot start.
    """
    plan.read_hf_config(str(model_dir))
    context = min(context_length(model_dir) or 4096, 8192)
    with tempfile.TemporaryDirectory(prefix="megarubric-") as name:
        system = System(Supervisor(Path(name) / "logs"), plan.socket_dir(Path(name)))
        try:
            config = EngineConfig(
                model_dir=str(model_dir),
                role="judge",
                dtype=dtype or serving_dtype(model_dir),
                max_model_len=context,
                threads=os.cpu_count() or 1,
                structured_output=structured_output,
            )
            engine = system.start_engine("judge", config)
            system.judge_engines.append(engine)
            await system.ready()
            yield engine
        finally:
            await system.close()
