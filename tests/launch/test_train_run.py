"""`megarubric train`, whole: real trainer, real engines, the shipped tiny model; then killed, resumed and compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
SMALL = [
    f"train.steps={STEPS}",
    "train.warmup_steps=0",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "rollout.max_new_tokens=48",
    "evaluate.limit=3",
    "evaluate.samples_per_prompt=2",
    "checkpoint.every=2",
    "algorithm.updates_per_step=2",
    "algorithm.kl_coef=0.01",
    "algorithm.name=gspo",
]
pytestmark = pytest.mark.engine


def command(runs: Path, *overrides: str) -> list[str]:
    config = str(ROOT / "configs/quickstart.yaml")
    return [sys.executable, "-m", "megarubric", "train", config, f"runs_dir={runs}", *SMALL, *overrides]


def start(runs: Path, *overrides: str) -> subprocess.Popen[str]:
    argv = command(runs, *overrides)
    return subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def run(runs: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(runs, *overrides), cwd=ROOT, capture_output=True, text=True, timeout=300)


def metrics(directory: Path) -> dict[int, dict]:
    path = directory / "metrics.jsonl"
    if not path.exists():
        return {}
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return {row["step"]: row for row in rows}


def processes_of(marker: str) -> set[int]:
    """Living processes whose command line names `marker` (a run's own directory)."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if marker.encode() in line and state != "Z" and int(entry.name) != os.getpid():
                found.add(int(entry.name))
    return found


def wait_until(condition, seconds: float):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    return condition()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run with its rollouts, and what it printed."""
    runs = tmp_path_factory.mktemp("runs")
    done = run(runs, "name=whole")
    assert done.returncode == 0, done.stdout + done.stderr
    return runs / "whole", done.stdout


def test_a_run_leaves_what_the_contract_names(recorded: tuple[Path, str]) -> None:
    directory, printed = recorded
    rows = metrics(directory)
    assert sorted(rows) == list(range(STEPS + 1))
    for name in ("reward/mean", "reward/valid_fraction", "judge/unread_fraction", "veto/rate", "criterion/length/mean",
                 "perf/step_s", "perf/rollout_s", "perf/judge_s", "perf/train_s", "perf/exchange_s",
                 "perf/exchange_bytes", "train/kl", "train/logprob_abs_diff"):  # fmt: skip
        assert name in rows[1], name
    assert (directory / "config.yaml").exists() and (directory / "logs/trainer-0.log").exists()
    assert (directory / "model/model.safetensors").exists() and list((directory / "wandb").iterdir())
    answers = [json.loads(line) for line in (directory / "rollouts/step_3.jsonl").read_text().splitlines()]
    assert len(answers) == 16 and {a["weight_version"] for a in answers} == {2}
    assert "held-out reward before" in printed and str(directory) in printed


def test_the_first_step_is_exactly_on_policy(recorded: tuple[Path, str]) -> None:
    rows = metrics(recorded[0])
    assert rows[1]["train/kl"] == 0.0
    assert rows[1]["train/logprob_abs_diff"] < 1e-4
    assert rows[STEPS]["train/logprob_abs_diff"] < 1e-4  # after as many exchanges


def test_kill_9_of_the_controller_then_resume_gives_the_same_losses(recorded: tuple[Path, str]) -> None:
    """With rollouts replayed, the resumed run's numbers equal the uninterrupted run's bit for bit."""
    whole = recorded[0]
    runs = whole.parent
    replay = ["name=killed", f"rollout.replay={whole / 'rollouts'}"]
    controller = start(runs, *replay)
    assert wait_until(lambda: (runs / "killed/checkpoints/step_2").is_dir(), 120)
    controller.kill()
    controller.communicate()
    assert wait_until(lambda: not processes_of(str(runs / "killed")), 15), "orphans"
    resumed = run(runs, *replay)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resumed from" in resumed.stdout
    a, b = metrics(whole), metrics(runs / "killed")
    names = [n for n in a[1] if n.startswith(("train/", "reward/", "veto/", "criterion/"))]
    for step in range(1, STEPS + 1):
        assert {n: a[step].get(n) for n in names} == {n: b[step].get(n) for n in names}, f"step {step}"


def test_kill_9_of_a_trainer_rank_ends_the_run_with_status_3_and_no_orphans(recorded: tuple[Path, str]) -> None:
    whole = recorded[0]
    runs = whole.parent
    replay = ["name=rank", f"rollout.replay={whole / 'rollouts'}", "parallel.ranks=2", "parallel.ep=2", "train.steps=6"]
    controller = start(runs, *replay)
    assert wait_until(lambda: (runs / "rank/checkpoints/step_2").is_dir(), 120)
    pids = json.loads((runs / "rank/logs/processes.json").read_text())
    os.kill(pids["trainer-1"], signal.SIGKILL)
    _, error = controller.communicate(timeout=60)
    assert controller.returncode == 3, error
    assert (
        len(error.strip().splitlines()) == 1
        and "trainer-1 was killed by SIGKILL" in error
        and "goes on from there" in error
    )
    assert not processes_of(str(runs / "rank")), "orphans"


def test_sigterm_saves_and_exits_3(recorded: tuple[Path, str]) -> None:
    whole = recorded[0]
    runs = whole.parent
    replay = ["name=term", f"rollout.replay={whole / 'rollouts'}", "checkpoint.every=0"]
    controller = start(runs, *replay)
    assert wait_until(lambda: metrics(runs / "term"), 120)
    controller.terminate()
    _, error = controller.communicate(timeout=60)
    assert controller.returncode == 3, error
    assert "the same command goes on" in error and list((runs / "term/checkpoints").glob("step_*"))
