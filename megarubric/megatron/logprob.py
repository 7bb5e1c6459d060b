"""Log-probability and entropy of target tokens from vocabulary-sharded logits, in chunks of rows.

The full-precision softmax of a micro-batch would be [P, V] float32: 2.5 GB for 4096 positions of Qwen3's 151,936
tokens. Here a chunk of rows at a time is turned to float32, reduced to a few numbers a row, and thrown away; the
backward pass rebuilds the probabilities chunk by chunk from the saved normaliser.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22  # float32 elements of a chunk: 16 MiB stays near the caches, and is small next to the logits


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    reuse_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy (nats) under softmax(logits / temperature), float32[P] each, differentiable.

    logits: [P, V_local] of any float dtype, this rank's columns [vocab_start, vocab_start + V_local) of the vocabulary;
    columns from `vocab_size` on are padding and have no probability. targets: int64[P], global token ids. group: the
    tensor-parallel group over which the vocabulary is split (two small all-reduces), None for one rank.
    reuse_logits: let backward write the gradient over the logits (they must not be used again).
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, is {temperature}")
    logprobs, entropy = _TokenLogprobs.apply(
        logits, targets, vocab_size, 1.0 / temperature, vocab_start, group, reuse_logits
    )
    return logprobs, entropy


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        vocab_size: int,
        scale: float,
        vocab_start: int,
        group: dist.ProcessGroup | None,
        reuse_logits: bool,
    ) -> tuple[Tensor, Tensor]:
        n_rows = logits.shape[0]
        columns = min(max(vocab_size - vocab_start, 0), logits.shape[1])
        local = targets - vocab_start
        mine = (local >= 0) & (local < columns)
        local = torch.where(mine, local, 0)

        # All is kept relative to the row's peak: at logits of 1e4, float32 resolves absolute ones to 1e-3 only.
        peak = logits.new_full((n_rows,), torch.finfo(torch.float32).min, dtype=torch.float32)
        target = logits.new_zeros(n_rows, dtype=torch.float32)
        sums = logits.new_zeros((2, n_rows), dtype=torch.float32)  # of exp(z - peak) and of exp(z - peak) (z - peak)
        if columns:
            for rows in _chunks(n_rows, logits.shape[1]):
                z = _scaled(logits[rows, :columns], scale)
                target[rows] = z.gather(1, local[rows, None]).squeeze(1) * mine[rows]
                peak[rows] = z.amax(1)
                z = z - peak[rows, None]
                p = torch.exp(z)
                sums[0, rows] = p.sum(1)
                sums[1, rows] = p.mul_(z).sum(1)
        if group is not None and group.size() > 1:
            top = peak.clone()
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
            below = peak - top
            sums[1] += below * sums[0]
            sums *= torch.exp(below)
            both = torch.cat([sums, target[None]])
            dist.all_reduce(both, group=group)
            sums, target, peak = both[:2], both[2], top
        log_sum = sums[0].log()
        entropy = log_sum - sums[1] / sums[0]
        ctx.save_for_backward(logits, local, mine, peak, log_sum, entropy)
        ctx.columns, ctx.scale, ctx.reuse_logits = columns, scale, reuse_logits
        ctx.set_materialize_grads(False)
        return (target - peak) - log_sum, entropy

    @staticmethod
    def backward(ctx: Any, d_logprobs: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, local, mine, peak, log_sum, entropy = ctx.saved_tensors
        columns = ctx.columns
        grad = logits.detach() if ctx.reuse_logits else torch.empty_like(logits)
        if d_logprobs is None:
            d_logprobs = torch.zeros_like(log_sum)
        for rows in _chunks(*logits.shape):
            logp = (_scaled(logits[rows, :columns], ctx.scale) - peak[rows, None]).sub_(log_sum[rows, None])
            p = torch.exp(logp)
            # d logp(target) / dz_j = [j = target] - p_j;   d H / dz_j = -p_j (log p_j + H)
            if d_entropy is not None:
                g = logp.add_(entropy[rows, None]).mul_(-d_entropy[rows, None]).sub_(d_logprobs[rows, None]).mul_(p)
            else:
                g = p.mul_(-d_logprobs[rows, None])
            if columns:
                g.scatter_add_(1, local[rows, None], (d_logprobs[rows] * mine[rows])[:, None])
            if ctx.scale != 1.0:
                g.mul_(ctx.scale)
            grad[rows, :columns] = g.to(grad.dtype)
            grad[rows, columns:] = 0
        return grad, None, None, None, None, None, None


def _scaled(logits: Tensor, scale: float) -> Tensor:
    return logits.float() if scale == 1.0 else logits.float() * scale


def _chunks(n_rows: int, n_columns: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // max(n_columns, 1))
    return [slice(i, min(i + step, n_rows)) for i in range(0, n_rows, step)]
