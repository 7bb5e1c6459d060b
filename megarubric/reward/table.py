"""Rubrics packed for the compiled ops: one flat int32 array, laid out as csrc/rubric_table.h says.

Bytes: 32 for the table, 48 a rubric, 32 a criterion, 16 a pair. A table of 10,000 instance rubrics of 8 criteria is
3 MB and stays in cache; the scores it is applied to are what memory has to deliver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megarubric.errors import BadInput
from megarubric.reward.constants import PAIR_KINDS, RubricConstants, constants_of
from megarubric.reward.numerics import F32

if TYPE_CHECKING:
    from megarubric.rubrics import Rubric

MAGIC = 0x4D525432
MAX_CRITERIA = 0xFFFF  # a pair holds its two criteria as 16-bit indices

HEADER = np.dtype([(n, "<i4") for n in ("magic", "n_rubrics", "max_criteria", "max_pairs", "words", "_0", "_1", "_2")])
RUBRIC = np.dtype(
    [(n, "<i4") for n in ("n_criteria", "n_pairs", "criteria", "pairs", "flags")]
    + [(n, "<f4") for n in ("veto_reward", "kappa", "gain", "power")]
    + [(n, "<i4") for n in ("_0", "_1", "_2")]
)
CRITERION = np.dtype(
    [(n, "<f4") for n in ("weight", "ceiling_weight", "theta", "rate", "span", "tau")]
    + [("flags", "<i4"), ("_0", "<i4")]
)
PAIR = np.dtype([("a", "<u2"), ("b", "<u2"), ("kind", "<i4"), ("weight", "<f4"), ("ceiling_weight", "<f4")])

SHAPED, HAS_PITFALL, MISSING_VETO_FAILS, MISSING_VETO_UNSCORES = 1, 2, 4, 8
SATURATES, VETO, FAILS_HIGH = 1, 2, 4


@dataclass(frozen=True, slots=True)
class RubricTable:
    """`words`: int32, the packed table. `rubrics`: the constants it was packed from, in table order.
    `n_criteria`: int32 [n_rubrics]."""

    words: NDArray[np.int32]
    rubrics: tuple[RubricConstants, ...]
    n_criteria: NDArray[np.int32]
    max_pairs: int

    def offsets(self, rubric_index: NDArray[np.int32]) -> NDArray[np.int64]:
        """CSR offsets int64 [N + 1] of samples that use these rubrics."""
        return np.concatenate(([0], np.cumsum(self.n_criteria[rubric_index], dtype=np.int64)))


def pack_rubrics(rubrics: Sequence[Rubric]) -> RubricTable:
    """Check and pack `rubrics`; `rubric_index` of a sample is a position in this sequence.

    Raises:
        BadInput: what `compile_rubric` refuses, or a rubric of more than 65,535 criteria.
    """
    compiled = tuple(constants_of(r) for r in rubrics)
    for r in compiled:
        if len(r.criteria) > MAX_CRITERIA:
            raise BadInput(f"rubric {r.id}", None, f"has {len(r.criteria)} criteria; the ops take {MAX_CRITERIA}")
    return pack_constants(compiled)


def pack_constants(compiled: tuple[RubricConstants, ...]) -> RubricTable:
    """Pack compiled rubrics."""
    n_criteria = np.array([len(r.criteria) for r in compiled], dtype=np.int32)
    n_pairs = np.array([len(r.pairs) for r in compiled], dtype=np.int32)
    criteria_at = (HEADER.itemsize + RUBRIC.itemsize * len(compiled)) // 4
    pairs_at = criteria_at + CRITERION.itemsize // 4 * int(n_criteria.sum())
    words = pairs_at + PAIR.itemsize // 4 * int(n_pairs.sum())

    header = np.zeros(1, HEADER)
    header[0] = (MAGIC, len(compiled), n_criteria.max(initial=0), n_pairs.max(initial=0), words, 0, 0, 0)
    rubric_rows = np.zeros(len(compiled), RUBRIC)
    rubric_rows["n_criteria"], rubric_rows["n_pairs"] = n_criteria, n_pairs
    rubric_rows["criteria"] = criteria_at + CRITERION.itemsize // 4 * (np.cumsum(n_criteria) - n_criteria)
    rubric_rows["pairs"] = pairs_at + PAIR.itemsize // 4 * (np.cumsum(n_pairs) - n_pairs)
    for name, values in (
        ("flags", [_rubric_flags(r) for r in compiled]),
        ("veto_reward", [r.veto_reward for r in compiled]),
        ("kappa", [r.kappa for r in compiled]),
        ("gain", [r.gain for r in compiled]),
        ("power", [r.power for r in compiled]),
    ):
        rubric_rows[name] = values
    with np.errstate(under="ignore"):
        criterion_rows = np.array(
            [
                (
                    *(c.weight, c.weight * c.ceiling if c.weight > 0 else F32(0), c.theta, c.rate, c.span, c.tau),
                    *(SATURATES * c.saturates | VETO * c.veto | FAILS_HIGH * c.fails_high, 0),
                )
                for r in compiled
                for c in r.criteria
            ],
            CRITERION,
        )
        pair_rows = np.array(
            [
                (p.a, p.b, PAIR_KINDS.index(p.kind), p.weight, p.weight * p.ceiling if p.weight > 0 else F32(0))
                for r in compiled
                for p in r.pairs
            ],
            PAIR,
        )
    parts = (header, rubric_rows, criterion_rows, pair_rows)
    packed = np.concatenate([part.view(np.int32).reshape(-1) for part in parts])
    assert packed.size == words
    return RubricTable(packed, compiled, n_criteria, int(n_pairs.max(initial=0)))


def stack_tables(tables: Sequence[RubricTable]) -> NDArray[np.int32]:
    """Tables of the same rubrics with different parameters, int32 [tables, words], for `ops.sweep`.

    Raises:
        BadInput: when the tables differ in more than parameters (number of rubrics, criteria or pairs).
    """
    first = tables[0]
    for position, table in enumerate(tables):
        same = len(table.rubrics) == len(first.rubrics) and all(
            len(a.criteria) == len(b.criteria) and len(a.pairs) == len(b.pairs)
            for a, b in zip(table.rubrics, first.rubrics)
        )
        if not same:
            raise BadInput("sweep", f"table {position}", "differs from table 0 in more than parameters")
    return np.stack([t.words for t in tables])


def _rubric_flags(r: RubricConstants) -> int:
    return (
        SHAPED * r.shaped
        | HAS_PITFALL * any(bool(c.weight < 0) for c in r.criteria)
        | MISSING_VETO_FAILS * (r.on_missing_veto == "fail")
        | MISSING_VETO_UNSCORES * (r.on_missing_veto == "unscored")
    )
