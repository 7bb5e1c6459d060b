"""Suspending communicators: nothing to do on gloo, one order on all ranks, and one line when NCCL refuses.

NCCL itself needs GPUs (tests/gpu/test_nccl.py). Here a backend that waits for its group's other ranks, as NCCL's does,
stands in for it, on Megatron's own groups and real ranks.
"""

from __future__ import annotations

from typing import Any

import pytest

from megarubric.errors import ProcessDied
from megarubric.megatron import nccl


class Waiting:
    """Suspends and resumes by a barrier of its group: ranks in another order would wait for ever."""

    def __init__(self, group: Any, calls: list[str]) -> None:
        self.group, self.calls, self.suspended = group, calls, False

    def suspend(self) -> None:
        assert not self.suspended
        self._wait("suspend")
        self.suspended = True

    def resume(self) -> None:
        assert self.suspended
        self._wait("resume")
        self.suspended = False

    def memory_stats(self) -> dict[str, int]:
        return {"suspend": 3 << 20, "suspended": int(self.suspended), "persist": 1 << 20, "total": 4 << 20}

    def _wait(self, what: str) -> None:
        import torch.distributed as dist

        self.calls.append(f"{what} {sorted(dist.get_process_group_ranks(self.group))}")
        dist.barrier(group=self.group)


def suspend_megatron_groups(layout: dict[str, int]) -> dict[str, Any]:
    import torch

    from megarubric.megatron import parallel
    from megarubric.megatron.residence import Residence

    parallel.initialize(parallel.ParallelLayout(**layout), timeout_s=30)
    groups = nccl.groups()
    on_gloo = len(nccl.communicators(groups))
    calls: list[str] = []
    stand_ins = [nccl.Communicator(g.group_name, Waiting(g, calls)) for g in groups if g.size() > 1]
    nccl.suspend(stand_ins)
    held = nccl.held(stand_ins)
    nccl.resume(stand_ins)
    with Residence(None, torch.device("cpu")).connected():  # type: ignore[arg-type]
        pass
    alone = sum(group.size() == 1 for group in groups)
    parallel.shutdown()
    return {"on_gloo": on_gloo, "calls": calls, "held": held, "alone": alone}


@pytest.mark.engine
def test_all_groups_of_all_ranks_in_one_order(ranks: Any) -> None:
    found = ranks(4, suspend_megatron_groups, layout={"tp": 2, "pp": 2})
    for rank, one in enumerate(found):
        assert one["on_gloo"] == 0
        half = len(one["calls"]) // 2
        assert half > 4 and one["alone"] > 0
        assert [c.removeprefix("suspend ") for c in one["calls"][:half]] == [
            c.removeprefix("resume ") for c in one["calls"][half:]
        ]
        assert all(str(rank) in call for call in one["calls"])
        assert one["held"] == [[3 << 20, 1 << 20]] * half
    # Two ranks meet in the groups they share in the same order.
    for a, b in [(0, 1), (0, 2), (1, 3), (2, 3)]:
        both = [[c for c in found[r]["calls"] if str(a) in c and str(b) in c] for r in (a, b)]
        assert both[0] == both[1] and both[0]


class Refusing:
    def suspend(self) -> None:
        raise RuntimeError("NCCL error in: NCCLUtils.cpp:603, invalid usage\nncclInvalidUsage: and more\nlines")

    def resume(self) -> None:
        raise RuntimeError("")

    def memory_stats(self) -> dict[str, int]:
        return {"suspend": 0, "suspended": 0, "persist": 0, "total": 0}


def test_a_refusal_is_one_line() -> None:
    communicators = [nccl.Communicator("TENSOR_MODEL_PARALLEL_GROUP", Refusing())]
    with pytest.raises(ProcessDied) as caught:
        nccl.suspend(communicators)
    assert str(caught.value) == (
        "NCCL could not give back the memory of group TENSOR_MODEL_PARALLEL_GROUP: "
        "NCCL error in: NCCLUtils.cpp:603, invalid usage"
    )
    with pytest.raises(ProcessDied, match="take back the memory of group TENSOR_MODEL_PARALLEL_GROUP: RuntimeError"):
        nccl.resume(communicators)


def test_what_was_freed_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    from types import SimpleNamespace

    stats = {"suspend": 700 << 20, "suspended": 0, "persist": 52 << 20, "total": 752 << 20}
    backend = SimpleNamespace(suspend=lambda: None, resume=lambda: None, memory_stats=lambda: stats)
    for _ in range(3):
        nccl.suspend([nccl.Communicator("g", backend), nccl.Communicator("h", backend)])
    said = [record.message for record in caplog.records if record.name == nccl.__name__]
    assert said == ["2 NCCL communicators give back 1400 MiB in turn, and keep 104 MiB"]
