"""Rewards of many samples at once: by the compiled op where it is there, by the reference where not; the same bits."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megarubric.errors import BadInput
from megarubric.reward.numerics import F32
from megarubric.reward.reference import SCORE_TOLERANCE, RewardResult, aggregate_scores, checked_score
from megarubric.reward.table import RubricTable, pack_rubrics

if TYPE_CHECKING:
    from megarubric.rubrics import Rubric

Scores = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class RewardBatch:
    """Rewards of N samples, as arrays; `result` gives one sample with names.

    Attributes:
        table: the packed rubrics.
        rubric_index: int32 [N].
        reward, r0, r1: float32 [N], NaN where there is none.
        valid, vetoed: bool [N].
        veto: int32 [N], index of the first failing veto criterion in the sample's rubric; -1: none.
        offsets: int64 [N + 1]; attribution: float32 [offsets[-1]], criteria in rubric order;
        pair_attribution: float32 [N, table.max_pairs].
    """

    table: RubricTable
    rubric_index: NDArray[np.int32]
    reward: NDArray[np.float32]
    valid: NDArray[np.bool_]
    vetoed: NDArray[np.bool_]
    veto: NDArray[np.int32]
    r0: NDArray[np.float32]
    r1: NDArray[np.float32]
    offsets: NDArray[np.int64]
    attribution: NDArray[np.float32]
    pair_attribution: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.reward)

    def result(self, i: int) -> RewardResult:
        """Sample i as the reference would return it."""
        return self.results(i, i + 1)[0]

    def results(self, begin: int = 0, end: int | None = None) -> list[RewardResult]:
        """Samples [begin, end) as the reference would return them."""
        window = slice(begin, len(self) if end is None else end)
        first = int(self.offsets[begin]) if len(self) else 0
        columns = (self.reward, self.valid, self.vetoed, self.veto, self.r0, self.r1, self.pair_attribution)
        rows = zip(self.rubric_index[window].tolist(), *(c[window].tolist() for c in columns))
        shares = self.attribution[first : int(self.offsets[window.stop])].tolist()
        names = [(tuple(c.id for c in r.criteria), tuple(p.key for p in r.pairs)) for r in self.table.rubrics]
        out = []
        at = 0
        for rubric, reward, valid, vetoed, veto, r0, r1, pair_shares in rows:
            criteria, pairs = names[rubric]
            attribution = dict(zip(criteria, shares[at : at + len(criteria)]))
            at += len(criteria)
            for key, share in zip(pairs, pair_shares):  # two pairs of the same criteria share a key
                attribution[key] = float(F32(attribution[key]) + F32(share)) if key in attribution else share
            name = criteria[veto] if veto >= 0 else None
            out.append(RewardResult(_or_none(reward), valid, vetoed, name, _or_none(r0), _or_none(r1), attribution))
        return out


def aggregate_batch(
    rubrics: Sequence[Rubric],
    rubric_index: ArrayLike,
    scores: Sequence[Scores],
    samples: Sequence[object] | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
) -> RewardBatch:
    """Rewards of N samples; exactly `reference.aggregate` of each.

    Args:
        rubrics: the distinct rubrics.
        rubric_index: int [N], which of them sample i is scored by.
        scores: per sample, normalised score per criterion id; None or absent is masked.
        samples: how error messages call the samples; default their positions.
        device: where the compiled op runs.

    Raises:
        BadInput: as `reference.aggregate`, naming rubric, criterion and sample; for a rubric index out of range.
    """
    index = np.asarray(rubric_index, dtype=np.int32).reshape(-1)
    if len(index) != len(scores):
        raise BadInput("aggregate_batch", "rubric_index", f"has {len(index)} entries for {len(scores)} samples")
    if index.size and (int(index.min()) < 0 or int(index.max()) >= len(rubrics)):
        raise BadInput("aggregate_batch", "rubric_index", f"has entries outside 0..{len(rubrics) - 1}")
    table = pack_rubrics(rubrics)
    offsets = table.offsets(index)
    values, mask = _flatten(table, index, offsets, scores, samples)
    if device == "cuda" or _compiled():
        return _by_op(table, index, offsets, values, mask, device)
    return _by_reference(table, index, offsets, values, mask)


def score_samples(
    rubrics: Sequence[Rubric],
    scores: Sequence[Scores],
    device: Literal["cpu", "cuda"] = "cpu",
    samples: Sequence[object] | None = None,
) -> list[RewardResult]:
    """Rewards of N samples that come each with its rubric ([N] rubrics, repeated objects packed once)."""
    place: dict[int, int] = {}
    distinct: list[Rubric] = []
    index = []
    for rubric in rubrics:
        if id(rubric) not in place:
            place[id(rubric)] = len(distinct)
            distinct.append(rubric)
        index.append(place[id(rubric)])
    return aggregate_batch(distinct, index, scores, samples, device).results()


@functools.cache
def _compiled() -> bool:
    """Whether the compiled op is there; a machine without torch still scores."""
    try:
        from megarubric.reward import ops
    except ImportError:
        return False
    return ops.available_or_notice()


def _or_none(x: float) -> float | None:
    return None if x != x else x  # NaN


def _flatten(
    table: RubricTable,
    index: NDArray[np.int32],
    offsets: NDArray[np.int64],
    scores: Sequence[Scores],
    samples: Sequence[object] | None,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Scores float32 [nnz] and mask bool [nnz] in CSR order, checked in float64 as the contract says."""
    names = [tuple(c.id for c in r.criteria) for r in table.rubrics]
    known = [frozenset(n) for n in names]
    flat: list[float | None] = []
    for i, (rubric, row) in enumerate(zip(index.tolist(), scores)):
        if not known[rubric].issuperset(row):
            name = next(n for n in row if n not in known[rubric])
            item = f"criterion {name}, sample {i if samples is None else samples[i]}"
            raise BadInput(f"rubric {table.rubrics[rubric].id}", item, "the rubric has no such criterion")
        get = row.get
        flat.extend([get(name) for name in names[rubric]])
    mask = np.array([v is not None for v in flat], dtype=bool)
    try:  # array("d") takes numbers only; NumPy would read strings
        values = np.frombuffer(array("d", [0.0 if v is None else v for v in flat]), dtype=np.float64)
    except (TypeError, OverflowError):
        values = np.full(len(flat), np.nan)
    suspects = np.flatnonzero(mask & ~((values >= -SCORE_TOLERANCE) & (values <= 1 + SCORE_TOLERANCE)))
    for at in suspects.tolist():  # raises at the first bad one
        i = int(np.searchsorted(offsets, at, side="right")) - 1
        rubric = int(index[i])
        criterion = names[rubric][at - int(offsets[i])]
        checked_score(table.rubrics[rubric].id, criterion, i if samples is None else samples[i], flat[at])
    return values.astype(np.float32), mask


def _by_op(
    table: RubricTable,
    index: NDArray[np.int32],
    offsets: NDArray[np.int64],
    values: NDArray[np.float32],
    mask: NDArray[np.bool_],
    device: str,
) -> RewardBatch:
    import torch

    from megarubric.reward import ops

    if device == "cuda" and not (ops.cuda_architectures() and torch.cuda.is_available()):
        raise BadInput("reward ops", "cuda", f"not usable here; {ops.describe()}")
    arrays = (values, mask, offsets, index, table.words)
    scores_t, mask_t, offsets_t, index_t, table_t = (torch.from_numpy(a).to(device) for a in arrays)
    out = ops.aggregate(scores_t, mask_t, offsets_t, index_t, table_t, attribution=True, max_pairs=table.max_pairs)
    ops.check(out.bad, offsets_t)
    reward, valid, vetoed, veto, r0, r1, attribution, pair_attribution = (t.cpu().numpy() for t in out[:8])
    return RewardBatch(table, index, reward, valid, vetoed, veto, r0, r1, offsets, attribution, pair_attribution)


def _by_reference(
    table: RubricTable,
    index: NDArray[np.int32],
    offsets: NDArray[np.int64],
    values: NDArray[np.float32],
    mask: NDArray[np.bool_],
) -> RewardBatch:
    n = len(index)
    reward, r0, r1 = (np.full(n, np.nan, np.float32) for _ in range(3))
    valid, vetoed = np.zeros(n, bool), np.zeros(n, bool)
    veto = np.full(n, -1, np.int32)
    attribution = np.zeros(len(values), np.float32)
    pair_attribution = np.zeros((n, table.max_pairs), np.float32)
    for i in range(n):
        rubric = table.rubrics[index[i]]
        row = slice(int(offsets[i]), int(offsets[i + 1]))
        s: list[F32 | None] = [F32(v) if m else None for v, m in zip(values[row], mask[row])]
        with np.errstate(over="ignore", under="ignore"):
            out = aggregate_scores(rubric, s)
        reward[i] = np.nan if out.reward is None else out.reward
        valid[i], vetoed[i] = out.valid, out.vetoed
        veto[i] = out.veto
        r0[i] = np.nan if out.r0 is None else out.r0
        r1[i] = np.nan if out.r1 is None else out.r1
        attribution[row] = out.criterion_shares
        pair_attribution[i, : len(rubric.pairs)] = out.pair_shares
    return RewardBatch(table, index, reward, valid, vetoed, veto, r0, r1, offsets, attribution, pair_attribution)
