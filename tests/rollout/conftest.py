"""A real engine process for the tests of this package, started once."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megarubric.launch.supervisor import last_words
from megarubric.rollout.client import EngineClient

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

Run = Callable[[Awaitable[Any]], Any]


class Engine:
    """An engine process and its client. `model_dir` is what it serves at present, `version` under which number."""

    def __init__(self, directory: Path, model_dir: Path, **settings: object) -> None:
        self.model_dir, self.version = model_dir, 0
        self.log = directory / "engine.log"
        config = directory / "engine.json"
        defaults = {
            "dtype": "float32",
            "max_model_len": 256,
            "max_num_seqs": 32,
            "block_size": 32,
            "kv_cache_gib": 0.05,
        }
        config.write_text(json.dumps({"model_dir": str(model_dir), **defaults, **settings}))
        endpoint = f"ipc://{directory}/engine"
        command = [sys.executable, "-m", "megarubric.rollout.engine", "--endpoint", endpoint, "--config", str(config)]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        self.endpoint = endpoint
        self.client = EngineClient(endpoint, peer_status=self.status)

    def status(self) -> str | None:
        code = self.process.poll()
        return None if code is None else f"engine ended with status {code}: {last_words(self.log)}"

    def stop(self) -> int:
        """End the process by SIGTERM, by force if need be; its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@pytest.fixture(scope="session")
def run() -> Iterator[Run]:
    """Runs coroutines on one event loop, to which the session's clients belong."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three random models of the same shape."""
    from tiny_moe import make_model  # imports torch and transformers: only for the tests that need a model

    return [make_model(tmp_path_factory.mktemp(f"model{i}"), seed=i) for i in range(3)]


@pytest.fixture(scope="session")
def tied_models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three random models whose output head is their embedding matrix."""
    from tiny_moe import make_model

    return [make_model(tmp_path_factory.mktemp(f"tied{i}"), seed=10 + i, tied=True) for i in range(3)]


@pytest.fixture
def socket_directory() -> Iterator[Path]:
    """A directory whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="mr-") as directory:
        yield Path(directory)


def serve(run: Run, model_dir: Path, **settings: object) -> Iterator[Engine]:
    """A running engine; when the tests are through it must end cleanly on SIGTERM."""
    with tempfile.TemporaryDirectory(prefix="mr-") as directory:
        engine = Engine(Path(directory), model_dir, **settings)
        try:
            run(engine.client.ready(timeout_s=180))
            yield engine
            run(engine.client.close())
        finally:
            status = engine.stop()
        assert status == 0, f"SIGTERM: engine ended with status {status}"


@pytest.fixture(scope="session")
def engine(run: Run, tiny_models: list[Path]) -> Iterator[Engine]:
    """A policy engine in float32; tests that update its weights keep `model_dir` and `version` in step."""
    yield from serve(run, tiny_models[0], capture_routing=True)


@pytest.fixture(scope="module")
def direct_engine(run: Run, tied_models: list[Path]) -> Iterator[Engine]:
    """An engine that loads buckets as they come, without a copy of its own; its model's head is tied."""
    yield from serve(run, tied_models[0], staging="direct", role="judge")
