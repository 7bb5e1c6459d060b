"""What was found and what it would cost, for a person (Markdown) and for a program (plain data)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megarubric.recipe.defence.answers import Field, Recorded
from megarubric.recipe.defence.mining import Exploit, Find, Mined
from megarubric.recipe.defence.proposal import Option, Share, Verdict
from megarubric.recipe.defence.tells import fires
from megarubric.rubrics import Rubric

_EXAMPLES = 3
_ASKED = 10  # rows


def plain(
    recorded: Recorded, f: Field, mined: Mined, verdicts: Sequence[Verdict], rubric: Rubric | None, notes: Sequence[str]
) -> dict[str, Any]:
    """Everything as plain data, numbers unrounded."""
    return {
        "answers": len(recorded.lines),
        "mined": len(f.lines),
        "vetoed": sum(x.vetoed for x in recorded.lines),
        "unscored": sum(not x.valid for x in recorded.lines),
        "flagged": {"all": int(f.flagged.sum()), **f.why},
        "tested": mined.tested,
        "proposed": rubric.id if rubric else None,
        "exploits": [_verdict(v) for v in verdicts],
        "asked_for": [_find(e.lead) | {"same_as": len(e.finds) - 1} for e in mined.asked],
        "notes": list(notes),
    }


def _find(x: Find) -> dict[str, Any]:
    return {
        "tell": x.tell.kind,
        "what": x.tell.what,
        "answers": len(x.carriers),
        "prompts": x.prompts,
        "groups": x.groups,
        "flagged": x.flagged,
        "lift": x.lift,
        "gain": x.gain,
        "judged_gain": x.judged_gain,
        "z": x.z,
        "p": x.p,
    }


def _share(s: Share | None) -> dict[str, float] | None:
    return None if s is None else {"hits": s.hits, "n": s.n, "share": s.value, "low": s.low, "high": s.high}


def _option(o: Option) -> dict[str, Any]:
    return {
        "check": {"kind": o.check.kind, **o.check.params},
        "caught": _share(o.caught),
        "all_flagged": _share(o.all_flagged),
        "false_veto": _share(o.ordinary),
        "ordinary_are": o.ordinary_are,
        "spoilt": o.spoilt,
        "false_veto_clean": _share(o.clean),
    }


def _verdict(v: Verdict) -> dict[str, Any]:
    r = v.removal
    return {
        **_find(v.exploit.lead),
        "carriers": len(v.exploit.carriers),
        "tells": [str(x.tell) for x in v.exploit.finds],
        "share_by_step": {str(s): x for s, x in v.shares.items()},
        "onset": v.onset,
        "options": [_option(o) for o in v.options],
        "proposed": _option(v.chosen) if v.chosen else None,
        "reason": v.reason or None,
        "removal": None if r is None else {
            "judge": r.judge, "n": r.n, "recorded": r.recorded, "with_tell": r.with_tell, "without": r.without,
        },
    }  # fmt: skip


def markdown(
    title: str,
    recorded: Recorded,
    f: Field,
    mined: Mined,
    verdicts: Sequence[Verdict],
    rubric: Rubric | None,
    notes: Sequence[str],
    bound: float,
) -> str:
    """The report of a run."""
    vetoed, unscored = sum(x.vetoed for x in recorded.lines), sum(not x.valid for x in recorded.lines)
    proposed = sum(v.chosen is not None for v in verdicts)
    out = [
        f"# {title}: reward hacking",
        "",
        f"{len(recorded.lines)} answers: {vetoed} vetoed already, {unscored} unscored, {len(f.lines)} mined. Of these "
        f"{int(f.flagged.sum())} earned abnormally much ({f.why['step']} far above the other answers to their prompt, "
        f"{f.why['history']} far above the run's beginning, {f.why['top']} more in the top of their step).",
        "",
        f"{mined.tested} recurring surface features were tested within groups of answers to one prompt; "
        f"{len(verdicts)} exploit(s) were found, {proposed} veto(es) are proposed"
        + (f" in rubric `{rubric.id}`." if rubric else "."),
        *([""] + [f"- {note}" for note in notes] if notes else []),
    ]
    for k, v in enumerate(verdicts, 1):
        out += _section(k, f, v, bound)
    if mined.asked:
        out += [
            "",
            "## Paid, and asked for",
            "",
            "These pay within one prompt's answers, by what checks ask for and",
            "",
        ]
        out[-2] = "These pay within one prompt's answers, mostly through programmatic checks: no exploits of a judge."
        out += ["| feature | answers | prompts | gain | of it judged |", "| --- | --: | --: | --: | --: |"]
        out += [_asked(e) for e in mined.asked[:_ASKED]]
        if len(mined.asked) > _ASKED:
            out += ["", f"and {len(mined.asked) - _ASKED} more"]
    out += [
        "",
        "## How to read this",
        "",
        "Gain is the mean reward of the answers with the feature minus that of the other answers of the same prompt "
        "and step. Lift is how much more frequent the feature is among the flagged. p is corrected for all features "
        "tested (Holm). A veto is proposed when the 95% upper bounds of its false-veto rates are at most "
        f"{bound:.2%}. What is no surface feature (a wrong fact told with confidence) is not seen here.",
    ]
    return "\n".join(out) + "\n"


def _section(k: int, f: Field, v: Verdict, bound: float) -> list[str]:
    lead = v.exploit.lead
    out = [
        "",
        f"## {k}. {_cell(str(lead.tell))}",
        "",
        f"- {len(v.exploit.carriers)} answers to {lead.prompts} prompts; {lead.flagged} of {len(lead.carriers)} "
        f"flagged, lift {lead.lift:.1f}",
        f"- gain {lead.gain:+.3f} ({lead.judged_gain:+.3f} by judged criteria), z {lead.z:.1f} in {lead.groups} "
        f"groups, p {lead.p:.1e}",
        f"- share of the mined answers by step: {_course(v.shares)}; "
        + (f"at least 5% from step {v.onset}" if v.onset is not None else "never 5%"),
    ]
    others = [_cell(str(x.tell)) for x in v.exploit.finds[1:7]]
    if others:
        out.append(f"- the same answers show: {'; '.join(others)}" + (" ..." if len(v.exploit.finds) > 7 else ""))
    if (r := v.removal) is not None:
        how = "by checks alone" if r.judge == "checks" else f"by {r.judge}"
        out.append(
            f"- removed from {r.n} answers and scored again {how}: recorded {r.recorded:.3f}, "
            f"as it is {r.with_tell:.3f}, without it {r.without:.3f}"
            + (
                "; judged criteria keep the recorded score here, so only what checks ask for is seen to fall"
                if r.judge == "checks"
                else f"; proxy gain {r.lost:+.3f}, content {lead.gain - r.lost:+.3f}"
            )
        )
    if v.chosen is not None:
        o = v.chosen
        words = o.check.params.get("forbidden_words")
        shown = ", ".join(f'"{_cell(w)}"' for w in words[:8]) + (" ..." if len(words) > 8 else "") if words else ""
        out += [
            f"- **proposed veto**: `{o.check.kind}` {shown}".rstrip(),
            f"  - catches {o.caught} of the flagged that carry it, {o.all_flagged} of all flagged",
            f"  - false vetoes: {o.ordinary} of ordinary answers ({o.ordinary_are})",
        ]
        if o.clean is not None:
            out.append(f"  - false vetoes: {o.clean} of the clean set")
    else:
        out.append(f"- **no veto proposed**: {_cell(v.reason, 200)}")
        out += [
            f"  - {_cell(o.name)}: catches {o.caught.value:.0%}, false vetoes {o.ordinary} of ordinary answers "
            f"({o.ordinary_are})" + (f", {o.clean} of the clean set" if o.clean is not None else "")
            for o in v.options
        ]
    if v.options and v.options[0].spoilt:
        decides = "the clean set decides alone" if v.options[0].clean is not None else "give --clean to settle it"
        out.append(
            "- the exploit is there from the beginning, so answers that were not flagged carry it too and are counted "
            f"as honest above; {decides}"
        )
    option = v.chosen or next(iter(v.options), None)
    out += ["", "Examples (reward):", ""]
    shown_ = [
        i
        for i in sorted(v.exploit.carriers, key=lambda i: (not f.flagged[i], -f.reward[i], i))
        if option is None or fires(option.check, f.lines[i].prompt, f.lines[i].response, None)
    ]
    for i in (shown_ or list(v.exploit.carriers))[:_EXAMPLES]:
        line = f.lines[i]
        out.append(f"- {line.place}, {f.reward[i]:.2f}: {_cell(line.prompt, 120)} -> {_cell(line.response, 300)}")
    return out


def _asked(e: Exploit) -> str:
    x = e.lead
    return f"| {_cell(str(x.tell))} | {len(x.carriers)} | {x.prompts} | {x.gain:+.3f} | {x.judged_gain:+.3f} |"


def _course(shares: dict[int, float]) -> str:
    """First, some in between and last."""
    steps = sorted(shares)
    some = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, min(5, len(steps))).round().astype(int))]
    return ", ".join(f"{s}: {shares[s]:.1%}" for s in some)


def short(text: str, most: int = 60) -> str:
    """Text on one line, cut when long."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."


def _cell(text: str, most: int = 80) -> str:
    """Text of an answer on one line of Markdown: it must not become a heading, a table or markup of the report."""
    text = short(text, most)
    return "".join("\\" + c if c in "\\`*_|<>[]#" else c for c in text)
