"""Where a run's numbers go: metrics.jsonl, Weights & Biases, one line a step on the terminal."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megarubric.config.schema import Wandb
from megarubric.errors import BadInput

# Seconds for W&B's own process to start. It starts beside engines and trainer ranks that use every core: its own
# limit of 30 s is too short for that.
WANDB_START_S = 300.0


class MetricsLog:
    """Appends one JSON object a step to ``metrics.jsonl`` and mirrors it to W&B.

    A run that goes on after `done` steps drops the lines of later steps (left by a run that ended between
    checkpoints) on opening, so that its file reads as if it had never stopped.
    """

    def __init__(self, run_dir: Path, wandb: Wandb, run_name: str, config: Mapping[str, Any], done: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines(True) if done and _step_of(line) <= done]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(kept))
            os.replace(temporary, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._wandb = _open_wandb(run_dir, wandb, run_name, config)

    def log(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Write one step. NaN and infinity become null: the file stays JSON."""
        clean = {k: (v if v is None or math.isfinite(v) else None) for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log({"train/step": step, **{k: v for k, v in clean.items() if v is not None}})

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a half-written last line


def check_wandb(wandb: Wandb) -> None:
    """Ask W&B whether the key is good, before anything is started, when runs are logged online. Raises BadInput."""
    if wandb.mode != "online":
        return
    with _wandb_errors(wandb) as wb:
        if not wb.login(prompt=False):
            raise BadInput("config", "wandb.mode=online", "no API key: set WANDB_API_KEY, or log offline")


@contextmanager
def _wandb_errors(wandb: Wandb) -> Iterator[Any]:
    """The module wandb, with its service told to take its time; its errors become BadInput."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb as wb

    try:
        wb.setup(settings=wb.Settings(x_service_wait=WANDB_START_S))  # what `init` is given comes too late for it
        yield wb
    except wb.Error as error:
        raise BadInput("config", f"wandb.mode={wandb.mode}", f"W&B does not start: {error}") from error


def _open_wandb(run_dir: Path, wandb: Wandb, run_name: str, config: Mapping[str, Any]) -> Any:
    if wandb.mode == "disabled":
        return None
    id_file = run_dir / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    with _wandb_errors(wandb) as wb:
        run = wb.init(
            mode=wandb.mode,
            project=wandb.project,
            entity=wandb.entity,
            group=wandb.group,
            name=run_name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(run_dir),
            config=dict(config),
            settings=wb.Settings(silent=True, console="off", x_disable_stats=True, init_timeout=WANDB_START_S),
        )
    for family in ("train", "reward", "judge", "veto", "criterion", "perf", "eval", "rollout"):
        run.define_metric(f"{family}/*", step_metric="train/step")
    return run
