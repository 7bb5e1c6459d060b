"""Who starts when on a GPU. Engines and trainer are stand-ins: what is looked at is the order."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from megarubric.config import load_train
from megarubric.launch import plan
from megarubric.launch.system import System, running


@pytest.mark.parametrize("gpu", [True, False])
def test_nothing_starts_while_an_engine_measures_its_gpu(
    gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    class Part:
        device = "cuda:0" if gpu else "cpu"

        def __init__(self, name: str) -> None:
            self.name = name
            done.append(f"start {name}")

        async def ready(self) -> None:
            await asyncio.sleep(0)
            done.append(f"ready {self.name}")

        async def sleep(self, level: int) -> None:
            done.append(f"sleep {self.name}")

        async def describe(self) -> SimpleNamespace:
            return SimpleNamespace(device=self.device)

        async def close(self) -> None: ...

    monkeypatch.setattr(plan, "on_gpu", lambda: gpu)
    monkeypatch.setattr(System, "start_engine", lambda self, name, config, index=0: Part(name))
    monkeypatch.setattr(System, "start_trainer", lambda self, config, ranks, port: Part("trainer"))

    async def work() -> None:
        c = load_train("configs/smoke.yaml", [])
        async with running(c, tmp_path, plan.train_worker_config(c)) as system:
            assert system.shares_devices == gpu

    asyncio.run(work())
    if gpu:
        turns = ["start policy-0", "ready policy-0", "start judge", "ready judge", "sleep policy-0", "sleep judge"]
        assert [d for d in dict.fromkeys(done) if "trainer" not in d] == turns
        assert done.index("start trainer") > done.index("sleep judge")
    else:
        assert done[:3] == ["start trainer", "start policy-0", "start judge"]
