"""The corpus in pictures, and a random sample of it to read.

    python tools/corpus/pictures.py                        docs/corpus/*.svg and docs/corpus_sample.md
    python tools/corpus/pictures.py --seed 7 --sample 40   another sample

Needs matplotlib, which is no part of the environment (pip install matplotlib).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megarubric.rubrics import load_rubrics
from megarubric.rubrics.lint.weights import absence_share
from megarubric.rubrics.lint.wording import word_list
from megarubric.rubrics.schema import FAMILIES, Criterion, Rubric

try:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
except ModuleNotFoundError:
    sys.exit("pictures.py: needs matplotlib (pip install matplotlib)")

ROOT = Path(__file__).parents[2]
COLOURS = {"dataset": "#8c510a", "task": "#d8b365", "instance": "#5ab4ac"}
JUDGED, CHECKED = "#01665e", "#bf812d"


def _axes(title: str, x: str, y: str = "rubrics", size: tuple[float, float] = (6.4, 3.4)) -> tuple[plt.Figure, Axes]:
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def scope_by_family(rubrics: Sequence[Rubric]) -> plt.Figure:
    """Instance rubrics as bars, task and dataset rubrics as numbers beside them (they are too few to see)."""
    count = Counter((r.scope, r.family) for r in rubrics)
    families = sorted(FAMILIES, key=lambda f: count["instance", f])
    figure, axes = _axes("Rubrics by family", "instance rubrics", "")
    bars = axes.barh(families, [count["instance", f] for f in families], color=COLOURS["instance"])
    labels = [f"{count['instance', f]:,}  + {count['task', f]} task, {count['dataset', f]} dataset" for f in families]
    axes.bar_label(bars, labels, padding=4, fontsize=8)
    axes.margins(x=0.35)
    return figure


def criteria_per_rubric(rubrics: Sequence[Rubric]) -> plt.Figure:
    """Stacked: how many rubrics have n criteria, with and without checks among them."""
    mixed = Counter(len(r.criteria) for r in rubrics if any(c.check for c in r.criteria))
    judged = Counter(len(r.criteria) for r in rubrics if not any(c.check for c in r.criteria))
    sizes = sorted(mixed | judged)
    figure, axes = _axes("Criteria in a rubric", "criteria")
    axes.bar(sizes, [judged[n] for n in sizes], color=JUDGED, label="judged only")
    axes.bar(sizes, [mixed[n] for n in sizes], bottom=[judged[n] for n in sizes], color=CHECKED, label="with checks")
    axes.set_xticks(sizes)
    axes.legend(frameon=False)
    return figure


def weights(rubrics: Sequence[Rubric]) -> plt.Figure:
    """Share of a rubric's weight on absence, limits or correctness, by family."""
    shares = {f: [s for r in rubrics if r.family == f and (s := absence_share(r)) is not None] for f in FAMILIES}
    figure, axes = _axes("Weight on absence, limits or correctness", "share of a rubric's weight", "")
    axes.boxplot(
        list(shares.values()),
        orientation="horizontal",
        tick_labels=list(shares),
        whis=(5, 95),
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": "#c7eae5"},
        medianprops={"color": "black"},
    )
    axes.set_xlim(0, 1)
    return figure


def lengths(rubrics: Sequence[Rubric]) -> plt.Figure:
    """Words of prompts, descriptions and tier texts (a Chinese character is a word)."""
    texts = {
        "prompt": [len(word_list(r.prompt)) for r in rubrics if r.prompt],
        "description": [len(word_list(c.description)) for r in rubrics for c in r.criteria],
        "tier text": [len(word_list(t.text)) for r in rubrics for c in r.criteria for t in c.tiers or ()],
    }
    figure, all_axes = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    for axes, (name, values) in zip(all_axes, texts.items()):
        top = sorted(values)[int(0.99 * len(values))]
        axes.hist([min(v, top) for v in values], bins=min(40, top), color=JUDGED)
        axes.set_title(f"Words of a {name}", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def checks(rubrics: Sequence[Rubric]) -> plt.Figure:
    """How often each kind of check is used."""
    count = Counter(c.check.kind for r in rubrics for c in r.criteria if c.check)
    kinds = sorted(count, key=lambda kind: count[kind])
    figure, axes = _axes("Programmatic checks", "criteria", "", (6.4, 0.9 + 0.22 * len(kinds)))
    bars = axes.barh(kinds, [count[k] for k in kinds], color=CHECKED)
    axes.bar_label(bars, padding=3, fontsize=7)
    axes.tick_params(axis="y", labelsize=8)
    axes.margins(y=0.01, x=0.1)
    return figure


PICTURES = {
    "families": scope_by_family,
    "criteria": criteria_per_rubric,
    "weights": weights,
    "lengths": lengths,
    "checks": checks,
}


def _scale(c: Criterion) -> list[str]:
    if c.check is not None:
        args = ", ".join(f"{k}: {v}" for k, v in c.check.params.items())
        return [f"  - `{c.check.kind}`{f' ({args})' if args else ''}"]
    return [f"  - {t.value:g}: {t.text}" for t in c.tiers or ()]


def _markdown(number: int, r: Rubric) -> list[str]:
    quoted = (r.prompt or "").replace("\n", "\n> ")
    out = [f"## {number}. {r.title}", "", f"`{r.id}`", "", f"> {quoted}", ""]
    if r.reference:
        out += [f"Reference: {r.reference}", ""]
    for c in r.criteria:
        gate = (
            f", veto {'at or above' if c.weight < 0 or c.veto.detector else 'below'} {c.veto.threshold:g}"
            if c.veto
            else ""
        )
        needs = ", reads the reference" if c.needs_reference else ""
        out += [f"- **{c.id}** ({c.weight:g}{gate}{needs}): {c.description}", *_scale(c)]
    out += [f"- pair {p.a} x {p.b}: {p.kind}, {p.weight:g}" for p in r.pairs]
    return [*out, ""]


def sample_page(rubrics: Sequence[Rubric], n: int, seed: int) -> str:
    """The sample as Markdown, unedited."""
    head = [
        f"# {n} instance rubrics drawn at random (seed {seed})",
        "",
        "Made by `python tools/corpus/pictures.py`, nothing chosen, nothing edited. In brackets: the weight.",
        "",
    ]
    return "\n".join(head + [line for k, r in enumerate(rubrics, 1) for line in _markdown(k, r)])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sample", type=int, default=40, metavar="N", help="rubrics on the sample page")
    p.add_argument("--seed", type=int, default=2026, help="of the sample")
    a = p.parse_args()
    corpus = load_rubrics(ROOT / "rubrics")
    rubrics = [r for r in corpus if "quickstart" not in r.tags]
    plt.rcParams["svg.hashsalt"] = "megarubric"
    (ROOT / "docs/corpus").mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        figure = draw(rubrics)
        figure.savefig(ROOT / f"docs/corpus/{name}.svg", metadata={"Date": None})
        plt.close(figure)
    instances = {r.id for r in rubrics if r.scope == "instance"}
    drawn = [r for r in corpus.sample(len(corpus), a.seed) if r.id in instances][: a.sample]
    (ROOT / "docs/corpus_sample.md").write_text(sample_page(drawn, a.sample, a.seed), encoding="utf-8")
    print(
        f"{len(PICTURES)} pictures in docs/corpus, {len(drawn)} of {len(instances):,} instance rubrics (seed {a.seed})"
    )


if __name__ == "__main__":
    main()
