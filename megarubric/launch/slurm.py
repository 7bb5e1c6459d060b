"""`megarubric submit`: a config becomes a batch script, the batch script one job or a chain of them.

``slurm/train.sbatch`` is the template: a script that also runs as it stands. Filling it in sets its `#SBATCH` lines
and the variables of its marked block, and changes nothing else.
"""

from __future__ import annotations

import re
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from megarubric.config import load_train
from megarubric.config.schema import TrainConfig
from megarubric.errors import BadInput
from megarubric.launch import plan
from megarubric.observe.files import whole_file
from megarubric.observe.terminal import say

TEMPLATE = Path(__file__).parents[2] / "slurm" / "train.sbatch"
_INTRODUCTION = (
    "# One megarubric run, filled in by `megarubric submit` from slurm/train.sbatch. Read it, edit it, sbatch it.\\n"
)
_SETUP = "# slurm.setup of the config: module load and the like\n"


def run_submit(path: str, overrides: Sequence[str], *, dry_run: bool, chain: int) -> int:
    """The verb. Raises BadInput when the config is refused, when Slurm is not here, or when it refuses the job."""
    if chain < 1:
        raise BadInput("command line", "--chain", f"needs at least 1 job, is {chain}")
    c = load_train(path, overrides)
    if Path(c.model.path, "config.json").exists():
        plan.check_layout(plan.read_hf_config(c.model.path), c.parallel, path)
    try:
        template = TEMPLATE.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(TEMPLATE, None, "no such file: submit works in a clone of the repository") from None
    script = render(template, c, path, overrides, chain=secrets.token_hex(4) if chain > 1 else None)
    if dry_run:
        print(script, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise BadInput("Slurm", "sbatch", "not found on this machine; --dry-run prints the script")
    logs = Path(c.runs_dir) / c.name / "logs"
    file = logs / "job.sbatch"
    with whole_file(file) as f:
        f.write(script)
    jobs = [_sbatch(file) for _ in range(chain)]
    say(f"submitted {', '.join(jobs)} ({file})")
    if chain > 1:
        say(f"a chain of {chain}: one runs at a time; when the run is done, those still waiting are cancelled")
    say(f"log: {logs}/latest/run.log; the job's own words: {logs}/slurm-JOB.log")
    return 0


def _sbatch(file: Path) -> str:
    """Submit `file`; the job id."""
    done = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise BadInput("sbatch", None, words[-1].removeprefix("sbatch: error: "))
    return done.stdout.strip().partition(";")[0]  # id;cluster


def render(template: str, c: TrainConfig, path: str, overrides: Sequence[str], *, chain: str | None) -> str:
    """The batch script of a run. `chain` is the mark that the jobs of one chain share, None for a single job.

    Raises BadInput when the template lacks a place that must be filled.
    """
    s, run_dir = c.slurm, Path(c.runs_dir) / c.name
    gpus = s.gpus(c.parallel.ranks_per_node, c.parallel.card)
    text = _directives(
        re.sub(r"\A(#!.*\n)(?:#(?!SBATCH).*\n)+", rf"\1{_INTRODUCTION}", template),
        {
            "job-name": c.name,
            "nodes": c.parallel.nodes,
            "gpus-per-node": gpus or None,
            "cpus-per-task": s.cpus_per_task,
            "mem": s.memory,
            "exclusive": s.exclusive,
            "time": f"{s.minutes // 60:02d}:{s.minutes % 60:02d}:00",
            "signal": f"B:USR1@{s.margin_s}",
            "output": f"{run_dir}/logs/slurm-%j.log",
            "partition": s.partition,
            "account": s.account,
            "qos": s.qos,
            "constraint": s.constraint,
            "dependency": "singleton" if chain else None,
            "comment": chain,
        },
    )
    container: list[str] = []
    try:
        command = shlex.split(s.command)
    except ValueError as error:
        raise BadInput(path, "slurm.command", str(error)) from None
    if s.container:
        container = [f"--container-image={s.container}", "--container-workdir=" + str(Path.cwd())]
        container += [f"--container-mounts={','.join([f'{Path.cwd()}:{Path.cwd()}', *s.mounts])}"]
        container += [f"--container-env={','.join([*s.forward, 'MEGARUBRIC_DEADLINE'])}"]
    for name, value in {
        "ARGUMENTS": f"({shlex.join([path, *overrides])})",
        "COMMAND": f"({shlex.join(command)})",
        "RUN_DIR": shlex.quote(str(run_dir)),
        "MARGIN_S": str(s.margin_s),
        "CHAIN": chain or "",
        "CONTAINER": f"({shlex.join(container)})",
        "FORWARD": f"({' '.join(s.forward)})",
    }.items():
        text = _assign(text, name, value)
    return _setup(text, s.setup)


def _directives(text: str, wanted: Mapping[str, str | int | bool | None]) -> str:
    """Set the `#SBATCH --key[=value]` lines: None or False removes one, one that the script lacks comes last."""
    for key, value in wanted.items():
        line = re.compile(rf"^#SBATCH --{key}(?:=.*)?\n", re.MULTILINE)
        new = "" if value is None or value is False else f"#SBATCH --{key}{'' if value is True else f'={value}'}\n"
        if line.search(text):
            text = line.sub(lambda _, new=new: new, text, count=1)  # type: ignore[misc]
        elif new:
            end = list(re.finditer(r"^#SBATCH .*\n", text, re.MULTILINE))
            if not end:
                raise BadInput(TEMPLATE, None, "has no #SBATCH line")
            text = text[: end[-1].end()] + new + text[end[-1].end() :]
    return text


def _assign(text: str, name: str, value: str) -> str:
    """Set the one ``NAME=...`` line that begins at the left margin."""
    found = re.findall(rf"^{name}=.*$", text, re.MULTILINE)
    if len(found) != 1:
        raise BadInput(TEMPLATE, name, f"is assigned {len(found)} times, must be once")
    return text.replace(f"\n{found[0]}\n", f"\n{name}={value}\n", 1)


def _setup(text: str, lines: Sequence[str]) -> str:
    if _SETUP not in text:
        raise BadInput(TEMPLATE, "slurm.setup", f"lacks the line {_SETUP.strip()!r}")
    return text.replace(_SETUP, _SETUP + "".join(f"{line}\n" for line in lines), 1)
