"""Near-duplicate rubrics: MinHash over word 4-grams, banded look-up, exact check of the candidates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from megarubric.rubrics.lint.model import declare
from megarubric.rubrics.lint.wording import word_list
from megarubric.rubrics.schema import Rubric

GRAM = 4
BANDS, ROWS = 16, 8  # a pair with Jaccard similarity 0.8 shares a band with probability 0.95, 0.9 with 0.9999
OVERLAP = 0.8
SEED = 20250812

declare(
    "near-duplicate",
    "A rubric that repeats another (Jaccard similarity of word 4-grams over 0.8) weights its prompt twice and makes "
    "held-out sets leak.",
    "two rubrics that differ in one name",
)


def rubric_text(rubric: Rubric) -> str:
    """The words two rubrics are compared by: prompt, descriptions, tier texts, and the checks' arguments."""
    parts = [rubric.prompt or "", rubric.title]
    for c in rubric.criteria:
        parts.append(c.description)
        parts += [t.text for t in c.tiers or ()]
        if c.check is not None:
            parts.append(f"{c.check.kind} {c.check.params}")
    return "\n".join(parts)


def grams(texts: Iterable[str]) -> list[NDArray[np.uint64]]:
    """The set of word 4-grams of every text, as sorted 64-bit hashes; a shorter text is one gram."""
    vocabulary: dict[str, int] = {}
    out = []
    multipliers = np.random.default_rng(SEED).integers(1, 2**63, GRAM, dtype=np.uint64) | np.uint64(1)
    for text in texts:
        ids = np.array([vocabulary.setdefault(w, len(vocabulary)) for w in word_list(text)], dtype=np.uint64)
        ids = (ids + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # spreads small numbers over 64 bits
        if len(ids) < GRAM:
            ids = np.concatenate([ids, np.zeros(GRAM - len(ids), dtype=np.uint64)])
        mixed = np.zeros(len(ids) - GRAM + 1, dtype=np.uint64)
        for k in range(GRAM):
            part = ids[k : len(ids) - GRAM + 1 + k]
            mixed += (part ^ (part >> np.uint64(29))) * multipliers[k]
        out.append(np.unique(mixed))
    return out


def signatures(sets: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """MinHash signatures [n, BANDS * ROWS] by multiply-shift hashing."""
    rng = np.random.default_rng(SEED)
    a = rng.integers(1, 2**63, BANDS * ROWS, dtype=np.uint64) | np.uint64(1)
    b = rng.integers(0, 2**63, BANDS * ROWS, dtype=np.uint64)
    out = np.empty((len(sets), BANDS * ROWS), dtype=np.uint64)
    for i, grams_i in enumerate(sets):
        out[i] = (grams_i[:, None] * a + b).min(axis=0)
    return out


def jaccard(x: NDArray[np.uint64], y: NDArray[np.uint64]) -> float:
    """|x & y| / |x | y| of two sorted sets."""
    shared = len(np.intersect1d(x, y, assume_unique=True))
    return shared / (len(x) + len(y) - shared)


def near_duplicates(rubrics: Sequence[Rubric], overlap: float = OVERLAP) -> list[tuple[int, int, float]]:
    """(later, earlier, similarity) for every rubric that is over `overlap` like an earlier one: the most alike of the
    first in each band. Deterministic; about 2 s for 10,000 rubrics of 250 words."""
    sets = grams(rubric_text(r) for r in rubrics)
    marks = signatures(sets)
    candidates: defaultdict[int, set[int]] = defaultdict(set)
    for band in range(BANDS):
        first: dict[bytes, int] = {}
        for i, row in enumerate(np.ascontiguousarray(marks[:, band * ROWS : (band + 1) * ROWS])):
            earlier = first.setdefault(row.tobytes(), i)
            if earlier != i:
                candidates[i].add(earlier)
    found = []
    for i in sorted(candidates):
        best = max((jaccard(sets[i], sets[j]), -j) for j in candidates[i])
        if best[0] > overlap:
            found.append((i, -best[1], best[0]))
    return found
