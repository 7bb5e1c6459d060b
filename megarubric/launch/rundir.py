"""The run directory: who owns it, what a resumed run finds in it, which checkpoint is the last whole one."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from megarubric.errors import BadInput
from megarubric.evaluate.summary import Summary
from megarubric.observe.files import whole_file

_STEP = re.compile(r"step_(\d+)")


class RunState(msgspec.Struct, kw_only=True):
    """What the controller must remember to go on, kept inside each checkpoint as JSON.

    `step` steps are done; `version` is the weight version they made; `data` is the prompt set's position; `before` is
    the held-out summary of the untrained policy; `best` the step of the best held-out reward so far, and that reward;
    `criterion_means` feeds objective-wise advantages; `carry` is the digest of the checkpoint's `carry_path`, where
    groups were left open. `fit` names what a checkpoint and the configuration must agree
    on.
    """

    step: int = 0
    version: int = 0
    data: dict[str, int] = {}
    before: Summary | None = None
    best: tuple[int, float] | None = None
    criterion_means: dict[str, dict[str, float]] = {}
    carry: str = ""
    fit: dict[str, str] = {}

    def note(self, summary: Summary) -> bool:
        """Whether this step's held-out reward is the best so far, which is then remembered."""
        if math.isnan(summary.reward) or (self.best is not None and summary.reward <= self.best[1]):
            return False
        self.best = (self.step, summary.reward)
        return True


class RunDir:
    """``runs/NAME``; open it with `claim`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.rollouts = path / "rollouts"
        self.logs = path / "logs"

    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoints / f"step_{step}"

    def carry_path(self, step: int) -> Path:
        """Groups that a checkpoint's step left open (rollout/carry.py)."""
        return self.checkpoints / f"step_{step}.open_groups.safetensors"

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a checkpoint directory, newest first (whether each is whole is for its reader to say)."""
        if not self.checkpoints.is_dir():
            return []
        found = [int(m[1]) for p in self.checkpoints.iterdir() if (m := _STEP.fullmatch(p.name)) and p.is_dir()]
        return sorted(found, reverse=True)

    def prune(self, keep: int, best: int | None = None) -> None:
        """Delete all but the newest `keep` checkpoints, and that of step `best`."""
        for step in self.checkpoint_steps()[keep:]:
            if step != best:
                shutil.rmtree(self.checkpoint_path(step), ignore_errors=True)
                self.carry_path(step).unlink(missing_ok=True)

    def write_config(self, text: str) -> None:
        with whole_file(self.path / "config.yaml") as f:
            f.write(text)


def aside(path: Path) -> Path | None:
    """Move an existing run directory to the first free ``NAME.old-N``; nothing is deleted. Returns the new place."""
    if not path.exists():
        return None
    n = 1
    while (target := path.with_name(f"{path.name}.old-{n}")).exists():
        n += 1
    path.rename(target)
    return target


@contextlib.contextmanager
def claim(runs_dir: str, name: str, fresh: bool) -> Iterator[RunDir]:
    """Open a run directory for this process alone.

    Raises BadInput when another process holds it, naming the process.
    """
    path = Path(runs_dir) / name
    path.mkdir(parents=True, exist_ok=True)
    with (path / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise BadInput(path, None, f"the run is under way in process {holder}") from None
        if fresh and any(p.name != "lock" for p in path.iterdir()):
            aside(path)
            path.mkdir(parents=True)
            lock_path = path / "lock"
            with lock_path.open("a+") as new_lock:
                fcntl.flock(new_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield from _held(path, new_lock)
            return
        yield from _held(path, lock)


def _held(path: Path, lock) -> Iterator[RunDir]:  # type: ignore[no-untyped-def]
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    yield RunDir(path)
