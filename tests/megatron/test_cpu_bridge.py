"""The CPU bridge: when it installs, and that what Megatron asks CUDA for is answered by the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import megarubric

REFUSALS = """
import sys, types
import torch
from megarubric.megatron import cpu

def refused(reason):
    try:
        cpu.install()
    except RuntimeError as error:
        assert reason in str(error), error
        assert not cpu.installed()
    else:
        raise AssertionError("installed")

available = torch.cuda.is_available
torch.cuda.is_available = lambda: True
refused("where CUDA is available")
cpu.ensure()  # there it is not needed
assert not cpu.installed()
torch.cuda.is_available = available
sys.modules["megatron.core"] = types.ModuleType("megatron.core")
refused("before megatron.core is imported")
del sys.modules["megatron.core"]
cpu.ensure()
zeros = torch.zeros
cpu.install()
assert cpu.installed() and torch.zeros is zeros, "installed twice"
print("ok")
"""


@pytest.mark.engine
def test_bridge_refuses_cuda_and_a_megatron_that_is_already_there() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(megarubric.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", REFUSALS], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.stdout == "ok\n", run.stderr


def answers_of_the_bridge() -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from megatron.core import tensor_parallel
    from megatron.core.transformer.module import Float16Module  # noqa: F401 (its type tables are built at import)

    from megarubric.megatron.parallel import ParallelLayout, initialize, shutdown

    initialize(ParallelLayout(ep=2), seed=9, timeout_s=200)
    rank = dist.get_rank()
    answer: dict[str, Any] = {}

    made = [torch.tensor([1.0], device="cuda"), torch.zeros(2, device=torch.cuda.current_device())]
    made += [torch.empty_like(made[0], device="cuda"), torch.arange(3, device=torch.device("cuda", 0)), made[0].cuda()]
    answer["devices"] = sorted({str(tensor.device) for tensor in made})
    with torch.device("meta"):  # torch's own device context still works
        answer["meta"] = str(torch.zeros(2).device)
    answer["types"] = [torch.zeros(1).type(), torch.zeros(1, dtype=torch.bfloat16).type()]
    answer["cast"] = str(torch.zeros(1).type(torch.float64).dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda.Event().record()
    torch.cuda.synchronize()

    # The tracker's states are apart from the default one, and come back where they were.
    tracker = tensor_parallel.get_cuda_rng_tracker()
    before = torch.rand(1)
    torch.manual_seed(4)
    plain = torch.rand(4)
    torch.manual_seed(4)
    with tracker.fork("expert-parallel-rng"):
        first = torch.rand(4)
    answer["fork_leaves_the_default_state"] = torch.rand(4).equal(plain)
    with tracker.fork("expert-parallel-rng"):
        second = torch.rand(4)
    answer["fork_goes_on"] = not first.equal(second) and not first.equal(plain)
    answer["expert_draw"] = first.tolist()
    answer["default_draw"] = before.tolist()

    # Rank r sends r + 1 rows to rank 0 and 2 rows to rank 1, sizes given as tensors.
    rows = torch.full((rank + 3, 2), float(rank))
    out = torch.empty((3 if rank == 0 else 4, 2))
    received = torch.tensor([1, 2]) if rank == 0 else torch.tensor([2, 2])
    dist.all_to_all_single(out, rows, output_split_sizes=received, input_split_sizes=torch.tensor([rank + 1, 2]))
    answer["all_to_all"] = out[:, 0].tolist()
    # Unequal parts: gather rank 0's one row and rank 1's two, and reduce them back.
    parts = [torch.empty(1, 2), torch.empty(2, 2)]
    dist.all_gather(parts, torch.full((rank + 1, 2), rank + 1.0))
    answer["all_gather"] = [part[:, 0].tolist() for part in parts]
    back = torch.empty(rank + 1, 2)
    dist.reduce_scatter(back, [torch.full((1, 2), rank + 1.0), torch.full((2, 2), rank + 5.0)])
    answer["reduce_scatter"] = back[:, 0].tolist()
    equal = torch.empty(1)
    dist.all_reduce(equal.fill_(rank))
    answer["all_reduce"] = equal.item()
    shutdown()
    return answer


@pytest.mark.engine
def test_what_megatron_asks_of_cuda_is_answered_by_the_cpu(ranks: Any) -> None:
    zero, one = ranks(2, answers_of_the_bridge)
    for answer in (zero, one):
        assert answer["devices"] == ["cpu"] and answer["meta"] == "meta"
        assert answer["types"] == ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor"]
        assert answer["cast"] == "torch.float64"
        assert answer["fork_leaves_the_default_state"] and answer["fork_goes_on"]
        assert answer["all_gather"] == [[1.0], [2.0, 2.0]]
        assert answer["all_reduce"] == 1.0
    assert zero["default_draw"] == one["default_draw"]  # data parallel ranks share a state
    assert zero["expert_draw"] != one["expert_draw"]  # expert parallel ranks do not
    assert zero["all_to_all"] == [0.0, 1.0, 1.0]
    assert one["all_to_all"] == [0.0, 0.0, 1.0, 1.0]
    assert zero["reduce_scatter"] == [3.0] and one["reduce_scatter"] == [11.0, 11.0]
