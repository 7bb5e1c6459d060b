"""`megarubric defend`: mine a run, weigh vetoes, write the report, promote on request."""

from __future__ import annotations

import asyncio
import re
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import track
from rich.table import Table

from megarubric.config import TrainConfig, load_train
from megarubric.config.judge import is_url
from megarubric.errors import BadInput
from megarubric.judging.opening import EngineFactory, JudgeUse, open_judge
from megarubric.judging.settings import settings_of
from megarubric.observe.files import whole_file
from megarubric.observe.terminal import console, say
from megarubric.recipe.defence import report
from megarubric.recipe.defence.answers import Field, field_of, read_lines
from megarubric.recipe.defence.apply import defend_rows, read_defences
from megarubric.recipe.defence.mining import Exploit, mine
from megarubric.recipe.defence.promote import as_yaml, difference, promotion, write_promotion
from megarubric.recipe.defence.proposal import Verdict, rubric_of, weigh
from megarubric.recipe.defence.removal import judge_without, settled
from megarubric.recipe.defence.tells import fires
from megarubric.rollout.data import read_prompts
from megarubric.rubrics import Rubric

_COVERED = 0.8  # share of an exploit's carriers that an earlier veto catches, from which it needs none of its own
_MOST = 20  # exploits that are weighed


class CleanRow(msgspec.Struct, frozen=True):
    """A line of a clean set; other keys are not read."""

    response: str
    prompt: str = ""


def run_defend(a: Namespace, engine_factory: EngineFactory) -> int:
    """The verb, its parsed arguments in `a` (see options). Exit status 0 done, 1 done but lines could not be read."""
    recorded = read_lines(a.run_dir)
    for error in recorded.bad:
        print(f"megarubric defend: {error}", file=sys.stderr)
    name = a.run_dir.resolve().name
    rubric_id = a.id or f"defence.mined.{re.sub(r'[^a-z0-9._-]+', '-', name.lower())}"
    if not re.fullmatch(r"[a-z0-9._-]{1,200}", rubric_id):
        raise BadInput("command line", f"--id {rubric_id}", "an id has the letters a-z, digits, dot, dash, underscore")
    notes: list[str] = []
    c = _config(a.run_dir, notes)
    rubrics = _rubrics(c, a.rubrics, {x.rubric_hash for x in recorded.lines}, notes)
    clean = read_clean(a.clean) if a.clean else []
    f = field_of(recorded.lines, a.z, a.top)
    mined = mine(f, rubrics, alpha=a.alpha, min_gain=a.min_gain)
    if len(mined.exploits) > _MOST:
        notes.append(f"{len(mined.exploits)} exploits were found; the {_MOST} surest are weighed.")
    verdicts = _weighed(f, mined.exploits[:_MOST], rubrics, clean, a.max_false_veto)
    if any(v.options for v in verdicts) and rubrics:
        asyncio.run(_removed(f, verdicts, rubrics, _use(a.judge, c, engine_factory)))
    elif verdicts and a.judge != "none":
        notes.append("The judge was not asked: the run's rubrics are not at hand, or no check sees what was found.")
    worded = any(v.chosen is not None and v.chosen.check.params for v in verdicts)
    if worded and not any(v.removal is not None and v.removal.judge != "checks" for v in verdicts):
        notes.append(
            "No judge was asked. A phrase that comes with good content pays as well: read the examples before "
            "promoting, or give --judge, best another one than the run's."
        )
    policy = c.model.path if c is not None else "the run's policy"
    rubric = rubric_of(verdicts, rubric_id, f"megarubric defend, run {name}", Path(policy).name)

    out: Path = a.out or a.run_dir / "defence"
    text = report.markdown(name, recorded, f, mined, verdicts, rubric, notes, a.max_false_veto)
    found = report.plain(recorded, f, mined, verdicts, rubric, notes)
    with whole_file(out / "report.md") as file:
        file.write(text)
    encoded = msgspec.json.format(msgspec.json.encode(found), indent=1).decode()
    with whole_file(out / "exploits.json") as file:
        file.write(encoded + "\n")
    written = ["report.md", "exploits.json"]
    if rubric is not None:
        with whole_file(out / "defence.yaml") as file:
            file.write(as_yaml(rubric))
        written.append("defence.yaml")
    else:
        (out / "defence.yaml").unlink(missing_ok=True)  # of an earlier look at this run, which no longer holds
    if a.json:
        print(encoded)
    else:
        _table(f, verdicts, mined.tested, notes)
        say(f"written to {out}  ({', '.join(written)})")
    if a.promote is not None:
        _promote(rubric, a.promote)
    return 1 if recorded.bad else 0


def read_clean(path: Path) -> list[tuple[str, str]]:
    """(prompt, response) of each line. Raises BadInput naming the line."""
    if not path.is_file():
        raise BadInput(path, None, "no such file")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                row = msgspec.json.decode(line, type=CleanRow)
            except (msgspec.MsgspecError, UnicodeError) as error:
                raise BadInput(path, f"line {number}", str(error)) from None
            rows.append((row.prompt, row.response))
    if not rows:
        raise BadInput(path, None, "holds no answer")
    return rows


def _config(run_dir: Path, notes: list[str]) -> TrainConfig | None:
    try:
        return load_train(run_dir / "config.yaml")
    except BadInput as error:
        notes.append(f"The run's configuration is not read ({error}).")
        return None


def _rubrics(c: TrainConfig | None, path: Path | None, wanted: set[str], notes: list[str]) -> dict[str, Rubric]:
    """The rubrics the answers were scored by, by hash, as far as they are still there."""
    source = path or (Path(c.data.train) if c is not None else None)
    if source is None:
        return {}
    try:
        rows = read_prompts(source, [Path(p) for p in c.data.rubrics] if c is not None else [])
        rows = defend_rows(rows, read_defences(c.reward.defence if c is not None else []), source)
    except BadInput as error:
        if path is not None:
            raise
        notes.append(f"The run's rubrics are not read ({error}): nothing is scored again, see --rubrics.")
        return {}
    found = {row.rubric.hash: row.rubric for row in rows if row.rubric.hash in wanted}
    if len(found) < len(wanted):
        notes.append(f"{len(wanted) - len(found)} of {len(wanted)} rubrics are no longer those of {source}.")
    return found


def _weighed(
    f: Field, exploits: Sequence[Exploit], rubrics: Mapping[str, Rubric], clean: list[tuple[str, str]], bound: float
) -> list[Verdict]:
    """Each exploit weighed, but for those that a veto chosen before catches already."""
    verdicts: list[Verdict] = []
    err = Console(stderr=True)
    for e in track(exploits, "weighing vetoes", console=err, transient=True, disable=not err.is_terminal):
        verdict = weigh(f, e, rubrics, clean, bound)
        for earlier in verdicts:
            if earlier.chosen is not None:
                check = earlier.chosen.check
                lines = [f.lines[i] for i in e.carriers]
                hit = sum(fires(check, x.prompt, x.response, rubrics.get(x.rubric_hash)) for x in lines)
                if hit >= _COVERED * len(lines):
                    verdict.chosen, verdict.reason = (
                        None,
                        f"the veto of {earlier.exploit.lead.tell} catches {hit} of them",
                    )
        verdicts.append(verdict)
    return verdicts


def _use(judge: str, c: TrainConfig | None, engine_factory: EngineFactory) -> JudgeUse:
    """The named judge, asked the way the run asked its own where it is a model of that kind."""
    settings = settings_of(c.judge) if c is not None and c.judge.kind != "none" and not is_url(judge) else None
    return JudgeUse(judge=judge, engine_factory=engine_factory, settings=settings)


async def _removed(f: Field, verdicts: Sequence[Verdict], rubrics: Mapping[str, Rubric], use: JudgeUse) -> None:
    async with open_judge(use) as judge:
        for v in verdicts:
            v.removal = await judge_without(f, v, rubrics, judge, "checks" if use.judge == "none" else use.judge)
            settled(v)


def _promote(rubric: Rubric | None, target: Path) -> None:
    if rubric is None:
        print("megarubric defend: nothing is proposed, so nothing is promoted", file=sys.stderr)
        return
    file, before, after = promotion(rubric, target)
    if before == after:
        print(f"{file}: {rubric.id} is there already", file=sys.stderr)
        return
    print(difference(file, before, after), file=sys.stderr)
    write_promotion(file, before, after)
    print(f"promoted to {file}; a run uses it with reward.defence: [{file}]", file=sys.stderr)


def _table(f: Field, verdicts: Sequence[Verdict], tested: int, notes: Sequence[str]) -> None:
    for note in notes:
        say(note)
    say(
        f"{len(f.lines)} answers mined, {int(f.flagged.sum())} flagged, {tested} features tested, "
        f"{len(verdicts)} exploits found"
    )
    if not verdicts:
        return
    table = Table()
    for column in ("exploit", "answers", "lift", "gain", "caught", "false vetoes (95% upper)", "proposed"):
        table.add_column(column, justify="left" if column in ("exploit", "proposed") else "right")
    for v in verdicts:
        lead = v.exploit.lead
        o = v.chosen
        table.add_row(
            report.short(str(lead.tell)),
            str(len(v.exploit.carriers)),
            f"{lead.lift:.1f}",
            f"{lead.gain:+.3f}",
            f"{o.caught.value:.0%}" if o else "-",
            f"{o.ordinary.value:.2%} ({o.ordinary.high:.2%})" if o else "-",
            o.check.kind if o else f"no: {v.reason}",
        )
    console.print(table, markup=False)
