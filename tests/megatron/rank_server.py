"""Runs functions on real gloo ranks. Started once a test session by tests/conftest.py, which speaks JSON lines with it.

Importing torch and Megatron takes several seconds on a busy machine; this process does it once and forks the ranks of
each job from there. Ranks die with this process, and this process with pytest.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends (PR_SET_PDEATHSIG), so that nothing outlives a test run."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def load_function(file: str, name: str) -> Any:
    spec = importlib.util.spec_from_file_location("rank_job", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rank_job"] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def run_rank(rank: int, port: int, job: dict[str, Any], scratch: Path) -> None:
    """The forked child: never returns."""
    die_with_parent()
    log = os.open(scratch / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(job["world"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        result = load_function(job["file"], job["function"])(**job["kwargs"])
        (scratch / f"rank{rank}.json").write_text(json.dumps(result))
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Fork the ranks, wait for all of them; the first failure, or the time limit, ends the others."""
    scratch, world = Path(job["scratch"]), job["world"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running: dict[int, int] = {}
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            run_rank(rank, port, job, scratch)
        running[pid] = rank
    failed: dict[int, str] = {}
    deadline = time.monotonic() + job["timeout_s"]
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            rank = running.pop(pid)
            if status != 0 and not failed:
                failed[rank] = "failed" if os.WIFEXITED(status) else f"died by signal {os.WTERMSIG(status)}"
        if running and (failed or time.monotonic() > deadline):
            failed = failed or {min(running.values()): f"did not end within {job['timeout_s']} s"}
            for stuck in running:
                os.kill(stuck, signal.SIGKILL)
            for stuck in list(running):
                os.waitpid(stuck, 0)
                del running[stuck]
        elif not pid:
            time.sleep(0.01)
    if failed:
        rank, what = next(iter(failed.items()))
        tail = (scratch / f"rank{rank}.log").read_text(errors="replace")[-6000:]
        return {"error": f"rank {rank} of {world} {what}\n{tail}"}
    return {"results": [json.loads((scratch / f"rank{rank}.json").read_text()) for rank in range(world)]}


def main() -> None:
    die_with_parent()
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print does not belong between the answers
    import torch

    from megarubric.megatron import cpu

    cpu.ensure()
    # Everything the jobs import, so that no forked rank has to: torch's compiler, which its optimizers ask at their
    # first step, takes longer than most of the steps here.
    import safetensors.torch  # noqa: F401
    import torch._dynamo
    import torch.distributed.checkpoint

    import megarubric.megatron.trainer
    import megarubric.recipe.algorithms  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        answers.write(json.dumps(run_job(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
