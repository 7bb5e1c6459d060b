"""A real engine process for the tests of this package, started once."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tiny_moe import make_model, write_config

from megarubric.launch.supervisor import last_words
from megarubric.rollout.client import EngineClient

Run = Callable[[Awaitable[Any]], Any]


class Engine:
    """An engine process and its client. `model_dir` is what it serves at present, `version` under which number."""

    def __init__(self, directory: Path, model_dir: Path, **settings: object) -> None:
        self.model_dir, self.version = model_dir, 0
        self.log = directory / "engine.log"
        config = write_config(
            directory / "engine.json",
            **{
                "model_dir": str(model_dir),
                "dtype": "float32",
                "max_model_len": 256,
                "max_num_seqs": 32,
                "block_size": 32,
                "kv_cache_gib": 0.05,
                **settings,
            },
        )
        endpoint = f"ipc://{directory}/engine"
        command = [sys.executable, "-m", "megarubric.rollout.engine", "--endpoint", endpoint, "--config", str(config)]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        self.endpoint = endpoint
        self.client = EngineClient(endpoint, peer_status=self.status)

    def status(self) -> str | None:
        code = self.process.poll()
        return None if code is None else f"engine ended with status {code}: {last_words(self.log)}"

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="session")
def run() -> Iterator[Run]:
    """Runs coroutines on one event loop, to which the session's clients belong."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three random models of the same shape."""
    return [make_model(tmp_path_factory.mktemp(f"model{i}"), seed=i) for i in range(3)]


@pytest.fixture
def socket_directory() -> Iterator[Path]:
    """A directory whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="mr-") as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def engine(run: Run, tiny_models: list[Path]) -> Iterator[Engine]:
    """A policy engine in float32; tests that update its weights keep `model_dir` and `version` in step."""
    with tempfile.TemporaryDirectory(prefix="mr-") as directory:
        engine = Engine(Path(directory), tiny_models[0])
        try:
            run(engine.client.ready(timeout_s=float(os.environ.get("MEGARUBRIC_TEST_START_S", "180"))))
            yield engine
            run(engine.client.close())
        finally:
            engine.stop()
