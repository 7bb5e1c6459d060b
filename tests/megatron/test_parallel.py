"""Process groups come and go: a process may make them again, on this layout or another."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.engine


def made_again(times: int) -> list[float]:
    import torch
    import torch.distributed as dist

    from megarubric.megatron import parallel

    sums = []
    for k in range(times):
        layout: dict[str, Any] = [{"tp": 2}, {"pp": 2}, {}][k % 3]
        parallel.initialize(parallel.ParallelLayout(**layout), timeout_s=30)
        value = torch.tensor(float(k + 10 * dist.get_rank()))
        dist.all_reduce(value)
        sums.append(value.item())
        parallel.shutdown()
    return sums


def test_groups_are_made_again_in_one_process(ranks: Any) -> None:
    assert ranks(2, made_again, times=6) == [[10.0 + 2 * k for k in range(6)]] * 2
