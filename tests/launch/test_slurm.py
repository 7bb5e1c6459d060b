"""`megarubric submit`: the script it renders, what it refuses, and how the script behaves under bash.

The cluster's own commands (srun, squeue, scontrol, scancel, sbatch) are stand-ins here that note how they were called;
docs/slurm.md says what was run under a real Slurm.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megarubric.cli import main
from megarubric.config import load_train
from megarubric.errors import BadInput
from megarubric.launch.signals import DEADLINE, StopFlag
from megarubric.launch.slurm import TEMPLATE, render

CONFIG = """
name: tried
model: {path: somewhere}
data: {train: prompts.jsonl}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(CONFIG)
    return file


def rendered(config: Path, *overrides: str, chain: str | None = None) -> str:
    return render(TEMPLATE.read_text(), load_train(config, overrides), str(config), overrides, chain=chain)


def directives(script: str) -> dict[str, str]:
    found = [
        line.removeprefix("#SBATCH --").partition("=") for line in script.splitlines() if line.startswith("#SBATCH")
    ]
    return {key: value for key, _, value in found}


def test_a_plain_config_asks_for_little(config: Path) -> None:
    found = directives(rendered(config))
    assert found == {
        "job-name": "tried",
        "nodes": "1",
        "ntasks-per-node": "1",
        "exclusive": "",
        "time": "12:00:00",
        "signal": "B:USR1@300",
        "requeue": "",
        "open-mode": "append",
        "output": "runs/tried/logs/slurm-%j.log",
    }


def test_what_the_section_and_the_layout_ask_for(config: Path) -> None:
    asked = ["partition=gpu", "account=team", "minutes=2885", "margin_s=90", "exclusive=false", "memory=900G"]
    asked += ["cpus_per_task=32", "qos=high", "constraint=h100", "setup=['module load cuda', 'ulimit -c 0']"]
    overrides = [f"slurm.{a}" for a in asked] + ["parallel.card=h100", "parallel.ranks=4", "parallel.ep=4"]
    script = rendered(config, *overrides, chain="abc")
    found = directives(script)
    wanted = {"partition": "gpu", "account": "team", "time": "48:05:00", "signal": "B:USR1@90", "mem": "900G"}
    wanted |= {"cpus-per-task": "32", "qos": "high", "constraint": "h100", "gpus-per-node": "4"}
    assert wanted.items() <= found.items() and "exclusive" not in found
    assert found["dependency"] == "singleton" and found["comment"] == "abc"
    assert "\nmodule load cuda\nulimit -c 0\n" in script and "\nMARGIN_S=90\n" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_arguments_arrive_as_they_were_typed(config: Path) -> None:
    overrides = ["data.families=[creative, safety]", 'model.path=it\'s $HOME/`x` \\ "y"']
    script = rendered(config, *overrides, "slurm.container=docker://x#y/z:1", "slurm.mounts=['/data:/data:ro']")
    block = script.partition("# --- filled in")[2].partition("# --- from here")[0].partition("\n")[2]
    names = ["ARGUMENTS", "CONTAINER", "FORWARD", "COMMAND"]
    shown = "".join(f'printf "%s\\0" "${{{name}[@]}}" --; ' for name in names)
    done = subprocess.run(["bash", "-euc", block + shown], capture_output=True, text=True, check=True)
    words = done.stdout.split("\0")
    assert words[:3] == [str(config), *overrides]
    assert (
        "--container-image=docker://x#y/z:1" in words
        and f"--container-mounts={Path.cwd()}:{Path.cwd()},/data:/data:ro" in words
    )
    assert words[words.index("HF_HOME") :] == [
        "HF_HOME",
        "HF_TOKEN",
        "WANDB_API_KEY",
        "--",
        ".venv/bin/megarubric",
        "--",
        "",
    ]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel.nodes=2", "parallel.nodes: 2 hosts cannot share parallel.ranks 1"),
        ("slurm.minutes=5", "slurm.margin_s: 300 leaves nothing"),
        ("slurm.minutes=0", "slurm.minutes: must be at least 1"),
        ("slurm.cpus_per_task=0", "slurm.cpus_per_task: must be at least 1"),
        ("slurm.partition=a b", "slurm.partition: 'a b'"),
        ('slurm.account="x\\n#SBATCH --nodes=9"', "slurm.account: "),
        ("slurm.mounts=[/a:/b]", "slurm.mounts: given, but slurm.container"),
        ("slurm.forward=[A-B]", "slurm.forward: 'A-B'"),
        ('slurm.setup=["a\\nb"]', "slurm.setup: "),
        ("slurm.time=1", "slurm.time: unknown key"),
        ("slurm.minutes=12:00:00x", "slurm.minutes: expected `int`"),
        ("slurm.command=", "slurm.command: expected `str`"),
        ("slurm.command=' '", "slurm.command: is empty"),
    ],
)
def test_refused_in_one_line(config: Path, override: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(config), override, "--dry-run"]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and said.out == ""


def test_too_few_gpus_for_the_ranks(config: Path) -> None:
    with pytest.raises(BadInput, match=r"slurm\.gpus_per_node: 4, but a node has 8 of parallel\.ranks"):
        load_train(config, ["parallel.card=h100", "parallel.ranks=8", "slurm.gpus_per_node=4"])


def test_dry_run_prints_and_writes_nothing(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["submit", str(config), "--dry-run", "--chain", "3"]) == 0
    assert "#SBATCH --dependency=singleton\n" in capsys.readouterr().out
    monkeypatch.setenv("PATH", "")
    assert main(["submit", str(config)]) == 2
    assert "sbatch: not found" in capsys.readouterr().err
    assert main(["submit", str(config), "--chain", "0", "--dry-run"]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH has stand-ins for the commands of a cluster; they append to ``called``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    options = 'while [ "${1#--}" != "$1" ]; do case $1 in --output=*) exec > "${1#--output=}";; esac; shift; done'
    body = {
        "srun": f'{options}; exec "$@"',
        "squeue": 'case "$*" in *%e*) echo N/A;; *%T*) cat state;; *) printf "7 mark\\n8 other\\n";; esac',
        "scontrol": "",
        "scancel": "",
        "sbatch": "echo 41",
    }
    for name, line in body.items():
        (folder / name).write_text(
            f'#!/bin/bash\necho "{name} $*" >> {shlex.quote(str(tmp_path / "called"))}\n{line}\n'
        )
        (folder / name).chmod(0o755)
    (tmp_path / "state").write_text("RUNNING\n")
    return {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "5",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }


def run_script(
    tmp_path: Path, config: Path, program: str, chain: str | None = None
) -> tuple[subprocess.Popen[str], Path]:
    command = tmp_path / "program"
    command.write_text(f"#!/bin/bash\n{program}\n")
    command.chmod(0o755)
    script = rendered(config, f"slurm.command={command}", f"runs_dir={tmp_path / 'runs'}", chain=chain)
    file = tmp_path / "job.sbatch"
    file.write_text(script)
    environment = cluster(tmp_path)
    process = subprocess.Popen(
        ["bash", str(file)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return process, tmp_path / "called"


SAVES = "mkdir -p {}/runs/tried/checkpoints/step_4"


@pytest.mark.parametrize(
    ("program", "chain", "status", "called", "not_called"),
    [
        ("exit 0", None, 0, None, "scontrol"),
        ("exit 0", "mark", 0, "scancel 7\n", "scontrol"),
        ("exit 2", "mark", 2, "scancel 7\n", "scontrol"),
        (SAVES + "; exit 3", None, 3, "scontrol requeue 5\n", "scancel"),
        (SAVES + "; exit 3", "mark", 3, None, "sc"),
        (SAVES + "; echo COMPLETING > state; exit 3", None, 3, None, "scontrol"),  # scancel
        ("exit 3", None, 3, None, "scontrol"),  # no progress: started again it would end the same way
        ("exit 3", "mark", 3, "scancel 7\n", "scontrol"),
    ],
)
def test_what_follows_an_exit_status(
    tmp_path: Path, config: Path, program: str, chain: str | None, status: int, called: str | None, not_called: str
) -> None:
    process, calls = run_script(tmp_path, config, program.format(tmp_path), chain)
    words = process.communicate(timeout=30)[0]
    assert process.returncode == status, words
    assert "attempt 1" in words
    if called:
        assert called in calls.read_text()
    assert f"\n{not_called}" not in calls.read_text()


def test_the_warning_reaches_the_run_and_each_start_has_its_log(tmp_path: Path, config: Path) -> None:
    logs = tmp_path / "runs/tried/logs"
    (logs / "attempt_1").mkdir(parents=True)
    program = "trap 'echo warned; exit 3' USR1; echo \"$1 $2\"; for i in {1..200}; do sleep 0.05; done"
    process, calls = run_script(tmp_path, config, program)
    log = logs / "attempt_2/run.log"
    until = time.monotonic() + 20
    while not (log.exists() and log.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    words = process.communicate(timeout=30)[0]
    assert process.returncode == 3 and "scontrol requeue 5" in calls.read_text(), words
    assert log.read_text() == f"train {config}\nwarned\n"
    assert (logs / "latest").readlink() == Path("attempt_2")


def test_asked_twice_before_a_first_checkpoint_is_not_started_a_third_time(tmp_path: Path, config: Path) -> None:
    process, calls = run_script(tmp_path, config, "kill -USR1 $(ps -o ppid= -p $$); sleep 1; exit 138")
    assert "requeued" in process.communicate(timeout=30)[0]
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "5"}
    environment["SLURM_SUBMIT_DIR"] = str(tmp_path)
    again = subprocess.run(["bash", str(tmp_path / "job.sbatch")], env=environment, capture_output=True, text=True)
    assert again.returncode != 0 and "attempt 2" in again.stdout and "not started again" in again.stdout
    assert calls.read_text().count("scontrol requeue") == 1


@pytest.mark.parametrize(("status", "requeues"), [(3, 1), (138, 0), (0, 0)])
def test_the_template_runs_as_it_stands(tmp_path: Path, status: int, requeues: int) -> None:
    command = tmp_path / ".venv/bin/megarubric"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/bash\necho "got $*"\nexit {status}\n')
    command.chmod(0o755)
    arguments = ["bash", str(TEMPLATE), "a.yaml", "train.steps=2"]
    done = subprocess.run(arguments, env=cluster(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == status and "got train a.yaml train.steps=2" in done.stdout
    assert (tmp_path / "called").read_text().count("scontrol requeue 5") == requeues


def test_submit_hands_over_a_chain(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", cluster(tmp_path)["PATH"])
    assert main(["submit", str(config), f"runs_dir={tmp_path / 'runs'}", "--chain", "2"]) == 0
    file = tmp_path / "runs/tried/logs/job.sbatch"
    assert (tmp_path / "called").read_text() == f"sbatch --parsable {file}\n" * 2
    assert "submitted 41, 41" in capsys.readouterr().out
    subprocess.run(["bash", "-n", str(file)], check=True)
    (tmp_path / "bin/sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    assert main(["submit", str(config), f"runs_dir={tmp_path / 'runs'}"]) == 2
    assert capsys.readouterr().err.endswith("sbatch: invalid partition\n")


def test_a_run_is_asked_to_stop_by_usr1_and_by_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    async def asked(send: bool) -> bool:
        stop = StopFlag()
        assert not stop.requested
        if send:
            os.kill(os.getpid(), signal.SIGUSR1)
        for _ in range(500):
            await asyncio.sleep(0.01)
            if stop.requested:
                return True
        return False

    assert asyncio.run(asked(send=True))
    monkeypatch.setenv(DEADLINE, str(int(time.time()) - 1))
    assert asyncio.run(asked(send=False))
    monkeypatch.setenv(DEADLINE, "soon")
    with pytest.raises(BadInput, match="not a number of seconds"):
        asyncio.run(asked(send=False))
