"""Variable-length sequences -> packed micro-batches, and back to one value a token.

Positions and tokens: position p of a packed micro-batch holds an input token and *predicts* the next token of its
sequence. All per-token arrays of a `TrainBatch` speak about the predicted token; `MicroBatch.token_index[p]` says
which one, so `gather` and `scatter` are the only two places that know the shift by one.

Pure numpy, deterministic, the same on CPU and GPU. Nothing here depends on the values of tokens, only on lengths: two
batches with the same lengths are packed alike, which is what makes the first KL exactly zero.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams


@dataclass(frozen=True)
class PackSettings:
    """How sequences are laid out.

    budget: most tokens of a micro-batch before padding (a longer sequence gets a micro-batch to itself).
    dp: data-parallel ranks; every rank gets equally many micro-batches.
    micro_batch_multiple: the number of micro-batches is a multiple of it (interleaved pipelines need that).
    sequence_multiple: each sequence is padded to it (2 * cp, so that each context-parallel rank gets two equal chunks).
    total_multiple: a micro-batch is padded to it (tp for sequence parallelism, and the GEMM alignment of FP8).
    """

    budget: int
    dp: int = 1
    micro_batch_multiple: int = 1
    sequence_multiple: int = 1
    total_multiple: int = 1


@dataclass(frozen=True)
class MicroBatch:
    """P packed positions of n sequences, padding included (n = 0: padding only, it keeps pipeline stages in step).

    sequences int64[n] batch rows; input_ids, targets, position_ids int64[P]; token_index int64[P] is the flat batch
    index of the predicted token, -1 where nothing is predicted (last token of a sequence, padding); input_index
    int64[P] that of the input token, -1 for padding; segment int64[P] the sequence's number in 0..n-1, n for padding.
    cu_seqlens and cu_seqlens_padded int32[n + 1 (+ 1 for the tail)].
    """

    sequences: NDArray[np.int64]
    input_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    token_index: NDArray[np.int64]
    input_index: NDArray[np.int64]
    segment: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]
    cu_seqlens_padded: NDArray[np.int32]

    @property
    def size(self) -> int:
        return len(self.input_ids)

    @property
    def real_tokens(self) -> int:
        return int((self.segment < len(self.sequences)).sum())

    def gather(self, per_token: NDArray[Any]) -> NDArray[Any]:
        """[T] values about tokens -> [P] at the positions that predict them, 0 where nothing is predicted."""
        return np.where(self.token_index >= 0, per_token[self.token_index], 0).astype(per_token.dtype)

    def scatter(self, values: NDArray[Any], out: NDArray[Any]) -> None:
        """[P] values at positions -> into [T] `out` at the tokens they predict."""
        valid = self.token_index >= 0
        out[self.token_index[valid]] = values[valid]

    def context_slice(self, cp: int, rank: int) -> NDArray[np.int64]:
        """Positions that context-parallel rank `rank` of `cp` holds, int64[P / cp]; see `context_share`."""
        return context_share(self.cu_seqlens_padded, cp, rank)

    def packed_seq_params(self, device: torch.device) -> PackedSeqParams:
        """Megatron's description of the packing (thd format)."""
        import torch
        from megatron.core.packed_seq_params import PackedSeqParams

        real = torch.from_numpy(self.cu_seqlens).to(device)
        same = np.array_equal(self.cu_seqlens, self.cu_seqlens_padded)
        padded = None if same else torch.from_numpy(self.cu_seqlens_padded).to(device)
        longest = int(np.diff(self.cu_seqlens_padded).max())
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=real,
            cu_seqlens_kv=real,
            cu_seqlens_q_padded=padded,
            cu_seqlens_kv_padded=padded,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )


def context_share(ends: Sequence[int] | NDArray[np.int32], cp: int, rank: int) -> NDArray[np.int64]:
    """Positions of a packing that context-parallel rank r of `cp` holds: chunks r and 2 cp - 1 - r of each sequence.

    ends: cumulative lengths from 0, each length a multiple of 2 cp. int64[T / cp], in the order the rank holds them:
    sequence by sequence, the early chunk first. It is Transformer Engine's `thd_get_partitioned_indices`, and what
    Megatron's rotary angles of packed sequences assume.
    """
    if cp == 1:
        return np.arange(ends[-1], dtype=np.int64)
    kept = []
    for start, end in itertools.pairwise(int(e) for e in ends):
        chunk = (end - start) // (2 * cp)
        for part in (rank, 2 * cp - 1 - rank):
            kept.append(np.arange(start + part * chunk, start + (part + 1) * chunk, dtype=np.int64))
    return np.concatenate(kept)


def plan(
    lengths: NDArray[np.int32], updates: NDArray[np.int32] | None, settings: PackSettings
) -> list[list[list[NDArray[np.int64]]]]:
    """Which sequences go where: ``plan[update][dp rank][micro-batch]`` = batch rows, int64, in rising order.

    Every DP rank of an update has the same number of micro-batches; some may be empty. Longest-processing-time
    bin packing: bins differ by at most one sequence's length; the bins of one micro-batch step are neighbours in size,
    so ranks that wait for each other (expert all-to-all, pipeline) have about equal work.
    """
    rows = np.arange(len(lengths))
    n_updates = 1 if updates is None else int(updates.max()) + 1
    return [_plan_update(lengths, rows if updates is None else rows[updates == u], settings) for u in range(n_updates)]


def _plan_update(
    lengths: NDArray[np.int32], rows: NDArray[np.int64], settings: PackSettings
) -> list[list[NDArray[np.int64]]]:
    sizes = lengths[rows].astype(np.int64)
    budget = max(settings.budget, int(sizes.max(initial=1)))
    step = settings.dp * settings.micro_batch_multiple
    n_bins = step * max(1, -(-int(sizes.sum()) // (budget * step)))
    while True:
        bins, loads = _longest_first(sizes, n_bins)
        if max(loads) <= budget:
            break
        n_bins += step
    order = sorted(range(n_bins), key=lambda b: (-loads[b], b))
    per_rank: list[list[NDArray[np.int64]]] = [[] for _ in range(settings.dp)]
    for i in range(0, n_bins, settings.dp):
        dealt = order[i : i + settings.dp]
        for rank, b in enumerate(dealt if (i // settings.dp) % 2 == 0 else reversed(dealt)):
            per_rank[rank].append(rows[np.sort(np.array(bins[b], dtype=np.int64))])
    return per_rank


def _longest_first(sizes: NDArray[np.int64], n_bins: int) -> tuple[list[list[int]], list[int]]:
    bins: list[list[int]] = [[] for _ in range(n_bins)]
    loads = [0] * n_bins
    heap = [(0, b) for b in range(n_bins)]
    for i in np.argsort(-sizes, kind="stable"):
        load, b = heapq.heappop(heap)
        bins[b].append(int(i))
        loads[b] = load + int(sizes[i])
        heapq.heappush(heap, (loads[b], b))
    return bins, loads


def pack(
    rows: Sequence[int] | NDArray[np.int64],
    tokens: NDArray[np.int32],
    lengths: NDArray[np.int32],
    settings: PackSettings,
) -> MicroBatch:
    """Lay the batch rows `rows` of concatenated `tokens` out as one micro-batch.

    The tail that pads to `total_multiple` is a sequence of its own, so no real token attends to it.
    """
    rows = np.asarray(rows, dtype=np.int64)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    real = lengths[rows].astype(np.int64)
    padded = _round_up(real, settings.sequence_multiple)
    total = _round_up(max(int(padded.sum()), 1), np.lcm(settings.total_multiple, settings.sequence_multiple))
    tail = total - int(padded.sum())

    input_ids = np.zeros(total, dtype=np.int64)
    targets = np.zeros(total, dtype=np.int64)
    position_ids = np.zeros(total, dtype=np.int64)
    token_index = np.full(total, -1, dtype=np.int64)
    input_index = np.full(total, -1, dtype=np.int64)
    segment = np.full(total, len(rows), dtype=np.int64)
    offset = 0
    for k, (row, n, n_padded) in enumerate(zip(rows, real, padded)):
        first = starts[row]
        input_ids[offset : offset + n] = tokens[first : first + n]
        targets[offset : offset + n - 1] = tokens[first + 1 : first + n]
        token_index[offset : offset + n - 1] = np.arange(first + 1, first + n)
        input_index[offset : offset + n] = np.arange(first, first + n)
        position_ids[offset : offset + n_padded] = np.arange(n_padded)
        segment[offset : offset + n] = k
        offset += n_padded
    position_ids[offset:] = np.arange(tail)

    ends, ends_padded = np.cumsum(real), np.cumsum(padded)
    if tail:
        ends = np.append(ends, (ends[-1] if len(ends) else 0) + tail)
        ends_padded = np.append(ends_padded, total)
    zero = np.zeros(1, dtype=np.int64)
    return MicroBatch(
        sequences=rows,
        input_ids=input_ids,
        targets=targets,
        position_ids=position_ids,
        token_index=token_index,
        input_index=input_index,
        segment=segment,
        cu_seqlens=np.concatenate([zero, ends]).astype(np.int32),
        cu_seqlens_padded=np.concatenate([zero, ends_padded]).astype(np.int32),
    )


def _round_up(n: Any, multiple: int) -> Any:
    return -(-n // multiple) * multiple
