"""Context parallelism without Transformer Engine: gather every rank's keys and values, attend with one's own queries.

The all-gather form of Llama 3 (arXiv 2407.21783, section 3.3.2). Each of cp ranks holds chunks r and 2 cp - 1 - r of
every packed sequence (`packing.context_share`, Transformer Engine's split), so all have the same causal work. Keys and
values are gathered before grouped heads are repeated, put in the order of the tokens, and each chunk of queries sees
its sequence up to its own end. Backward sums the gradients of keys and values over the ranks and keeps the own share.

Nothing is approximated and no softmax is merged; the price is a rank's memory, which holds all cp shares of keys and
values where Transformer Engine's ring holds one (launch/memory.py counts them).
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megarubric.megatron.packing import context_share

Ends = tuple[int, ...]  # cumulative lengths of the whole packing, from 0; each length a multiple of 2 cp


def gather_whole(x: Tensor, ends: Ends, group: dist.ProcessGroup) -> Tensor:
    """This rank's share [T / cp, ...] of a packing -> all of it, [T, ...], in the order of the tokens.

    A collective over `group`, forward and backward, in which all its ranks call with the same `ends`.
    """
    held, place = _order(ends, group.size(), x.device)
    whole: Tensor = _GatherWhole.apply(x, held, place, group)
    return whole


def query_chunks(ends: Ends, cp: int, rank: int) -> list[tuple[slice, slice]]:
    """For each chunk of queries of this rank, in the order it holds them: its positions among the rank's [T / cp], and
    those of the keys it sees among all [T], of which the last as many as there are queries are its own."""
    chunks, at = [], 0
    for start, end in itertools.pairwise(ends):
        size = (end - start) // (2 * cp)
        for part in (rank, 2 * cp - 1 - rank):
            chunks.append((slice(at, at + size), slice(start, start + (part + 1) * size)))
            at += size
    return chunks


def causal_band(ends: Ends, cp: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One additive mask for all chunks of a packing, [C, L] for the longest sequence L with chunks of C: 0 or -inf.

    Queries that are the last n of m positions want ``band[:n, L - m + ...]``: see `chunk_mask`.
    """
    longest = max(b - a for a, b in itertools.pairwise(ends))
    return _band(longest // (2 * cp), longest, dtype, device)


def chunk_mask(band: Tensor, n_queries: int, n_keys: int) -> Tensor:
    """The part of `causal_band` [n_queries, n_keys], a view, in which the queries are the last of the keys' positions.

    Views share the band's memory, so that what autograd keeps is one band a micro-batch and not one a layer and chunk.
    """
    before = band.shape[1] - band.shape[0] - (n_keys - n_queries)
    return band[:n_queries, before : before + n_keys]


@lru_cache(maxsize=2)
def _band(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((rows, columns), -torch.inf, dtype=dtype, device=device).triu(columns - rows + 1)


@lru_cache(maxsize=4)
def _order(ends: Ends, cp: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64[T] each: the position that row i of the ranks' concatenated shares holds, and the row of each position."""
    held = np.concatenate([context_share(ends, cp, rank) for rank in range(cp)])
    return torch.from_numpy(held).to(device), torch.from_numpy(np.argsort(held)).to(device)


class _GatherWhole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, held: Tensor, place: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.held, ctx.group = held, group
        shares = x.new_empty((len(held), *x.shape[1:]))
        dist.all_gather_into_tensor(shares, x.contiguous(), group=group)
        return shares[place]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        own = grad.new_empty((len(grad) // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(own, grad[ctx.held], group=ctx.group)
        return own, None, None, None
