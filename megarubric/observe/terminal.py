"""What a person sees while a run goes on and when it ends: rich on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megarubric.evaluate.summary import Summary

console = Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 110)


def say(text: str) -> None:
    """One line about what is happening."""
    console.print(text, markup=False)


def step_line(step: int, steps: int, m: Mapping[str, float | int | None]) -> str:
    """The line of one training step: where it is, what it earned, where its seconds went."""

    def get(name: str) -> float:
        value = m.get(name)
        return float("nan") if value is None else float(value)

    done = round(12 * step / steps)
    bar = "█" * done + "░" * (12 - done)
    return (
        f"{bar} step {step:>4}/{steps}  reward {get('reward/mean'):.3f}  veto {get('veto/rate'):.2f}"
        f"  kl {get('train/kl'):.1e}  |Δlogp| {get('train/logprob_abs_diff'):.1e}"
        f"  {get('perf/step_s'):.1f} s (write {get('perf/rollout_s'):.1f}, judge {get('perf/judge_s'):.1f},"
        f" train {get('perf/train_s'):.1f}, exchange {get('perf/exchange_s'):.2f})"
    )


def warn_of(m: Mapping[str, float | int | None], drift_alarm: float) -> None:
    """A line when a step taught nothing because no answer was scored, or when trainer and engine disagree by more than
    `drift_alarm` nats a token: what collapses mixtures of experts."""
    if m.get("reward/valid_fraction") == 0:
        say("warning: no answer of this step has a reward, so nothing was trained: is there a judge?")
    drift = m.get("train/logprob_abs_diff")
    if drift is not None and drift > drift_alarm:
        say(
            f"warning: mean |trainer - engine| log-probability is {drift:.3f}, above algorithm.drift_alarm"
            f" {drift_alarm:g}; see algorithm.routing_replay, tis_mode and reject_above"
        )


def _cell(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.3f}"


def before_after(before: Summary, after: Summary) -> None:
    """Per-criterion table and the headline numbers of two held-out evaluations."""
    table = Table(title=f"held-out answers: {before.answers} before, {after.answers} after")
    table.add_column("criterion")
    for column in ("before", "after", "change", "judged", "vetoes before", "vetoes after"):
        table.add_column(column, justify="right")
    for name, b in before.criteria.items():
        a = after.criteria.get(name)
        change = None if a is None or a.mean is None or b.mean is None else a.mean - b.mean
        table.add_row(
            name,
            _cell(b.mean),
            _cell(a.mean if a else None),
            "-" if change is None else f"{change:+.3f}",
            f"{a.judged}/{a.asked}" if a else "-",
            str(b.vetoes),
            str(a.vetoes) if a else "-",
        )
    table.add_section()
    table.add_row(
        "reward",
        _cell(before.reward),
        _cell(after.reward),
        f"{after.reward - before.reward:+.3f}",
        "",
        "",
        "",
        style="bold",
    )
    for name, b_value, a_value in (
        ("veto rate", before.veto_rate, after.veto_rate),
        ("valid", before.valid_fraction, after.valid_fraction),
    ):
        table.add_row(name, _cell(b_value), _cell(a_value), f"{a_value - b_value:+.3f}", "", "", "")
    console.print(table)


def show_examples(before: Summary, after: Summary, count: int = 2) -> None:
    """`count` prompts with the answer before and after."""
    later = {e.prompt_id: e for e in after.examples}
    shown = [(b, later[b.prompt_id]) for b in before.examples if b.prompt_id in later][:count]
    for b, a in shown:
        say(f"\nprompt  {b.prompt}")
        for label, e in (("before", b), ("after", a)):
            veto = f", veto {e.veto}" if e.veto else ""
            reward = "unscored" if e.reward is None else f"{e.reward:.2f}"
            say(textwrap.fill(f"{label:<7} [{reward}{veto}] {e.response}", 108, subsequent_indent=" " * 8))


def where(run_dir: Path) -> None:
    say(f"\nrun directory: {run_dir}  (metrics.jsonl, rollouts/, checkpoints/, logs/, wandb/)")


def summary_table(summary: Summary, title: str) -> None:
    """One evaluation as a table."""
    table = Table(title=f"{title}: {summary.answers} held-out answers")
    for column in ("criterion", "mean", "judged", "vetoes"):
        table.add_column(column, justify="left" if column == "criterion" else "right")
    for name, c in summary.criteria.items():
        table.add_row(name, _cell(c.mean), f"{c.judged}/{c.asked}", str(c.vetoes))
    table.add_section()
    for name, value in (
        ("reward", summary.reward),
        ("veto rate", summary.veto_rate),
        ("valid", summary.valid_fraction),
    ):
        table.add_row(name, _cell(value), "", "")
    console.print(table)
