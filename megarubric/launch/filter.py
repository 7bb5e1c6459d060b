"""`megarubric filter`: the base model answers every prompt, the judge scores, the central part is kept."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from megarubric.config import TrainConfig, dump, load_train
from megarubric.errors import BadInput, Interrupted
from megarubric.launch import plan
from megarubric.launch.judge import check_judge
from megarubric.launch.run import Prompts, stop_tokens
from megarubric.launch.rundir import claim
from megarubric.launch.system import running
from megarubric.observe.files import whole_file
from megarubric.observe.terminal import console, say
from megarubric.recipe.filtering import REASONS, Decision, bounds_of, counts, decide, histogram
from megarubric.recipe.scoring import ScoreFile, ScoreRow, keys_of, score_prompts
from megarubric.rollout.data import Prompt, PromptRow
from megarubric.rollout.sampler import Sampler, SamplingSettings
from megarubric.rubrics import dumps

_PLAIN_EVERY = 10  # prompts, where there is no terminal to draw a bar on


def run_filter(path: str, overrides: Sequence[str], *, fresh: bool, retry_unscored: bool, as_json: bool) -> int:
    """The verb. Exit status 0 done, 1 done but some prompts could not be asked, 3 interrupted, scores saved."""
    c = load_train(path, overrides)
    if c.rollout.replay is not None:
        raise BadInput(path, "rollout.replay", "filter asks the model anew; recorded answers say nothing of it")
    if c.algorithm.routing_replay:  # nothing is trained here
        c = msgspec.structs.replace(c, algorithm=msgspec.structs.replace(c.algorithm, routing_replay=False))
    plan.read_hf_config(c.model.path)
    prompts = Prompts(c)
    check_judge(c, path, prompts.rubrics())
    with claim(str(Path(c.runs_dir) / c.name), "filter", fresh) as dir:
        with whole_file(dir.path / "config.yaml") as f:
            f.write(dump(c))
        return asyncio.run(_filter(c, dir.path, prompts, retry_unscored, as_json))


async def _filter(c: TrainConfig, out: Path, prompts: Prompts, retry_unscored: bool, as_json: bool) -> int:
    rows = prompts.rows[: c.filter.limit]
    wanted = {row.id for row in rows}
    asked = [p for p in prompts.train if p.id in wanted]
    r = c.rollout
    settings = SamplingSettings(
        c.filter.samples_per_prompt,
        r.max_new_tokens,
        stop_tokens(c, prompts.tokenizer),
        r.temperature,
        r.top_p,
        c.seed,
    )
    keys = keys_of(c, settings, asked)
    scores = ScoreFile(out / "scores.jsonl", keys, retry_unscored)
    try:
        due = [p for p in asked if p.id not in scores.rows]
        if scores.stale:
            _note(f"{scores.path}: {scores.stale} prompts were scored otherwise, or unscored, and are asked anew")
        if len(due) < len(asked):
            _note(f"{len(asked) - len(due)} of {len(asked)} prompts are scored already")
        if due:
            await _score(c, out, prompts, settings, keys, due, scores)
    finally:
        scores.close()
    final = [_decided(row, d) for row, d in _decisions(asked, scores.rows, c)]
    failed = [row for row in final if row.error is not None]
    unusable = {row.id: prompts.dropped[row.id] for row in rows if row.id in prompts.dropped}
    _write(c, out, rows, prompts, final, unusable)
    scores.write(final)
    _report(c, out, final, unusable, len(prompts.kept_out), as_json)
    for name, reason in [*unusable.items(), *((row.id, str(row.error)) for row in failed)]:
        print(f"megarubric filter: {c.data.train}: {name}: {reason}", file=sys.stderr)
    return 1 if unusable or failed else 0


async def _score(
    c: TrainConfig,
    out: Path,
    prompts: Prompts,
    settings: SamplingSettings,
    keys: dict[str, str],
    due: Sequence[Prompt],
    scores: ScoreFile,
) -> None:
    """Answer and judge what is due. Raises Interrupted on SIGTERM or Ctrl-C, with what was judged saved."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    stopped = False

    def stop() -> None:
        nonlocal stopped
        stopped = True
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        _note(f"filter {c.name}: {settings.samples_per_prompt} answers to each of {len(due)} prompts")
        async with running(c, out, None) as system:
            assert system.judge is not None
            sampler = Sampler(system.policies, settings, c.rollout.max_num_seqs)
            with _progress(len(due)) as advance:

                def done(row: ScoreRow) -> None:
                    scores.put(row)
                    advance(row)

                await score_prompts(sampler, system.judge, prompts.tokenizer, due, keys, done)
    except asyncio.CancelledError:
        if not stopped:
            raise
        left = sum(p.id not in scores.rows for p in due)
        raise Interrupted(f"stopped, {left} prompts are left; the same command goes on from there") from None
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _decisions(
    asked: Sequence[Prompt], rows: dict[str, ScoreRow], c: TrainConfig
) -> Iterator[tuple[ScoreRow, Decision]]:
    ordered = [rows[p.id] for p in asked]
    return zip(ordered, decide([row.as_score for row in ordered], c.filter), strict=True)


def _decided(row: ScoreRow, d: Decision) -> ScoreRow:
    return msgspec.structs.replace(row, score=d.score, std=d.std, kept=d.kept, reason=d.reason)


def _write(
    c: TrainConfig,
    out: Path,
    rows: Sequence[PromptRow],
    prompts: Prompts,
    final: Sequence[ScoreRow],
    unusable: dict[str, str],
) -> None:
    """kept.jsonl (and heldout.jsonl, when data.holdout keeps prompts out) in the form of data.train; dropped.jsonl."""
    source = Path(c.data.train)
    kept = {row.id for row in final if row.kept}
    _write_rows(out / "kept.jsonl", source, [row for row in rows if row.id in kept])
    if prompts.kept_out:
        _write_rows(out / "heldout.jsonl", source, prompts.kept_out)
    bounds = bounds_of([row.as_score for row in final], c.filter)
    with whole_file(out / "dropped.jsonl") as f:
        for row in final:
            if not row.kept:
                b = bounds.get((row.family or "none") if c.filter.by == "family" else "all")
                numbers = {
                    "answers": len(row.rewards),
                    "valid": sum(r is not None for r in row.rewards),
                    "low": b.low if b else None,
                    "high": b.high if b else None,
                    "min_std": c.filter.min_std,
                    "unread": row.unread,
                    "vetoes": row.vetoes,
                }
                line = {"id": row.id, "score": row.score, "std": row.std, "reason": row.reason, "numbers": numbers}
                f.write(json.dumps(line | ({"error": row.error} if row.error else {}), ensure_ascii=False) + "\n")
        for name, why in unusable.items():
            line = {"id": name, "score": None, "std": None, "reason": "unusable", "numbers": {}, "error": why}
            f.write(json.dumps(line, ensure_ascii=False) + "\n")


def _write_rows(path: Path, source: Path, rows: Sequence[PromptRow]) -> None:
    """The rows as `source` has them, line for line; as rubrics, one a line, where it is no JSONL file."""
    lines: dict[str, str] = {}
    if source.is_file() and source.suffix == ".jsonl":
        with source.open(encoding="utf-8") as f:
            lines = {json.loads(line)["id"]: line.rstrip("\n") for line in f if line.strip()}
    with whole_file(path) as f:
        for row in rows:
            f.write(lines.get(row.id, "") or dumps(row.rubric))
            f.write("\n")


def _report(
    c: TrainConfig, out: Path, final: Sequence[ScoreRow], unusable: dict[str, str], held: int, as_json: bool
) -> None:
    """The summary, also kept as summary.json: counts by reason, bounds, distribution."""
    decisions = decide([row.as_score for row in final], c.filter)
    found = counts(decisions) | {"unusable": len(unusable)}
    bars = histogram(decisions)
    bounds = bounds_of([row.as_score for row in final], c.filter)
    rewards = [r for row in final for r in row.rewards]
    summary: dict[str, Any] = {
        "prompts": len(final) + len(unusable),
        "kept": found["central"],
        "reasons": found,
        "answers": len(rewards),
        "unscored_answers": sum(r is None for r in rewards),
        "unread_judgements": sum(row.unread for row in final),
        "held_out": held,
        "bounds": {name: msgspec.to_builtins(b) for name, b in bounds.items()},
        "histogram": [{"from": a, "to": b, "kept": k, "dropped": d} for a, b, k, d in bars],
        "filter": msgspec.to_builtins(c.filter),
        "out": str(out),
    }
    text = msgspec.json.format(msgspec.json.encode(summary), indent=1).decode()
    with whole_file(out / "summary.json") as f:
        f.write(text + "\n")
    if as_json:
        print(text)
        return
    table = Table(title=f"{c.data.train}: {found['central']} of {summary['prompts']} prompts kept")
    table.add_column("reason")
    table.add_column("prompts", justify="right")
    table.add_column("scores", justify="right")
    for reason in REASONS:
        scores = [d.score for d in decisions if d.reason == reason and d.score is not None]
        spread = f"{min(scores):.3f} to {max(scores):.3f}" if scores else "-"
        table.add_row("kept: central" if reason == "central" else reason, str(found[reason]), spread)
    console.print(table)
    for name, b in bounds.items():
        say(f"central part of {name}: {b.low:.3f} to {b.high:.3f} ({b.scored} scored prompts)")
    most = max((k + d for _, _, k, d in bars), default=1)
    say("\nscore           prompts (█ kept, ░ dropped)")
    for low, high, k, d in bars:
        width = [round(n * 50 / most) or (n > 0) for n in (k, d)]
        say(f"{low:.3f} - {high:.3f}  {'█' * width[0]}{'░' * width[1]} {k + d}")
    if not found["central"]:
        say("nothing is kept: widen filter.low and filter.high, or lower filter.min_std")
    say(f"\nwritten to {out}  (kept.jsonl, dropped.jsonl, scores.jsonl, summary.json)")


def _note(text: str) -> None:
    """A line beside the result, which may be JSON. That nobody reads it any more is no reason to stop."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar on a terminal, a line every few prompts otherwise."""
    err = Console(stderr=True)
    done = 0
    if not err.is_terminal:

        def plain(row: ScoreRow) -> None:
            nonlocal done
            done += 1
            if done % _PLAIN_EVERY == 0 or done == total:
                _note(f"[{done}/{total}] prompts scored")

        yield plain
        return
    columns = (TextColumn("filter"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda row: bar.update(task, advance=1)
