"""`megarubric score` from the command line: exit statuses, one line of error, nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUBRIC = {"id": "note", "criteria": [{"id": "calm", "description": "Calm."}, {"id": "plain", "description": "Plain."}]}
GOOD = {"id": "a", "prompt": "p", "rubric": "note", "response": "r", "judgements": {"calm": 1, "plain": 0}}


def megarubric_score(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megarubric", "score", "--rubrics", "rubrics.json", "--responses", "in.jsonl"]
    return subprocess.run(
        [*command, "--out", "out.jsonl", *arguments], cwd=directory, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "rubrics.json").write_text(json.dumps(RUBRIC))
    (tmp_path / "in.jsonl").write_text(json.dumps(GOOD) + "\n")
    return tmp_path


def test_all_good_is_0_and_some_bad_is_1(directory: Path) -> None:
    done = megarubric_score(directory)
    assert done.returncode == 0 and json.loads((directory / "out.jsonl").read_text())["reward"] == 0.5
    with (directory / "in.jsonl").open("a") as f:
        f.write("{\n" + json.dumps(GOOD | {"id": "b"}) + "\n")
    done = megarubric_score(directory, "--judge", "none", "--device", "cpu")
    rows = [json.loads(line) for line in (directory / "out.jsonl").read_text().splitlines()]
    assert done.returncode == 1 and [r["valid"] for r in rows] == [True, False, True]
    assert "in.jsonl: line 2: not JSON" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--judge", "nowhere"), "nowhere"),
        (("--responses", "absent.jsonl"), "absent.jsonl"),
        (("--rubrics", "in.jsonl"), "in.jsonl"),
        (("--device", "tpu"), "tpu"),
        (("--max-requests", "-1"), "-1 is not a number of 0 or more"),
        (("--draws", "3"), "mode tier gives a distribution"),
        (("--mode", "all", "--template", "tier"), "cannot be the template of mode all"),
        (("--second-judge", "m"), "there is no first"),
    ],
)
def test_what_cannot_run_is_2_in_one_line_and_leaves_no_output(
    directory: Path, arguments: tuple[str, ...], reason: str
) -> None:
    done = megarubric_score(directory, *arguments)
    assert done.returncode == 2 and reason in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert sorted(p.name for p in directory.iterdir()) == ["in.jsonl", "rubrics.json"]
