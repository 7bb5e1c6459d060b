"""What the page says, in order, before it is HTML: a headline, figures, samples, signals, the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup

from megarubric.observe.report import svg
from megarubric.observe.report.samples import Change, Samples, StepCounts
from megarubric.observe.report.signals import Signal, criteria, signals
from megarubric.observe.report.source import Rollout, Series, Source

MULTIPLES = 24  # criteria that get a curve of their own
FOLD = 900  # characters of a text before the rest is folded


@dataclass(frozen=True)
class Figure:
    """A chart with its caption; `svg` is safe markup."""

    caption: str
    svg: Markup
    legend: Markup


@dataclass(frozen=True)
class Verdict:
    """One judgement of a shown answer, as the table has it."""

    criterion: str
    score: str
    by: str
    entropy: str
    reason: str


@dataclass(frozen=True)
class Shown:
    """An answer as it is shown. `rest` is the folded part of `text`."""

    heading: str
    prompt: str
    prompt_rest: str
    text: str
    rest: str
    facts: list[tuple[str, str]]
    attribution: Markup
    judgements: list[Verdict]


@dataclass
class Report:
    """The page."""

    name: str
    kind: str
    facts: list[tuple[str, str]]
    headline: list[tuple[str, str, str]]
    curves: list[Figure] = field(default_factory=list)
    multiples: list[Figure] = field(default_factory=list)
    multiples_left_out: int = 0
    vetoes: list[Figure] = field(default_factory=list)
    table: list[tuple[str, str, str, str, str]] = field(default_factory=list)
    evaluations: list[tuple[str, ...]] = field(default_factory=list)
    groups: list[tuple[str, str, list[Shown]]] = field(default_factory=list)
    pairs: list[tuple[str, Shown, Shown]] = field(default_factory=list)
    signals: list[Signal] = field(default_factory=list)
    signal_figures: list[Figure] = field(default_factory=list)
    openings: list[tuple[str, int, str, str]] = field(default_factory=list)
    config: str | None = None
    notes: list[str] = field(default_factory=list)
    sampled: str = ""


def build(source: Source, samples: Samples) -> Report:
    """The report of a run."""
    name = str(source.settings.get("name") or source.path.resolve().name)
    kind = "Reinforcement learning from rubric rewards" if _is_rl(source) else "Supervised cold start"
    report = Report(name, kind, _facts(source), _headline(source), config=source.config)
    report.evaluations = [
        (file, f"{e.answers}", f"{e.reward:.3f}", f"{e.valid_fraction:.1%}", f"{e.veto_rate:.1%}", f"{e.words:.1f}")
        for file, e in source.evaluations.items()
    ]
    report.curves = _curves(source.metrics)
    _criteria(report, source.metrics)
    if source.heldout is not None:
        report.table = _table(source)
    report.groups = [
        ("Best", "Highest reward, the latest first among equals.", [show(r) for r in samples.best]),
        ("Worst", "Lowest reward without a veto.", [show(r) for r in samples.worst]),
        ("Vetoed", "Those that a veto cost most (reward 0 whatever r1 is).", [show(r) for r in samples.vetoed]),
    ]
    report.pairs = [_pair(c) for c in samples.changed]
    report.signals = signals(source.metrics, samples)
    report.signal_figures = _signal_figures(samples.counts)
    report.openings = [(words, n, f"{top:.0%}", f"{overall:.0%}") for words, n, top, overall in samples.openings]
    report.notes = [*source.notes, *_few(samples.notes)]
    if not samples.steps_in_run and _is_rl(source):
        report.notes.append("rollouts/ has no step: no samples, and no signals from answers.")
    report.sampled = (
        f"{samples.answers:,} answers of {len(samples.counts)} of {samples.steps_in_run:,} steps were read."
    )
    return report


def _is_rl(source: Source) -> bool:
    return "rollout" in source.settings or "reward/mean" in source.metrics or bool(source.rollout_files)


def _few(notes: Sequence[str]) -> list[str]:
    return [*notes[:5], *([f"{len(notes) - 5} more files had such lines."] if len(notes) > 5 else [])]


def _facts(source: Source) -> list[tuple[str, str]]:
    def get(section: str, key: str) -> object:
        part = source.settings.get(section)
        return part.get(key) if isinstance(part, dict) else None

    steps = max((float(s.steps[-1]) for s in source.metrics.values() if len(s.steps)), default=None)
    planned = get("train", "steps")
    done = "–" if steps is None else f"{steps:.0f}" + (f" of {planned}" if planned is not None else "")
    per_step = (get("rollout", "prompts_per_step"), get("rollout", "samples_per_prompt"))
    rows = [
        ("model", get("model", "path")),
        ("prompts", get("data", "train")),
        ("judge", " ".join(str(x) for x in (get("judge", "kind"), get("judge", "model")) if x)),
        ("algorithm", get("algorithm", "name")),
        ("advantage", get("reward", "advantage")),
        ("learning rate", get("train", "lr")),
        ("answers a step", f"{per_step[0]} × {per_step[1]}" if all(per_step) else None),
        ("steps", done),
        ("seed", source.settings.get("seed")),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def _headline(source: Source) -> list[tuple[str, str, str]]:
    """(what, number, note) in large type."""
    if source.heldout is not None:
        b, a = source.heldout.before, source.heldout.after
        if np.isfinite([b.reward, a.reward]).all():
            return [
                ("held-out reward before", f"{b.reward:.3f}", f"{b.answers} answers"),
                ("after", f"{a.reward:.3f}", f"{a.answers} answers"),
                ("gain", f"{a.reward - b.reward:+.3f}", f"veto rate {b.veto_rate:.0%} → {a.veto_rate:.0%}"),
            ]
    found = source.metrics.get("eval/reward")
    if found is not None and len(found.values) > 1:
        first, last = float(found.values[0]), float(found.values[-1])
        return [
            (f"held-out reward, step {found.steps[0]:.0f}", f"{first:.3f}", ""),
            (f"step {found.steps[-1]:.0f}", f"{last:.3f}", "the latest evaluation"),
            ("gain", f"{last - first:+.3f}", ""),
        ]
    reward = source.metrics.get("reward/mean")
    if reward is not None and len(reward.values):
        return [("training reward", f"{reward.values[-1]:.3f}", f"step {reward.steps[-1]:.0f}; no held-out result yet")]
    loss = source.metrics.get("train/loss")
    if loss is not None and len(loss.values):
        return [
            ("training loss", f"{loss.values[-1]:.3f}", f"step {loss.steps[-1]:.0f}; at first {loss.values[0]:.3f}")
        ]
    return []


_CURVES: tuple[tuple[str, tuple[tuple[str, str], ...], tuple[float | None, float | None]], ...] = (
    ("Reward", (("training", "reward/mean"), ("held out", "eval/reward")), (0.0, 1.0)),
    ("Spread of the reward", (("standard deviation", "reward/std"),), (0.0, None)),
    (
        "Shares of answers",
        (("valid", "reward/valid_fraction"), ("vetoed", "veto/rate"), ("cut off", "rollout/truncated_fraction")),
        (0.0, 1.0),
    ),
    ("Unread judgements, share", (("unread", "judge/unread_fraction"),), (0.0, None)),
    ("KL, nats a token", (("to the old policy", "train/kl"), ("to the reference", "train/kl_reference")), (None, None)),
    ("|trainer − engine| log-probability, nats a token", (("mean", "train/logprob_abs_diff"),), (0.0, None)),
    ("Entropy, nats", (("policy, a token", "train/entropy"), ("judge, a judgement", "judge/entropy")), (0.0, None)),
    ("Length, tokens", (("mean", "rollout/length"),), (0.0, None)),
    ("Loss", (("training", "train/loss"), ("held out", "eval/loss")), (None, None)),
    ("Learning rate", (("rate", "train/lr"),), (0.0, None)),
    ("Gradient norm", (("norm", "train/grad_norm"),), (0.0, None)),
)
_TIMES = (
    ("write", "perf/rollout_s"),
    ("judge", "perf/judge_s"),
    ("train", "perf/train_s"),
    ("exchange", "perf/exchange_s"),
)


def _curves(metrics: Mapping[str, Series]) -> list[Figure]:
    figures = []
    for caption, wanted, y in _CURVES:
        drawn = [svg.Line(label, metrics[name]) for label, name in wanted if name in metrics]
        if drawn:
            figures.append(Figure(caption, svg.lines(caption, drawn, y=y), svg.legend([d.label for d in drawn])))
    times = [svg.Line(label, metrics[name]) for label, name in _TIMES if name in metrics]
    if drawing := svg.stacked("Step time, seconds", times):
        figures.append(Figure("Step time, seconds", drawing, svg.legend([t.label for t in times])))
    return figures


def _criteria(report: Report, metrics: Mapping[str, Series]) -> None:
    found = criteria(metrics)
    ranked = sorted(found, key=lambda n: (-len(found[n].steps), n))
    for name in sorted(ranked[:MULTIPLES]):
        drawn = [svg.Line("training", found[name])]
        if (held := metrics.get(f"eval/criterion/{name}")) is not None:
            drawn.append(svg.Line("held out", held))
        drawing = svg.lines(name, drawn, y=(0.0, 1.0), width=240, height=120)
        report.multiples.append(Figure(name, drawing, Markup("")))
    report.multiples_left_out = max(0, len(found) - MULTIPLES)
    vetoes = {n[len("veto/") :]: s for n, s in metrics.items() if n.startswith("veto/") and n != "veto/rate"}
    active = sorted((n for n in vetoes if vetoes[n].values.max() > 0), key=lambda n: -float(vetoes[n].values.sum()))
    if active:
        drawn = [svg.Line(n, vetoes[n], band=False) for n in active[:8]]
        caption = "Share of answers, by the criterion that vetoed first"
        drawing = svg.lines(caption, drawn, y=(0.0, None), width=740, height=220)
        report.vetoes.append(Figure(caption, drawing, svg.legend([d.label for d in drawn])))


def _table(source: Source) -> list[tuple[str, str, str, str, str]]:
    assert source.heldout is not None
    rows = []
    for name, b in sorted(source.heldout.before.criteria.items()):
        a = source.heldout.after.criteria.get(name)
        known = b.mean is not None and a is not None and a.mean is not None
        rows.append(
            (
                name,
                "–" if b.mean is None else f"{b.mean:.3f}",
                "–" if a is None or a.mean is None else f"{a.mean:.3f}",
                f"{a.mean - b.mean:+.3f}" if known else "–",  # type: ignore[operator, union-attr]
                f"{b.vetoes} → {a.vetoes if a else '–'}",
            )
        )
    return rows


def show(r: Rollout, heading: str = "") -> Shown:
    """An answer with its attribution and judgements."""
    total = sum(r.attribution.values())
    facts = [("reward", _number(r.reward)), ("r0", _number(r.r0)), ("r1", _number(r.r1))]
    facts += [("sum of the bars", f"{total:.3f}"), ("advantage", f"{r.advantage:+.2f}")]
    facts += [("veto", r.veto)] if r.veto else []
    facts += [("step", str(r.step)), ("weights", str(r.weight_version)), ("ended by", r.finish_reason)]
    parts = [(n, v) for n, v in r.attribution.items() if v]
    parts = sorted(parts, key=lambda p: -abs(p[1]))[:30]
    judged = [
        Verdict(
            name,
            "unread" if not j.read else _number(j.score),
            j.source,
            "" if j.entropy is None else svg.number(j.entropy),
            (j.reason or "")[:FOLD],
        )
        for name, j in r.judgements.items()
    ]
    prompt, prompt_rest = fold(r.prompt)
    text, rest = fold(r.response)
    title = heading or f"{r.prompt_id}, step {r.step}"
    bars = svg.bars("Attribution of the reward to criteria", parts)
    return Shown(title, prompt, prompt_rest, text, rest, facts, bars, judged)


def fold(text: str, limit: int = FOLD) -> tuple[str, str]:
    """The part that is shown and the part behind a fold, cut at a space where there is one."""
    text = svg.xml_text(text)
    if len(text) <= limit + 100:
        return text, ""
    cut = text.rfind(" ", limit - 100, limit)
    cut = limit if cut < 0 else cut
    return text[:cut], text[cut:]


def _number(x: float | None) -> str:
    return "not judged" if x is None else f"{x:.3f}"


def _pair(c: Change) -> tuple[str, Shown, Shown]:
    words = f"{c.early.prompt_id}: mean reward of its answers {c.before:.3f} → {c.after:.3f}"
    return words, show(c.early, f"step {c.early.step}"), show(c.late, f"step {c.late.step}")


def _signal_figures(counts: Sequence[StepCounts]) -> list[Figure]:
    def series(values: Sequence[float | None]) -> Series:
        known = [(c.step, v) for c, v in zip(counts, values) if v is not None]
        return Series(np.array([s for s, _ in known], float), np.array([v for _, v in known], float))

    if len(counts) < 2:
        return []
    rates = [svg.Line(n.removeprefix("hack:"), series([c.tripped[n] for c in counts])) for n in counts[0].tripped]
    plans: list[tuple[str, list[svg.Line], tuple[float | None, float | None]]] = [
        ("Share of answers on which a detector fires", rates, (0.0, None)),
        (
            "Share of the best tenth on which any fires",
            [svg.Line("best tenth", series([c.top_tripped for c in counts]))],
            (0.0, None),
        ),
        (
            "Correlation of reward and length within a prompt",
            [svg.Line("correlation", series([c.length_correlation for c in counts]))],
            (-1.0, 1.0),
        ),
        (
            "Spread of scores",
            [
                svg.Line("judge's scores", series([c.judge_std for c in counts])),
                svg.Line("reward within a prompt", series([c.group_std for c in counts])),
                svg.Line("share of scores at 0 or 1", series([c.judge_extreme for c in counts])),
            ],
            (0.0, None),
        ),
    ]
    figures = []
    for caption, drawn, y in plans:
        drawn = [d for d in drawn if len(d.series.steps)]
        if drawn:
            figures.append(Figure(caption, svg.lines(caption, drawn, y=y), svg.legend([d.label for d in drawn])))
    return figures
