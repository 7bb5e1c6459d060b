"""Settings shared by all tests, and `ranks`: run a function of a test file on N real gloo ranks."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import megarubric

# No per-example deadline: shared machines make time meaningless as a verdict.
settings.register_profile("megarubric", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("megarubric")

# Several processes share the cores; tests that start engines say how many threads those get.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_SILENT", "true")

# Rank jobs find modules beside the rank server; tests find them here (importmode importlib adds no path).
sys.path.insert(0, str(Path(__file__).parent / "megatron"))

Ranks = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """``ranks(world, function, timeout_s=240, **kwargs)``: arguments and results are JSON.

    The function runs in its own copy of the test file, in a fresh process a rank, with RANK, WORLD_SIZE and the
    rendezvous set; a failing or stuck rank fails the test with the end of its log, and no process is left.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join([str(Path(megarubric.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    log = tmp_path_factory.mktemp("ranks") / "server.log"
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "megatron" / "rank_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log.open("w"),
        text=True,
        env=environment,
    )
    assert server.stdin is not None and server.stdout is not None

    def run(world: int, function: Callable[..., Any], *, timeout_s: float = 240, **kwargs: Any) -> list[Any]:
        scratch = tmp_path_factory.mktemp(function.__name__)
        job = {
            "world": world,
            "file": inspect.getsourcefile(function),
            "function": function.__name__,
            "kwargs": kwargs,
            "timeout_s": timeout_s,
            "scratch": str(scratch),
        }
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        line = server.stdout.readline()
        if not line:
            pytest.fail(f"the rank server ended\n{log.read_text()[-6000:]}")
        answer = json.loads(line)
        if "error" in answer:
            pytest.fail(answer["error"])
        return answer["results"]

    yield run
    server.stdin.close()
    try:
        server.wait(timeout=10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
