"""A rubric as a person reads it in a terminal."""

from __future__ import annotations

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from megarubric.rubrics.schema import Criterion, Rubric


def print_rubric(rubric: Rubric, console: Console) -> None:
    """Title, provenance, prompt, a table of the criteria, pairs and shaping. Text of the rubric is never markup."""
    head = Text(
        f"{rubric.scope} · {rubric.family or 'no family'} · version {rubric.version} · {rubric.hash[:12]}", "dim"
    )
    parts: list[Text | Table | Panel] = [head]
    if rubric.provenance is not None:
        who = rubric.provenance
        model = f" with {who.model}" if who.model else ""
        parts.append(Text(f"by {who.author}{model}, {who.source or '-'}, {who.licence or '-'}", "dim"))
    if rubric.tags:
        parts.append(Text(" ".join(f"#{tag}" for tag in rubric.tags), "dim"))
    if rubric.prompt:
        parts.append(Panel(Text(rubric.prompt), title="prompt", title_align="left", border_style="green"))
    if rubric.reference:
        parts.append(Panel(Text(rubric.reference), title="reference", title_align="left", border_style="green"))
    parts.append(_criteria(rubric))
    for pair in rubric.pairs:
        parts.append(Text(f"pair {pair.a} × {pair.b}: {pair.kind}, weight {pair.weight:+g}"))
    if rubric.shaping is not None:
        s = rubric.shaping
        parts.append(Text(f"shaping above {s.kappa:g}: alpha {s.alpha:g}, power {s.power:g}"))
    if any(c.veto for c in rubric.criteria):
        parts.append(Text(f"a veto gives {rubric.veto_reward:g}; a veto not judged: {rubric.on_missing_veto}"))
    title = Text(rubric.id, "bold") + Text(f"  {rubric.title}")
    console.print(Panel(Group(*parts), title=title, title_align="left"))


def _criteria(rubric: Rubric) -> Table:
    table = Table(show_lines=True, expand=True)
    table.add_column("weight", justify="right", no_wrap=True)
    table.add_column("criterion", ratio=2)
    table.add_column("tiers or check", ratio=3)
    for criterion in rubric.criteria:
        name = Text(criterion.id, "bold")
        for note in _notes(criterion):
            name.append(f"\n{note}", "yellow")
        weight = Text(f"{criterion.weight:+g}" if criterion.weight else "gate" if criterion.veto else "0")
        table.add_row(weight, name, _scale(criterion))
    return table


def _notes(c: Criterion) -> list[str]:
    notes = []
    if c.veto is not None:
        high = c.weight < 0 or (c.weight == 0 and c.veto.detector)
        notes.append(f"veto when the score is {'≥' if high else '<'} {c.veto.threshold:g}")
    if c.saturation is not None:
        notes.append(f"saturates above {c.saturation.theta:g} (beta {c.saturation.beta:g})")
    if c.needs_reference:
        notes.append("needs the reference")
    return notes


def _scale(c: Criterion) -> Text:
    text = Text(c.description)
    if c.check is not None:
        args = ", ".join(f"{key}={value}" for key, value in c.check.params.items())
        text.append(f"\n{c.check.kind}" + (f"  {args}" if args else ""), "cyan")
    for tier in c.tiers or ():
        text.append(f"\n{tier.value:g}  ", "cyan")
        text.append(tier.text)
    return text
