"""Device memory of idle NCCL communicators: given back while engines have the device, and taken again.

A communicator keeps its channels' buffers on the device for as long as it lives, and a rank of a mixture of experts is
in a dozen of them. NCCL 2.29.7 can unmap those buffers and map them again at the same addresses (ncclCommSuspend,
ncclCommResume); torch offers that on a process group's backend since 2.12. Groups and communicators stay the objects
they are, so nothing that refers to one notices. In between, no collective may use them.

Suspending and resuming wait for the communicator's other ranks. Every rank goes through its groups in the order in
which they were made, which torch demands to be the same on all ranks: the oldest group that is not done yet is the next
one of each of its ranks, so nobody waits in a circle.

What stays: what NCCL counts as persistent (`held` tells), NVLS multicast buffers among it, and the communicators of two
ranks that torch makes for single sends (an interleaved pipeline's), which it has no handle for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from megarubric.errors import ProcessDied

log = logging.getLogger(__name__)
FIRST_VERSION = (2, 29, 7)
_MIB = 2**20


class Backend(Protocol):
    """What is used of torch's ProcessGroupNCCL."""

    def suspend(self) -> None: ...
    def resume(self) -> None: ...
    def memory_stats(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class Communicator:
    """A group's NCCL communicator on this rank's device; `name` is for messages."""

    name: str
    backend: Backend


def groups() -> list[dist.ProcessGroup]:
    """The process groups this rank is in, the first made first."""
    return list(_world.pg_map)


def communicators(of: Sequence[dist.ProcessGroup]) -> list[Communicator]:
    """Those of the groups `of` that have one now, in their order: NCCL makes it at a group's first collective.

    Groups of gloo and groups of one rank have none. Empty, with one line in the log, where NCCL cannot suspend.
    """
    candidates = [group for group in of if group.size() > 1 and dist.get_backend(group) == "nccl"]
    if not candidates:
        return []
    version = torch.cuda.nccl.version()
    if version < FIRST_VERSION:
        found, wanted = (".".join(map(str, v)) for v in (version, FIRST_VERSION))
        _say_once(f"NCCL {found} keeps its device memory while engines write; {wanted} and later can give it back")
        return []
    out = []
    for group in candidates:
        backend = group._get_backend(torch.device("cuda"))
        if backend._comm_ptr():  # type: ignore[attr-defined]
            out.append(Communicator(group.group_desc or group.group_name, backend))
    return out


def suspend(of: Sequence[Communicator]) -> None:
    """Give the device memory of the communicators back. Collective over the ranks of each; the device must be idle.

    Raises ProcessDied, in one line, when NCCL refuses: the ranks' states no longer fit together.
    """
    if not of:
        return
    before = held(of)
    for communicator in of:
        _try(communicator, "give back the memory of", communicator.backend.suspend)
    given = sum(size for size, _ in before)
    stays = sum(size for _, size in before)
    _say_once(f"{len(of)} NCCL communicators give back {given / _MIB:.0f} MiB in turn, and keep {stays / _MIB:.0f} MiB")


def resume(of: Sequence[Communicator]) -> None:
    """Undo `suspend`, in the same order. Raises ProcessDied, as when the device has no room."""
    for communicator in of:
        _try(communicator, "take back the memory of", communicator.backend.resume)


def held(of: Sequence[Communicator]) -> list[tuple[int, int]]:
    """For each communicator, bytes of the device that `suspend` gives back (also while given back), and bytes that it
    keeps."""
    stats = [_try(c, "count the memory of", c.backend.memory_stats) for c in of]
    return [(int(s["suspend"]), int(s["persist"])) for s in stats]


def _try[T](communicator: Communicator, what: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except RuntimeError as error:  # torch's DistBackendError is one
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ProcessDied(f"NCCL could not {what} group {communicator.name}: {reason}") from error


@cache
def _say_once(line: str) -> None:
    log.warning(line)
