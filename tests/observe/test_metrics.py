"""metrics.jsonl: JSON whatever the numbers, and a resumed run's file reads as if it had never stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megarubric.config.schema import Wandb
from megarubric.errors import BadInput
from megarubric.observe.files import whole_file
from megarubric.observe.metrics import MetricsLog, check_wandb
from megarubric.observe.terminal import warn_of

OFF = Wandb(mode="disabled")


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_not_a_number_becomes_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, OFF, "r", {}, 0)
    log.log(1, {"a": float("nan"), "b": float("inf"), "c": 1.5})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "a": None, "b": None, "c": 1.5}


def test_resume_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, OFF, "r", {}, 0)
    for step in range(5):
        log.log(step, {"x": step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 5, "x"')  # the controller was killed while writing
    log = MetricsLog(tmp_path, OFF, "r", {}, 2)
    log.log(3, {"x": 3})
    log.close()
    assert steps(tmp_path / "metrics.jsonl") == [0, 1, 2, 3]


def test_wandb_offline_keeps_its_id(tmp_path: Path) -> None:
    for step in (1, 2):
        log = MetricsLog(tmp_path, Wandb(mode="offline"), "r", {"a": 1}, step - 1)
        log.log(step, {"reward/mean": 0.5})
        log.close()
    # offline-run-SECOND-ID, and offline-run-SECOND-ID-1 when both begin in one second
    ids = [p.name.split("-")[3] for p in (tmp_path / "wandb").glob("offline-run-*")]
    assert ids == [(tmp_path / "wandb_id").read_text()] * 2


def test_online_without_a_key_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(BadInput, match=r"^config: wandb\.mode=online: no API key"):
        check_wandb(Wandb(mode="online"))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as f:
        f.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_warnings_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    warn_of({"reward/valid_fraction": 0.5, "train/logprob_abs_diff": 0.01}, 0.05)
    assert capsys.readouterr() == ("", "")
    warn_of({"reward/valid_fraction": 0.0, "train/logprob_abs_diff": None}, 0.05)
    assert "no answer of this step has a reward" in "".join(capsys.readouterr())
    warn_of({"reward/valid_fraction": 1.0, "train/logprob_abs_diff": 0.06}, 0.05)
    assert "0.060, above algorithm.drift_alarm 0.05" in "".join(capsys.readouterr())
