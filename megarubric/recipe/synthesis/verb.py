"""`rubrics synthesize`: what the command line calls. Opens models and files, runs the prompts, writes the results."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megarubric.config.judge import is_url
from megarubric.errors import BadInput, Interrupted
from megarubric.judging.opening import EngineFactory
from megarubric.judging.prompt import load_template
from megarubric.observe.files import whole_file
from megarubric.recipe.synthesis.models import Ledger, Limits, checked_directory, open_models
from megarubric.recipe.synthesis.pipeline import Outcome, Pipeline, Settings
from megarubric.recipe.synthesis.questions import Sources, preview
from megarubric.rubrics.importers import write_corpus
from megarubric.rubrics.importers.model import slug, unique_ids
from megarubric.rubrics.load import load_rubrics
from megarubric.rubrics.schema import FAMILIES, Rubric
from megarubric.rubrics.synthesis.costs import CostLine, Price, cost_lines, cost_text, parse_prices
from megarubric.rubrics.synthesis.inputs import read_prompt_rows, seeds_for
from megarubric.rubrics.synthesis.journal import Journal
from megarubric.rubrics.synthesis.mend import duplicates_across
from megarubric.rubrics.synthesis.model import PromptRow, plain
from megarubric.rubrics.synthesis.prompts import Templates
from megarubric.rubrics.synthesis.validation import Floors


@dataclass(frozen=True, slots=True)
class Job:
    """Everything a run is told. `model`, `policy` and `judge` are model directories or URLs (``URL#name`` where a
    server has several models); without `policy` or `judge`, `model` plays that role too."""

    prompts: Path
    out: Path
    model: str
    settings: Settings
    policy: str | None = None
    judge: str | None = None
    seeds: Path | None = None
    brief: Path | None = None
    against: tuple[Path, ...] = ()
    templates: Path | None = None
    limits: Limits = field(default_factory=Limits)
    prices: dict[str, Price] = field(default_factory=dict)
    currency: str = "USD"
    limit: int | None = None
    at_once: int = 8
    fresh: bool = False
    as_json: bool = False

    @property
    def roles(self) -> dict[str, str]:
        return {"model": self.model, "policy": self.policy or self.model, "judge": self.judge or self.model}

    @property
    def report(self) -> Path:
        return self.out.with_name(f"{self.out.stem}.report.jsonl")

    @property
    def journal(self) -> Path:
        return self.out.with_name(f"{self.out.stem}.journal")


def job_of(a: argparse.Namespace) -> Job:
    """The job that the command line asks for. Raises BadInput."""
    try:
        floors = Floors(variance=a.min_variance, disagreement=a.max_disagreement, reliability=a.min_reliability)
        settings = Settings(
            way=a.way,
            answers=a.answers,
            retries=a.retries,
            reviews=a.reviews,
            fewest=a.criteria[0],
            most=a.criteria[1],
            seeds_per_prompt=a.seeds_per_prompt,
            temperature=a.temperature,
            answer_temperature=a.answer_temperature,
            max_tokens=a.max_tokens,
            answer_tokens=a.answer_tokens,
            judge_templates=tuple(a.judge_template),
            judge_orders=a.judge_orders,
            prefix=a.prefix,
            licence=a.licence,
            family=a.family,
            floors=floors,
        )
    except ValueError as error:
        raise BadInput("command line", None, str(error)) from None
    if not re.fullmatch(r"[a-z0-9._-]{1,60}", a.prefix):
        raise BadInput("command line", f"--prefix {a.prefix}", "is not the beginning of an id: only a-z 0-9 . _ -")
    if a.timeout <= 0 or a.max_requests < 0 or a.max_total_tokens < 0:
        raise BadInput("command line", None, "--timeout must be above 0, a budget at least 0")
    return Job(
        prompts=a.prompts,
        out=a.out,
        model=a.model,
        settings=settings,
        policy=a.policy,
        judge=a.judge,
        seeds=a.seeds,
        brief=a.brief,
        against=tuple(a.against),
        templates=a.templates,
        limits=Limits(a.max_requests, a.max_total_tokens, a.concurrency, a.timeout),
        prices=parse_prices(a.price),
        currency=a.currency,
        limit=a.limit,
        at_once=a.at_once,
        fresh=a.fresh,
        as_json=a.json,
    )


def run_synthesize(job: Job, engine_factory: EngineFactory, *, dry_run: bool = False) -> int:
    """Make the rubrics and say how it went. Returns the exit status: 0, or 1 when a line of the prompt file was bad or
    a prompt is left for the next run because a model could not be asked.

    Writes `job.out` (rubrics, JSONL), `job.report` (a reason for everything left out) and `job.journal` (replies, so
    that the same command goes on where it stopped). Raises BadInput for what makes the whole job impossible, and
    Interrupted after Ctrl-C or SIGTERM, with the journal as it was.
    """
    rows, bad = read_prompt_rows(job.prompts, job.limit)
    sources = _sources(job)
    templates = Templates(job.templates, _form(job.settings))
    for name in job.settings.judge_templates:
        load_template(name)
    existing = [rubric for path in job.against for rubric in load_rubrics(path)]
    for role, spec in job.roles.items():
        if not is_url(spec):
            checked_directory(spec, role if getattr(job, role) else "model")
    if job.out.is_dir():
        raise BadInput(job.out, None, "is a directory")
    for error in bad:
        print(error, file=sys.stderr)
    if dry_run:
        _show_plan(job, rows, sources, templates)
        return 1 if bad else 0
    began = time.monotonic()
    with contextlib.closing(Journal(job.journal, job.fresh)) as journal:
        try:
            outcomes, costs = asyncio.run(_until_told(_run(job, rows, sources, templates, journal, engine_factory)))
        except (asyncio.CancelledError, KeyboardInterrupt):
            raise Interrupted(f"{job.journal}: interrupted; the same command goes on from here") from None
        replayed = journal.replayed
    outcomes = _without_repeats(outcomes, existing)
    write_corpus(job.out, [o.rubric for o in outcomes if o.rubric is not None])
    _write_report(job.report, outcomes)
    seconds = time.monotonic() - began
    summary = _summary(job, outcomes, len(bad), costs, seconds, replayed)
    if job.as_json:
        print(msgspec.json.encode(summary).decode())
    else:
        _say(job, outcomes, costs, seconds)
    return 1 if bad or any(o.status == "failed" for o in outcomes) else 0


async def _until_told[T](work: Coroutine[Any, Any, T]) -> T:
    """`work`, cancelled by SIGTERM as it is by Ctrl-C: engines are ended, the journal is closed."""
    task = asyncio.current_task()
    assert task is not None
    with contextlib.suppress(RuntimeError, ValueError):  # not the main thread: whoever owns it decides
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await work


async def _run(
    job: Job,
    rows: Sequence[PromptRow],
    sources: Sources,
    templates: Templates,
    journal: Journal,
    engine_factory: EngineFactory,
) -> tuple[list[Outcome], list[CostLine]]:
    ids = rubric_ids(job.settings.prefix, rows)
    slots = asyncio.Semaphore(job.at_once)
    async with open_models(job.roles, engine_factory, job.limits) as models:
        ledger = Ledger(models)
        pipeline = Pipeline(job.settings, templates, models, journal, ledger, sources)
        with _progress(len(rows)) as tell:

            async def one(row: PromptRow, rubric_id: str) -> Outcome:
                async with slots:
                    outcome = await pipeline.rubric_for(row, rubric_id)
                    tell(outcome)
                    return outcome

            tasks = [asyncio.create_task(one(row, name)) for row, name in zip(rows, ids)]
            try:
                outcomes = list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        identities = {role: m.backend.identity for role, m in models.items()}
        return outcomes, cost_lines(identities, ledger.now(), journal.spent_before, job.prices)


def rubric_ids(prefix: str, rows: Sequence[PromptRow]) -> list[str]:
    """An id for every prompt, made of its own: the same in every run over the same file."""
    return unique_ids([f"{prefix}.{slug(row.id, 'prompt', 120)}" for row in rows])


def _form(settings: Settings) -> dict[str, str]:
    return {"families": ", ".join(FAMILIES), "fewest": str(settings.fewest), "most": str(settings.most)}


def _sources(job: Job) -> Sources:
    """Seeds and brief. Raises BadInput when the way has need of them, or a seed does not say who wrote it."""
    way = job.settings.way
    if way == "seeded" and job.seeds is None and job.brief is None:
        raise BadInput("command line", "--way seeded", "needs --seeds or --brief")
    if way == "hybrid" and job.seeds is None:
        raise BadInput("command line", "--way hybrid", "needs --seeds: people's rubrics to mix with")
    if way in ("critique", "stronger") and (job.seeds is not None or job.brief is not None):
        given = "--seeds" if job.seeds is not None else "--brief"
        raise BadInput("command line", given, f"has no place in --way {way}; seeded and hybrid use seeds")
    if way == "hybrid" and job.brief is not None:
        raise BadInput("command line", "--brief", "has no place in --way hybrid; seeded uses it")
    seeds: tuple[Rubric, ...] = ()
    if job.seeds is not None:
        corpus = load_rubrics(job.seeds)
        for seed in corpus:
            if seed.provenance is None:
                reason = "has no provenance: what is made of it could not say who wrote it"
                raise BadInput(corpus.source(seed.id), f"rubric {seed.id}", reason)
        seeds = tuple(corpus)
    brief = None
    if job.brief is not None:
        try:
            brief = job.brief.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(job.brief, None, f"cannot be read as text: {error}") from None
        if not brief:
            raise BadInput(job.brief, None, "is empty")
    return Sources(seeds, brief)


def _without_repeats(outcomes: Sequence[Outcome], existing: Sequence[Rubric]) -> list[Outcome]:
    """Rubrics that repeat an earlier one, of this run or of `existing`, become dropped."""
    kept = [i for i, o in enumerate(outcomes) if o.rubric is not None]
    repeats = duplicates_across([r for o in outcomes if (r := o.rubric) is not None], existing)
    taken = {rubric.id for rubric in existing}
    result = list(outcomes)
    for at, i in enumerate(kept):
        outcome = outcomes[i]
        if at in repeats:
            other, overlap = repeats[at]
            reason = f"{overlap:.0%} of its word 4-grams are those of {other}"
        elif outcome.rubric_id in taken:
            reason = f"the id {outcome.rubric_id} is taken in the corpus it is compared with"
        else:
            continue
        result[i] = msgspec.structs.replace(outcome, status="dropped", stage="deduplicate", reason=reason, rubric=None)
    return result


def _write_report(path: Path, outcomes: Sequence[Outcome]) -> None:
    """One line a prompt, then one for everything that was done to its criteria, then one a criterion that was kept."""
    with whole_file(path) as f:

        def line(row: dict[str, Any]) -> None:
            f.write(msgspec.json.encode(row).decode() + "\n")

        for o in outcomes:
            place = {"prompt": o.row.id, "rubric": o.rubric_id}
            line({"kind": "rubric", **place, "status": o.status, "stage": o.stage, "reason": o.reason})
            for note in o.notes:
                kind = "criterion" if note.criterion or note.description else "step"
                line({"kind": kind, **place, **plain(note)})
            for c in o.rubric.criteria if o.rubric is not None else ():
                about = {"criterion": c.id, "description": c.description, "numbers": o.numbers.get(c.id, {})}
                line({"kind": "criterion", **place, "action": "kept", "stage": "", "reason": "", **about})


def _summary(
    job: Job, outcomes: Sequence[Outcome], bad: int, costs: Sequence[CostLine], seconds: float, replayed: int
) -> dict[str, Any]:
    dropped = Counter(f"{n.stage}: {n.action}" for o in outcomes for n in o.notes)
    return {
        "prompts": len(outcomes),
        "bad_lines": bad,
        **{status: sum(o.status == status for o in outcomes) for status in ("kept", "dropped", "failed")},
        "criteria_kept": sum(len(o.rubric.criteria) for o in outcomes if o.rubric is not None),
        "notes": dict(dropped),
        "replies_from_journal": replayed,
        "cost": [plain(c) for c in costs],
        "currency": job.currency,
        "seconds": round(seconds, 3),
        "out": str(job.out),
        "report": str(job.report),
        "journal": str(job.journal),
    }


def _say(job: Job, outcomes: Sequence[Outcome], costs: list[CostLine], seconds: float) -> None:
    counts = Counter(o.status for o in outcomes)
    criteria = sum(len(o.rubric.criteria) for o in outcomes if o.rubric is not None)
    left = Counter(o.stage for o in outcomes if o.status == "dropped")
    where = f" ({', '.join(f'{n} at {stage}' for stage, n in left.most_common())})" if left else ""
    print(
        f"{len(outcomes):,} prompts: {counts['kept']:,} rubrics with {criteria:,} criteria, "
        f"{counts['dropped']:,} dropped{where}, {counts['failed']:,} left for the next run",
        file=sys.stderr,
    )
    print(cost_text(costs, job.currency, seconds), file=sys.stderr)
    print(f"rubrics {job.out}, reasons {job.report}", file=sys.stderr)


def _show_plan(job: Job, rows: Sequence[PromptRow], sources: Sources, templates: Templates) -> None:
    """What would be done, and the first drafting prompt as far as it can be known before anything was asked."""
    s = job.settings
    seeds = seeds_for(rows[0], sources.seeds, s.seeds_per_prompt)
    readings = (2 if s.judge_orders == "both" else 1) * max(1, len(s.judge_templates))
    answers = [max(s.answers, len(row.answers)) for row in rows]
    sampled = sum(max(0, s.answers - len(row.answers)) for row in rows)
    criticised = sum(answers) if s.way == "critique" else 0
    judged = f"{readings} readings of about {(s.fewest + s.most) // 2} criteria on {sum(answers):,} answers"
    lines = [
        f"{len(rows):,} prompts of {job.prompts}, way {s.way}, {len(sources.seeds)} seeds"
        + (", a brief" if sources.brief else ""),
        *(f"{role:<7}{spec}" for role, spec in job.roles.items()),
        f"answer    {sampled:,} calls of the policy, up to {s.answer_tokens} tokens each",
        *([f"criticise {criticised:,} calls of the policy"] if criticised else []),
        f"draft     {len(rows):,} to {len(rows) * (s.retries + 1):,} calls of the model, "
        f"up to {s.max_tokens} tokens each",
        f"revise    {len(rows) * s.reviews:,} calls of the model",
        f"atomise   up to {len(rows):,} calls of the model",
        f"validate  {judged}: about {readings * (s.fewest + s.most) // 2 * sum(answers):,} short calls of the judge",
        f"writes    {job.out}, {job.report}, {job.journal}",
        f"templates {templates.hash[:16]}",
        "",
        f"The drafting prompt of {rows[0].id}:" if s.way != "critique" else f"The first prompt of {rows[0].id}:",
        "",
    ]
    print("\n".join(lines))
    print("".join(segment.text for segment in preview(s.way, rows[0], seeds, sources.brief, templates)))


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[Outcome], None]]:
    """A bar on a terminal, a line a prompt otherwise."""
    console = Console(stderr=True)
    counts: Counter[str] = Counter()
    if not console.is_terminal:

        def plain_line(o: Outcome) -> None:
            counts[o.status] += 1
            kept = f"{len(o.rubric.criteria)} criteria" if o.rubric is not None else f"{o.stage}: {o.reason}"
            print(f"[{counts.total()}/{total}] {o.row.id}: {o.status}, {kept}", file=sys.stderr, flush=True)

        yield plain_line
        return
    columns = (
        TextColumn("synthesize"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  {task.fields[counts]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total, counts="")

        def advance(o: Outcome) -> None:
            counts[o.status] += 1
            bar.update(task, advance=1, counts=", ".join(f"{n} {status}" for status, n in sorted(counts.items())))

        yield advance
