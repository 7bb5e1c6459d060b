"""What a corpus holds, in numbers: one JSON object, or tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from megarubric.rubrics.lint.near import near_duplicates
from megarubric.rubrics.lint.weights import absence_share, asks_for_absence
from megarubric.rubrics.schema import FAMILIES, SCOPES, Rubric


def corpus_stats(rubrics: Sequence[Rubric]) -> dict[str, Any]:
    """Counts of a corpus, ready for JSON.

    `absence_weight` is the share of all absolute weight on absence, limits or correctness; `mixed` the share of rubrics
    with both a check and a judged criterion; `near_duplicates` the share that repeats an earlier rubric (word 4-grams,
    Jaccard similarity over 0.8); distributions are {value: count} or five-number summaries.
    """
    criteria = [c for r in rubrics for c in r.criteria]
    checks = [c.check.kind for c in criteria if c.check is not None]
    total = sum(abs(c.weight) for c in criteria)
    return {
        "rubrics": len(rubrics),
        "criteria": len(criteria),
        "criteria_per_rubric": round(len(criteria) / len(rubrics), 3) if rubrics else 0.0,
        "judged": len(criteria) - len(checks),
        "checks": len(checks),
        "mixed": _share(rubrics, lambda r: 0 < sum(c.check is not None for c in r.criteria) < len(r.criteria)),
        "vetoes": sum(c.veto is not None for c in criteria),
        "pitfalls": sum(c.weight < 0 for c in criteria),
        "pairs": sum(len(r.pairs) for r in rubrics),
        "saturated": sum(c.saturation is not None for c in criteria),
        "shaped": sum(r.shaping is not None for r in rubrics),
        "with_prompt": sum(r.prompt is not None for r in rubrics),
        "with_reference": sum(r.reference is not None for r in rubrics),
        "chinese": sum(_chinese(r) for r in rubrics),
        "absence_weight": round(sum(abs(c.weight) for c in criteria if asks_for_absence(c)) / total, 4)
        if total
        else None,
        "near_duplicates": round(len(near_duplicates(rubrics)) / len(rubrics), 4) if rubrics else 0.0,
        "presence_only": sum((absence_share(r) or 0.0) == 0.0 for r in rubrics),
        "scope": {s: sum(r.scope == s for r in rubrics) for s in SCOPES},
        "family": {f or "none": sum(r.family == f for r in rubrics) for f in (*FAMILIES, None)},
        "scope_by_family": {
            s: {
                f or "none": n for f in (*FAMILIES, None) if (n := sum(r.scope == s and r.family == f for r in rubrics))
            }
            for s in SCOPES
        },
        "author": dict(Counter(r.provenance.author if r.provenance else "none" for r in rubrics).most_common()),
        "licence": dict(Counter(r.provenance.licence if r.provenance else "none" for r in rubrics).most_common()),
        "source": dict(Counter(r.provenance.source if r.provenance else "none" for r in rubrics).most_common(20)),
        "tiers": dict(sorted(Counter(len(c.tiers) if c.tiers else 2 for c in criteria if c.check is None).items())),
        "check_kinds": dict(Counter(checks).most_common()),
        "criteria_counts": dict(sorted(Counter(len(r.criteria) for r in rubrics).items())),
        "weight": _summary(c.weight for c in criteria),
        "description_characters": _summary(len(c.description) for c in criteria),
        "prompt_characters": _summary(len(r.prompt) for r in rubrics if r.prompt),
    }


def _share(rubrics: Sequence[Rubric], holds: Any) -> float:
    return round(sum(map(bool, map(holds, rubrics))) / len(rubrics), 4) if rubrics else 0.0


def _chinese(rubric: Rubric) -> bool:
    text = (rubric.prompt or "") + "".join(c.description for c in rubric.criteria)
    return sum("\u4e00" <= ch <= "\u9fff" for ch in text) > 0.2 * len(text)


def _summary(values: Iterable[float]) -> dict[str, float] | None:
    ordered = sorted(values)
    if not ordered:
        return None
    names = ("min", "p25", "median", "p75", "max")
    return {name: ordered[round(q * (len(ordered) - 1))] for name, q in zip(names, (0, 0.25, 0.5, 0.75, 1))}


def print_stats(stats: dict[str, Any], console: Console) -> None:
    """The same numbers as tables."""
    console.print(
        f"[bold]{stats['rubrics']:,}[/] rubrics, [bold]{stats['criteria']:,}[/] criteria "
        f"({stats['criteria_per_rubric']:.1f} a rubric): {stats['judged']:,} judged, {stats['checks']:,} checks, "
        f"{stats['vetoes']:,} vetoes, {stats['pitfalls']:,} pitfalls, {stats['pairs']:,} pairs"
    )
    absence = "-" if stats["absence_weight"] is None else f"{stats['absence_weight']:.0%}"
    console.print(
        f"{stats['mixed']:.0%} of the rubrics mix checks and judged criteria; {absence} of the weight is on absence, "
        f"limits or correctness; {stats['presence_only']:,} rubrics reward presence only; "
        f"{stats['near_duplicates']:.1%} near-duplicates; {stats['chinese']:,} in Chinese"
    )
    table = Table(title="Rubrics by scope and family", title_justify="left")
    families = [f for f in stats["family"] if stats["family"][f]]
    table.add_column("scope")
    for name in (*families, "all"):
        table.add_column(name, justify="right")
    for scope, row in stats["scope_by_family"].items():
        table.add_row(scope, *(f"{row.get(f, 0):,}" for f in families), f"{stats['scope'][scope]:,}")
    table.add_row("all", *(f"{stats['family'][f]:,}" for f in families), f"{stats['rubrics']:,}")
    console.print(table)
    for title, key in (
        ("Written by", "author"),
        ("Licence", "licence"),
        ("Criteria in a rubric", "criteria_counts"),
        ("Tiers of a judged criterion", "tiers"),
        ("Checks", "check_kinds"),
    ):
        if stats[key]:
            console.print(f"[bold]{title}[/]")
            _bars(stats[key], console)


def _bars(counts: dict[Any, int], console: Console) -> None:
    most = max(counts.values())
    width = max(len(str(k) or "-") for k in counts)
    for name, n in counts.items():
        console.print(
            f"  {str(name) or '-':<{width}}  {n:>7,}  [cyan]{'█' * max(1, round(30 * n / most))}[/]", highlight=False
        )
