"""What trainer ranks say to all others over the gloo control group: bytes, and whether a step went well everywhere."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megarubric.errors import MegarubricError, ProcessDied


class PublishError(MegarubricError):
    """A publish call out of order, or a fault of one rank that all were told of."""


def gather_bytes(data: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """The `data` of every rank, by rank."""
    world = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(data)]), group=group)
    longest = max(int(n) for n in sizes)
    if longest == 0:
        return [b""] * world
    told = [torch.empty(longest, dtype=torch.uint8) for _ in range(world)]
    own = torch.zeros(longest, dtype=torch.uint8)
    own[: len(data)] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
    dist.all_gather(told, own, group=group)
    return [t[: int(n)].numpy().tobytes() for t, n in zip(told, sizes, strict=True)]


def settle(error: MegarubricError | None, group: dist.ProcessGroup) -> None:
    """A barrier that also tells whether a rank failed: then every rank raises, so that they stay in step.

    The rank that failed raises its own `error`; the others PublishError, or ProcessDied when that is what it was, with
    the same message and the number of the rank.
    """
    failed = torch.tensor([0 if error is None else dist.get_rank(group) + 1])
    try:
        dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
        if int(failed) == 0:
            return
        source = int(failed) - 1
        died = isinstance(error, ProcessDied)
        message = bytearray(f"{'D' if died else 'E'}{error or ''}", "utf-8", "replace")
        size = torch.tensor([len(message)])
        dist.broadcast(size, group_src=source, group=group)
        told = torch.zeros(int(size), dtype=torch.uint8)
        if source == dist.get_rank(group):
            told = torch.frombuffer(message, dtype=torch.uint8)
        dist.broadcast(told, group_src=source, group=group)
    except RuntimeError:
        if error is not None:
            raise error from None  # the other end is gone, which is what the error says
        raise
    if error is not None:
        raise error
    text = told.numpy().tobytes().decode()
    kind = ProcessDied if text.startswith("D") else PublishError
    raise kind(f"trainer rank {source}: {text[1:]}")
