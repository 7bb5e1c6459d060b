"""`megarubric train` on two hosts, whole: two starts of the same command that meet as hosts of one run do.

Both are this machine, which is what a test can have; docs/slurm.md says what was run under Slurm with two nodes. The
model lies over both (pp 2), so half of every weight version crosses.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megarubric.config import load_train
from megarubric.launch.hosts import NODE, SESSION
from megarubric.launch.network import received_bytes

ROOT = Path(__file__).resolve().parents[2]
TWO = ["parallel.nodes=2", "parallel.ranks=2", "parallel.pp=2", "parallel.interface=lo", "rollout.engines=2"]
SMALL = [
    "judge.kind=policy",  # on both engines
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "rollout.max_new_tokens=40",
    "evaluate.limit=2",
    "evaluate.samples_per_prompt=2",
    "checkpoint.every=2",
    "wandb.mode=disabled",
]
pytestmark = pytest.mark.engine


def start(runs: Path, node: int, *overrides: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "megarubric", "train", "configs/quickstart.yaml", f"runs_dir={runs}"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    env |= {NODE: str(node), SESSION: "test"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*argv, *SMALL, *overrides], cwd=ROOT, env=env, **pipes)  # type: ignore[call-overload]


def metrics(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_host_is_lost_and_the_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "quickstart"
    controller, agent = start(tmp_path, 0, *TWO, "train.steps=200"), start(tmp_path, 1, *TWO, "train.steps=200")
    try:
        deadline = time.monotonic() + 200
        while not (run / "checkpoints/step_2").is_dir():
            assert controller.poll() is None and agent.poll() is None, controller.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        there = json.loads((run / "logs/processes-host1.json").read_text())
        assert sorted(there) == ["policy-1", "trainer-1"]
        os.kill(there["trainer-1"], signal.SIGKILL)
        words = controller.communicate(timeout=60)[0]
        agent_words = agent.communicate(timeout=60)[0]
    finally:
        controller.kill()
        agent.kill()
    last = words.strip().splitlines()[-1]
    assert controller.returncode == 3 and agent.returncode == 0
    assert "host 1 (" in last and "trainer-1 was killed by SIGKILL" in last and "the same command goes on" in last
    assert "host 1: done" in agent_words
    assert not any(Path(f"/proc/{pid}").exists() for pid in there.values())
    assert not (run / "hosts/test").exists()

    rows = metrics(run)
    config = load_train(str(ROOT / "configs/quickstart.yaml"), TWO)
    model = json.loads((ROOT / config.model.path / "config.json").read_text())
    expected = sum(received_bytes(model, config.parallel, config.model.dtype))
    assert expected == rows[1]["perf/exchange_bytes"]  # one half to each host
    for row in rows[1:]:
        assert expected <= row["perf/exchange_network_bytes"] <= 1.01 * expected
        assert row["train/logprob_abs_diff"] < 1e-4

    # One host, one rank, one engine: the checkpoint of two hosts and two pipeline stages goes on there.
    saved = max(int(p.name.removeprefix("step_")) for p in (run / "checkpoints").iterdir() if p.is_dir())
    alone = start(tmp_path, 0, f"train.steps={saved + 2}")
    words = alone.communicate(timeout=200)[0]
    assert alone.returncode == 0 and f"resumed from {run}/checkpoints/step_{saved}" in words, words
    row = metrics(run)[-1]
    assert row["step"] == saved + 2 and row["train/logprob_abs_diff"] < 1e-4
    assert "perf/exchange_network_bytes" not in row
