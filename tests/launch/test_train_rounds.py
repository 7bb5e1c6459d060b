"""`megarubric train` with dynamic sampling and partial rollouts, whole; then from a checkpoint in the middle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS, PER_STEP, SAMPLES = 4, 4, 3
THINGS = ("taxi", "ferry", "drum", "trouble", "visitor", "bicycle", "parcel", "garden", "window")
pytestmark = pytest.mark.engine


def prompts(path: Path) -> Path:
    """Rubrics that a program alone decides, yes or no: of three answers all are often alike."""
    rows = [
        {
            "id": f"t.note-{i}", "version": 1, "title": "A note", "scope": "instance", "family": "social",
            "provenance": {"author": "human", "source": "test", "licence": "Apache-2.0"},
            "prompt": f"Write a note to our neighbour Bruno about the {what}. It should have 20 to 40 words.",
            "criteria": [{"id": "length", "description": "Fewer than 30 words.", "weight": 1.0, "check": {
                "kind": "length_constraints:number_words", "relation": "less than", "num_words": 30}}],
        }
        for i, what in enumerate(THINGS)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(runs: Path, name: str) -> subprocess.CompletedProcess[str]:
    options = [
        f"runs_dir={runs}", f"name={name}", f"train.steps={STEPS}", "train.warmup_steps=0", "judge.kind=none",
        f"data.train={prompts(runs / 'notes.jsonl')}",
        f"rollout.prompts_per_step={PER_STEP}", f"rollout.samples_per_prompt={SAMPLES}", "rollout.max_new_tokens=64",
        "rollout.dynamic_rounds=3", "rollout.oversample=1.75", "rollout.max_staleness=1",
        "reward.advantage=objective_wise", "reward.gamma=1", "data.heldout=null", "checkpoint.every=1",
        "checkpoint.keep=9", "checkpoint.export_hf=false", "wandb.mode=disabled",
    ]  # fmt: skip
    argv = [sys.executable, "-m", "megarubric", "train", str(ROOT / "configs/quickstart.yaml"), *options]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def metrics(directory: Path) -> dict[int, dict]:
    return {row["step"]: row for row in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    train(runs, "whole")
    return runs / "whole"


def test_batches_are_whole_and_older_tokens_known(whole: Path) -> None:
    rows, used_versions, drift = metrics(whole), Counter[int](), []
    for step in range(1, STEPS + 1):
        lines = (whole / f"rollouts/step_{step}.jsonl").read_text().splitlines()
        answers = [json.loads(line) for line in lines]
        used = [a for a in answers if a["used"]]
        assert len(used) == PER_STEP * SAMPLES and len({a["group"] for a in used}) == PER_STEP
        dropped = len({a["group"] for a in answers}) - PER_STEP
        assert rows[step]["rollout/dropped_groups"] == dropped and rows[step]["rollout/rounds"] <= 3
        older = sum(a["first_version"] < step - 1 for a in answers)
        assert rows[step]["rollout/carried_samples"] == older
        assert all(step - 2 <= a["first_version"] <= a["weight_version"] <= step - 1 for a in answers)
        used_versions.update(step - 1 - a["first_version"] for a in used)
        assert all(len(a["token_ids"]) == len(a["logprobs"]) for a in answers)
        drift.append(rows[step].get("train/logprob_abs_diff"))
    assert used_versions[1] > 0, "answers that two versions wrote are trained on"
    assert sum(rows[step]["rollout/aborted_tokens"] for step in rows) > 0
    assert max(rows[step]["rollout/rounds"] for step in rows) > 1
    assert sum(rows[step]["train/skipped"] for step in rows) <= 1, "hardly a step without anything to learn"
    measured = [x for x in drift if x is not None]  # on answers of the present version alone
    assert measured and max(measured) < 1e-4


def test_going_on_from_a_checkpoint_gives_the_same_bits(whole: Path) -> None:
    """From what a kill after step 2 leaves: answers, batches' metrics and what is left open are those of the run that
    went through."""
    again = whole.parent / "again"
    (again / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints/step_2", again / "checkpoints/step_2")
    left_open = "checkpoints/step_2.open_groups.safetensors"
    shutil.copy(whole / left_open, again / left_open)
    shutil.copy(whole / "metrics.jsonl", again / "metrics.jsonl")
    assert "resumed from" in train(whole.parent, "again").stdout
    a, b = metrics(whole), metrics(again)
    for step in range(3, STEPS + 1):
        names = [name for name in a[step] if not name.startswith("perf/")]
        assert {n: a[step][n] for n in names} == {n: b[step][n] for n in names}, f"step {step}"
        path = f"rollouts/step_{step}.jsonl"
        assert (whole / path).read_bytes() == (again / path).read_bytes()
    last = f"checkpoints/step_{STEPS}.open_groups.safetensors"
    assert (whole / last).read_bytes() == (again / last).read_bytes()
