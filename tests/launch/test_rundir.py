"""Run directories: one owner, checkpoints found newest first, old runs kept aside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from megarubric.errors import BadInput
from megarubric.evaluate.summary import Summary
from megarubric.launch.rundir import RunState, claim


def test_one_owner(tmp_path: Path) -> None:
    code = (
        "import sys; from megarubric.launch.rundir import claim\n"
        "with claim(sys.argv[1], 'r', False):\n    print('held', flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", code, str(tmp_path)]
    holder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdin and holder.stdout.readline() == "held\n"
    with pytest.raises(BadInput, match=f"under way in process {holder.pid}"), claim(str(tmp_path), "r", False):
        pass
    holder.kill()  # a dead owner holds nothing
    holder.communicate()
    with claim(str(tmp_path), "r", False) as run:
        assert run.path == tmp_path / "r"


def test_fresh_moves_the_old_run_aside(tmp_path: Path) -> None:
    for n in range(3):
        with claim(str(tmp_path), "r", fresh=True) as run:
            assert not run.checkpoint_steps()
            run.checkpoint_path(n + 1).mkdir(parents=True)
    assert (tmp_path / "r.old-1/checkpoints/step_1").is_dir()
    assert (tmp_path / "r.old-2/checkpoints/step_2").is_dir()
    with claim(str(tmp_path), "r", fresh=False) as run:
        assert run.checkpoint_steps() == [3]


def test_newest_first_and_pruned(tmp_path: Path) -> None:
    with claim(str(tmp_path), "r", False) as run:
        for step in (2, 10, 4):
            run.checkpoint_path(step).mkdir(parents=True)
        (run.checkpoints / "step_11.tmp").mkdir()
        assert run.checkpoint_steps() == [10, 4, 2]
        run.prune(1, best=2)
        assert run.checkpoint_steps() == [10, 2]
        run.prune(1)
        assert run.checkpoint_steps() == [10]


def test_the_best_evaluation_is_remembered() -> None:
    state = RunState()
    found = []
    for state.step, reward in enumerate([float("nan"), 0.4, 0.3, 0.4, 0.5, float("nan")], 1):
        found.append(state.note(Summary(1, reward, 1.0, 0.0, 0.0, 9.0, {})))
    assert found == [False, True, False, False, True, False]
    assert state.best == (5, 0.5)
    assert msgspec.json.decode(msgspec.json.encode(state), type=RunState).best == (5, 0.5)


def test_state_survives_json() -> None:
    state = RunState(step=3, version=3, data={"epoch": 1}, criterion_means={"sums": {"a": 0.1}}, fit={"k": "v"})
    assert msgspec.json.decode(msgspec.json.encode(state), type=RunState) == state


def test_open_groups_go_with_their_checkpoint(tmp_path: Path) -> None:
    with claim(str(tmp_path), "r", False) as run:
        for step in (1, 2, 3):
            run.checkpoint_path(step).mkdir(parents=True)
            run.carry_path(step).write_bytes(b"")
        assert run.checkpoint_steps() == [3, 2, 1]
        run.prune(keep=1, best=1)
        assert run.checkpoint_steps() == [3, 1]
        assert [run.carry_path(step).exists() for step in (1, 2, 3)] == [True, False, True]
