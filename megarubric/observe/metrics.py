"""Where a run's numbers go: metrics.jsonl, Weights & Biases, one line a step on the terminal."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megarubric.config.schema import Wandb


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


def _open_wandb(run_dir: Path, wandb: Wandb, run_name: str, config: Mapping[str, Any]) -> Any:
    if wandb.mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb as wb

    id_file = run_dir / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
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
        settings=wb.Settings(silent=True, console="off", x_disable_stats=True),
    )
    for family in ("train", "reward", "judge", "veto", "criterion", "perf", "eval", "rollout"):
        run.define_metric(f"{family}/*", step_metric="train/step")
    return run
