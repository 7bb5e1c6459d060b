"""The command line: help everywhere, bad input in one line with status 2, dry runs that start nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megarubric.cli import main

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "configs/quickstart.yaml")


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def one_line(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a verb that must fail with status 2 and exactly one line on standard error; the line."""
    assert main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    return error


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["train"],
        ["sft"],
        ["eval"],
        ["score"],
        ["convert"],
        ["doctor"],
        ["rubrics"],
        ["rubrics", "lint"],
        ["rubrics", "import"],
        ["rubrics", "synthesize"],
    ],
)
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([*argv, "--help"])
    assert done.value.code == 0 and "usage: megarubric" in capsys.readouterr().out


def test_dry_run_prints_everything_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", CONFIG, f"runs_dir={tmp_path}", "train.lr=1e-5", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for words in ("lr: 1.0e-05", "trainer-0: ", "policy-0: ", "judge: ", "optimizer", "16 prompts x 8 samples"):
        assert words in out, words
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.engins=1", "rollout.engins: unknown key; did you mean engines?"),
        ("parallel.tp=4", "ranks cannot be divided by tp 4"),
        ("model.path=nowhere", "nowhere/config.json: no such file"),
        ("data.train=none.jsonl", "none.jsonl: no such file"),
        ("judge.template=none", "template: none"),
    ],
)
def test_config_that_cannot_run(override: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in one_line(capsys, "train", CONFIG, f"runs_dir={tmp_path}", override)


def test_overrides_may_stand_before_and_behind_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", CONFIG, f"runs_dir={tmp_path}", "--dry-run", "train.lr=1e-5", "train.steps=3"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "lr: 1.0e-05" in out and "steps: 3" in out and f"runs_dir: {tmp_path}" in out
    assert "rollout.engins" in one_line(capsys, "train", CONFIG, "--dry-run", "rollout.engins=1")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "VERB"),
        (["nonsense"], "nonsense"),
        (["score"], "--rubrics"),
        (["rubrics", "lint"], "PATH"),
        (["doctor", "more"], "unrecognized arguments: more"),
        (["train", "c.yaml", "--fresh", "--resume"], "--resume: not allowed with argument --fresh"),
        (["score", "--rubrics=r", "--responses=r", "--out=o", "--timeout=nan"], "nan is not a number of seconds"),
        (["train", CONFIG, "--dry-run", "--bogus", "train.lr=1"], "--bogus"),
    ],
)
def test_bad_arguments_are_one_line(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(argv)
    error = capsys.readouterr().err
    assert done.value.code == 2 and error.startswith("megarubric") and words in error and error.count("\n") == 1, error


def test_a_result_that_cannot_be_written_is_refused_before_it_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "eval.json")
    model = str(ROOT / "models" / "tiny-qwen3-moe")
    argv = ("eval", CONFIG, "--model", model, "--out", out, f"runs_dir={tmp_path}")
    assert one_line(capsys, *argv).endswith(f"{out}: cannot be written: Not a directory")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_layouts_the_model_cannot_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["train", CONFIG, f"runs_dir={tmp_path}"]
    assert "8 experts cannot be divided by ep 3" in one_line(capsys, *args, "parallel.ranks=3", "parallel.ep=3")
    assert "4 layers cannot be divided by pp 3" in one_line(capsys, *args, "parallel.ranks=3", "parallel.pp=3")


def test_empty_and_malformed_prompt_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty.jsonl" in one_line(capsys, "train", CONFIG, f"runs_dir={tmp_path}", f"data.train={empty}")
    row = json.loads((ROOT / "rubrics/quickstart/train.jsonl").read_text().splitlines()[0])
    row["criteria"][0]["wieght"] = 1
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(row) + "\n")
    line = one_line(capsys, "train", CONFIG, f"runs_dir={tmp_path}", f"data.train={bad}")
    assert "bad.jsonl" in line and "wieght" in line


def test_a_job_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NNODES", "2")
    assert "Slurm: 2 nodes: and parallel.nodes is 1" in one_line(capsys, "train", CONFIG)


def test_port_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        line = one_line(capsys, "train", CONFIG, f"runs_dir={tmp_path}", f"parallel.master_port={port}")
    assert f"port {port} cannot be used" in line


def test_score_without_a_judge(tmp_path: Path) -> None:
    rubric = {"id": "r", "criteria": [{"id": "c", "weight": 1}]}
    rows = [
        {"id": "a", "prompt": "p", "rubric": rubric, "response": "x", "judgements": {"c": 1}},
        {"id": "b", "prompt": "p", "rubric": rubric, "response": "x"},
        {"id": "d", "prompt": "p", "rubric": "unknown", "response": "x"},
    ]
    (tmp_path / "rubrics.jsonl").write_text(json.dumps(rubric) + "\n")
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["score", "--rubrics", "rubrics.jsonl", "--responses", "in.jsonl", "--out", "out.jsonl"]
    done = subprocess.run(
        [sys.executable, "-m", "megarubric", *argv], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert "line 3" in done.stderr and "d" in done.stderr
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(o["id"], o["reward"], o["valid"]) for o in out] == [
        ("a", 1.0, True),
        ("b", None, False),
        ("d", None, False),
    ]


def test_a_terminal_that_cannot_write_a_rubrics_language(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(
        '{"id": "r", "title": "\u6e21\u8239", "criteria": [{"id": "c"}]}\n', encoding="utf-8"
    )
    for argv in (["show"], ["show", "--json"], ["stats"], ["lint"]):
        done = subprocess.run(
            [sys.executable, "-m", "megarubric", "rubrics", *argv, "r.jsonl"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr


@pytest.mark.engine
def test_an_engine_that_dies_at_start(tmp_path: Path) -> None:
    """One line with its last words, status 2, nothing left running."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (broken / name).write_bytes((ROOT / "models/tiny-qwen3-moe" / name).read_bytes())
    argv = [sys.executable, "-m", "megarubric", "train", CONFIG, f"runs_dir={tmp_path}", f"judge.model={broken}"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "judge ended with status" in done.stderr, done.stderr
    pids = json.loads((tmp_path / "quickstart/logs/processes.json").read_text()).values()
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
