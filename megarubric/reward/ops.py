"""The compiled reward ops (csrc/, built by setup.py) as torch functions, for CPU and CUDA tensors.

Importing this module loads `_ops.so` when it is there, which registers `torch.ops.megarubric.*` with shapes for
`torch.compile`. The ops take the caller's current CUDA stream and never synchronise, so they can be captured in a CUDA
graph. `megarubric.reward.batch` falls back to the Python reference where no library is there.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megarubric.errors import BadInput

LIBRARY = Path(__file__).with_name("_ops.so")
NOTHING_BAD = 2**63 - 1
log = logging.getLogger("megarubric.reward")


class Aggregated(NamedTuple):
    """Result of `aggregate` for N samples.

    `reward`, `r0`, `r1`: float32 [N], NaN where there is none. `valid`, `vetoed`: bool [N]. `veto`: int32 [N], index of
    the first failing veto criterion in its rubric, -1 for none. `attribution`: float32, laid out like the scores, and
    `pair_attribution`: float32 [N, max_pairs], zero padded; both empty unless asked for. `bad`: int64 [2], see `check`.
    """

    reward: Tensor
    valid: Tensor
    vetoed: Tensor
    veto: Tensor
    r0: Tensor
    r1: Tensor
    attribution: Tensor
    pair_attribution: Tensor
    bad: Tensor


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The loaded library, or None and the reason."""
    if os.environ.get("MEGARUBRIC_NATIVE") == "0":
        return None, "switched off by MEGARUBRIC_NATIVE=0"
    if not LIBRARY.exists():
        return None, "not compiled: pip install --no-deps --no-build-isolation -e . compiles them"
    try:
        torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        return None, f"{LIBRARY.name} does not load: {error.__cause__ or error}"
    library = ctypes.CDLL(str(LIBRARY))
    for name in ("megarubric_cpu_isa", "megarubric_cuda_architectures"):
        getattr(library, name).restype = ctypes.c_char_p
    _register_fakes()
    return library, ""


def available() -> bool:
    """Whether the compiled ops are loaded."""
    return _library()[0] is not None


@functools.cache
def available_or_notice() -> bool:
    """`available`, saying once in one log line why not."""
    if not available():
        log.warning("reward ops: %s", describe())
    return available()


def cpu_instruction_set() -> str:
    """avx512, avx2 or baseline: what the CPU kernels use here."""
    library, reason = _library()
    if library is None:
        raise RuntimeError(f"reward ops {reason}")
    name: bytes = library.megarubric_cpu_isa()
    return name.decode()


def use_cpu_instruction_set(name: str) -> bool:
    """Switch the CPU kernels of this process to another instruction set; False when CPU or build does not have it. The
    results' bits do not depend on it."""
    library, _ = _library()
    return library is not None and bool(library.megarubric_use_cpu_isa(name.encode()))


def cuda_architectures() -> tuple[str, ...]:
    """The architectures the CUDA kernels were compiled for, like sm_90; empty when they were not."""
    library, _ = _library()
    listed: bytes = library.megarubric_cuda_architectures() if library is not None else b""
    return tuple(filter(None, listed.decode().split(",")))


def describe() -> str:
    """One line for people: what is compiled, or why the Python reference is used."""
    library, reason = _library()
    if library is None:
        return f"{reason}; the Python reference is used"
    return f"C++ ({cpu_instruction_set()}), CUDA ({', '.join(cuda_architectures()) or 'not compiled'})"


def aggregate(
    scores: Tensor,
    mask: Tensor | None,
    offsets: Tensor,
    rubric_index: Tensor,
    table: Tensor,
    *,
    attribution: bool = False,
    max_pairs: int = 0,
) -> Aggregated:
    """Rewards of N samples with ragged rubrics, in one pass over the scores.

    Args:
        scores: float32 [nnz], normalised; sample i holds scores[offsets[i]:offsets[i + 1]] in its rubric's order.
        mask: bool [nnz], True where judged; None: everything is.
        offsets: int64 [N + 1].
        rubric_index: int32 [N], position in the packed table.
        table: int32, from `pack_rubrics(...).words`.
        attribution: also return every criterion's and pair's share of r0.
        max_pairs: columns of the pair attribution, at least the table's `max_pairs`.

    Does not raise for bad scores (that would synchronise the device): such samples come out not valid and `check`
    says which.
    """
    ops: Any = torch.ops.megarubric
    return Aggregated(*ops.aggregate(scores, mask, offsets, rubric_index, table, attribution, max_pairs))


def sweep(
    scores: Tensor, mask: Tensor | None, offsets: Tensor, rubric_index: Tensor, tables: Tensor
) -> tuple[Tensor, Tensor]:
    """Rewards under many parameter sets in one pass over the scores: what an ablation over thresholds, saturation,
    weights or shaping needs.

    Args:
        tables: int32 [P, words], from `stack_tables`.

    Returns:
        (reward float32 [P, N], NaN where not valid; bad int64 [2])
    """
    reward, bad = torch.ops.megarubric.sweep(scores, mask, offsets, rubric_index, tables)
    return reward, bad


def check(bad: Tensor, offsets: Tensor) -> None:
    """Raise for what an aggregation could not use. Synchronises.

    Raises:
        BadInput: names the sample and the position of the criterion in its rubric.
    """
    score, sample = (int(x) for x in bad.tolist())
    if sample != NOTHING_BAD:
        raise BadInput("aggregate", f"sample {sample}", "its rubric index or number of scores does not fit the table")
    if score != NOTHING_BAD:
        sample = int(torch.searchsorted(offsets.cpu(), score, right=True)) - 1
        item = f"sample {sample}, criterion {score - int(offsets[sample])}"
        raise BadInput("aggregate", item, "the score is not finite or outside [0, 1]")


def group_order(group: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """(order int64 [N], offsets int64 [n_groups + 1]): samples sorted by group, each group in index order."""
    order = torch.argsort(group, stable=True)
    bounds = torch.arange(n_groups + 1, device=group.device, dtype=group.dtype)
    return order, torch.searchsorted(group[order], bounds)


def group_advantages(
    rewards: Tensor, valid: Tensor, group: Tensor, n_groups: int, mode: str = "standardize"
) -> tuple[Tensor, Tensor]:
    """`megarubric.reward.advantages.group_advantages` on tensors: (advantages float32 [N], degenerate bool [G])."""
    if mode not in ("center", "standardize"):
        raise BadInput("group_advantages", "mode", f"is {mode!r}, not center or standardize")
    order, offsets = group_order(group, n_groups)
    advantages, degenerate = torch.ops.megarubric.group_advantages(
        rewards, valid, offsets, order, mode == "standardize"
    )
    return advantages, degenerate


def objective_wise(
    scores: Tensor,
    mask: Tensor,
    group: Tensor,
    n_groups: int,
    weights: Tensor,
    mean_scores: Tensor | None = None,
    gamma: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`megarubric.reward.advantages.objective_wise` on tensors; mask out a sample that is not valid.

    `weights` and `mean_scores`: [K] or [n_groups, K].
    """
    if gamma < 0 or (gamma > 0 and mean_scores is None):
        raise BadInput("objective_wise", "gamma", f"is {gamma:g}; it must be >= 0, and above 0 it needs mean_scores")
    effective = weights.double()
    if mean_scores is not None and gamma > 0:
        effective = effective * (1.0 - mean_scores.double()) ** gamma
    effective = effective.float().expand(n_groups, scores.shape[1]).contiguous()
    order, offsets = group_order(group, n_groups)
    advantages, degenerate = torch.ops.megarubric.objective_wise(scores, mask, offsets, order, effective)
    return advantages, degenerate


def tier_expectation(
    logprobs: Tensor, values: Tensor, min_tier_mass: float = 0.5, token_ids: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Expected tier value, entropy (nats), tier mass (float32 [N]) and read (bool [N]).

    Args:
        logprobs: float32 or bfloat16; [N, T] log-probabilities of the tier tokens, or, with `token_ids`, [N, V] logits
            of the whole vocabulary (read once; no log-softmax is stored).
        values: float32 [T].
        token_ids: int64 [T], the tiers' tokens.
    """
    ops: Any = torch.ops.megarubric
    if token_ids is None:
        out = ops.tier_expectation(logprobs, values, min_tier_mass)
    else:
        out = ops.tier_expectation_logits(logprobs, token_ids, values, min_tier_mass)
    value, entropy, mass, read = out
    return value, entropy, mass, read


def weight_digest(buffer: Tensor, table: Tensor, tiles: int, tile_bytes: int) -> Tensor:
    """Digests of tensors in a buffer (``sum128`` of `megarubric.exchange.digest`), one pass over their bytes.

    Args:
        buffer: uint8 [bytes]; tensors that begin at 16-byte boundaries are read 16 bytes at a time.
        table: int64 [n, 3] on any device: offset, nbytes and first tile of each tensor; a tile is `tile_bytes` (a
            multiple of 16) of one tensor or its last bytes, numbered through in the order of the table.
        tiles: how many there are together.

    Returns:
        int64 [n, 2], the two sums, to be read as unsigned.
    """
    digests: Tensor = torch.ops.megarubric.weight_digest(buffer, table.to(buffer.device), tile_bytes, tiles)
    return digests


def _fake_aggregate(
    scores: Tensor, mask: Any, offsets: Tensor, rubric: Tensor, table: Tensor, attribution: bool, max_pairs: int
) -> tuple[Tensor, ...]:
    n = rubric.shape[0]
    flags = [scores.new_empty(n, dtype=torch.bool) for _ in range(2)]
    veto = scores.new_empty(n, dtype=torch.int32)
    shares = scores.new_empty(scores.shape[0] if attribution else 0)
    pair_shares = scores.new_empty((n if attribution else 0, max_pairs))
    bad = scores.new_empty(2, dtype=torch.int64)
    reward, r0, r1 = (scores.new_empty(n) for _ in range(3))
    return reward, *flags, veto, r0, r1, shares, pair_shares, bad


def _fake_sweep(scores: Tensor, mask: Any, offsets: Tensor, rubric: Tensor, tables: Tensor) -> tuple[Tensor, ...]:
    return scores.new_empty((tables.shape[0], rubric.shape[0])), scores.new_empty(2, dtype=torch.int64)


def _fake_advantages(values: Tensor, valid: Tensor, offsets: Tensor, order: Any, last: Any) -> tuple[Tensor, ...]:
    return values.new_empty(values.shape[0]), values.new_empty(offsets.shape[0] - 1, dtype=torch.bool)


def _fake_tiers(rows: Tensor, *_: Any) -> tuple[Tensor, ...]:
    n = rows.shape[0]
    real = [rows.new_empty(n, dtype=torch.float32) for _ in range(3)]
    return *real, rows.new_empty(n, dtype=torch.bool)


def _fake_digest(buffer: Tensor, table: Tensor, tile_bytes: int, tiles: int) -> Tensor:
    return table.new_empty((table.shape[0], 2))


def _register_fakes() -> None:
    """Shapes and dtypes for tracing."""
    for name, fake in (
        ("aggregate", _fake_aggregate),
        ("sweep", _fake_sweep),
        ("group_advantages", _fake_advantages),
        ("objective_wise", _fake_advantages),
        ("tier_expectation", _fake_tiers),
        ("tier_expectation_logits", _fake_tiers),
        ("weight_digest", _fake_digest),
    ):
        torch.library.register_fake(f"megarubric::{name}", fake)


_library()
