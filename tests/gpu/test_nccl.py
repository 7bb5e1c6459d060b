"""On two GPUs: idle communicators give their device memory back and work as before when they have it again.

Not run yet: written without GPUs at hand.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def rank(rounds: int) -> dict[str, object]:
    """One of two ranks: the sums of an all-reduce and free device memory, before, between and after."""
    import torch.distributed as dist

    from megarubric.megatron import nccl

    number = int(os.environ["RANK"])
    torch.cuda.set_device(number)
    dist.init_process_group("nccl")
    pair = dist.new_group([0, 1])
    unused = dist.new_group([0, 1])
    value = torch.full((1 << 20,), float(number + 1), device="cuda")
    sums, free, held = [], [], []
    for group in (dist.group.WORLD, pair):
        dist.all_reduce(value.clone(), group=group)
    found = nccl.communicators(nccl.groups())
    for _ in range(rounds):
        out = value.clone()
        dist.all_reduce(out, group=pair)
        torch.cuda.synchronize()
        sums.append(float(out.mean()))
        free.append(torch.cuda.mem_get_info()[0])
        nccl.suspend(found)
        free.append(torch.cuda.mem_get_info()[0])
        held.append(nccl.held(found))
        nccl.resume(found)
    out = value.clone()
    dist.all_reduce(out, group=pair)
    dist.all_reduce(value, group=unused)  # made after others were suspended and resumed
    torch.cuda.synchronize()
    dist.destroy_process_group()
    return {"found": len(found), "sums": [*sums, float(out.mean()), float(value.mean())], "free": free, "held": held}


def test_memory_comes_back_and_sums_stay() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = (
        "import importlib.util, json, sys\n"
        f"spec = importlib.util.spec_from_file_location('job', {__file__!r})\n"
        "job = importlib.util.module_from_spec(spec); spec.loader.exec_module(job)\n"
        "print('RESULT ' + json.dumps(job.rank(3)), flush=True)"
    )
    processes = []
    for number in range(2):
        env = os.environ | {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
        processes.append(
            subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    try:
        outputs = [process.communicate(timeout=300)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    for output in outputs:
        lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
        assert lines, output[-3000:]
        result = json.loads(lines[0].removeprefix("RESULT "))
        assert result["found"] == 2  # the world and the pair; the third has not been used
        assert result["sums"] == [3.0] * 5
        given = result["free"][1] - result["free"][0]
        print(f"given back {given / 2**20:.0f} MiB; NCCL counts {result['held'][0]}")
        assert given > 0
        assert given >= sum(size for size, _ in result["held"][0])
        assert all(b > a for a, b in zip(result["free"][::2], result["free"][1::2]))
