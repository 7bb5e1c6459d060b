"""From exploits to vetoes: which check, how many it catches, how many honest answers it would cost; then the rubric."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megarubric.recipe.defence.answers import Field, Line
from megarubric.recipe.defence.mining import Exploit, Find, onset, share_by_step
from megarubric.recipe.defence.numbers import wilson
from megarubric.recipe.defence.tells import WORDED, fires, surface_forms
from megarubric.rubrics import Check, Criterion, Provenance, Rubric, Veto, parse_rubric, to_dict
from megarubric.rubrics.checks import KINDS

MAX_PHRASES = 40  # literal forms in one veto
_INSIDE = 0.95  # share of a run's carriers that also carry a longer run, from which the longer stands for it
_ADDS = 0.1  # share of a run's carriers that must be new for it to be added
_LEAST_CAUGHT = 0.5
_FEWEST = 100  # ordinary answers before the onset, from which they are the ones to measure on


@dataclass(frozen=True, slots=True)
class Share:
    """`hits` of `n`, with its 95% interval (Wilson)."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        return self.hits / self.n if self.n else 0.0

    @property
    def low(self) -> float:
        return wilson(self.hits, self.n)[0]

    @property
    def high(self) -> float:
        return wilson(self.hits, self.n)[1]

    def __str__(self) -> str:
        return f"{self.hits} of {self.n} ({self.value:.2%}, 95% interval {self.low:.2%} to {self.high:.2%})"


@dataclass(frozen=True, slots=True)
class Removal:
    """What becomes of the reward of `n` caught answers without the sentences that are caught, all means: `recorded`
    by the run; `with_tell` and `without` scored anew, by `judge` ("checks" when no judge is given: judged criteria
    then keep what the run recorded)."""

    judge: str
    n: int
    recorded: float
    with_tell: float
    without: float

    @property
    def lost(self) -> float:
        """What the recorded reward loses: the part of it that the removed words earned, or were credited with."""
        return self.recorded - self.without


@dataclass(frozen=True, slots=True)
class Option:
    """One way to veto an exploit, measured. `caught` is of the flagged answers that carry the exploit, `ordinary` of
    those that were not flagged (before the exploit's onset, where that leaves enough), `clean` of a clean set.
    `spoilt`: the exploit was there from the beginning, so unflagged answers carry it too and are no honest ones; a
    clean set, if there is one, then decides alone."""

    check: Check
    caught: Share
    all_flagged: Share
    ordinary: Share
    ordinary_are: str
    clean: Share | None
    spoilt: bool = False

    @property
    def name(self) -> str:
        """The check in a few words."""
        phrases = self.check.params.get("forbidden_words")
        if phrases is None:
            return self.check.kind
        return f"{self.check.kind} {phrases[0]!r}" + (f" and {len(phrases) - 1} more" if len(phrases) > 1 else "")

    def refused(self, bound: float) -> str | None:
        """Why it is no veto, or None: the upper ends of the intervals must lie within `bound`, and it must catch half.
        A veto that most of an exploit slips past teaches the policy its other wordings."""
        ordinary = None if self.spoilt and self.clean is not None else self.ordinary
        for name, share in (("ordinary", ordinary), ("clean", self.clean)):
            if share is not None and share.high > bound:
                few = f", {share.n} answers cannot show it" if share.hits == 0 else ""
                return f"false vetoes on {name} answers may reach {share.high:.2%}, above {bound:.2%}{few}"
        if self.caught.value < _LEAST_CAUGHT:
            return f"it catches {self.caught.value:.0%} of the flagged answers that carry the exploit"
        return None


@dataclass(slots=True)
class Verdict:
    """An exploit and what is done about it: `chosen` is proposed as a veto, or `reason` says why nothing is."""

    exploit: Exploit
    shares: dict[int, float]
    onset: int | None
    options: list[Option] = field(default_factory=list)
    chosen: Option | None = None
    reason: str = ""
    removal: Removal | None = None


def weigh(
    f: Field, exploit: Exploit, rubrics: Mapping[str, Rubric], clean: Sequence[tuple[str, str]], bound: float
) -> Verdict:
    """Measure each way to veto the exploit and choose: of those within the bound, the one that catches most; of nearly
    equal ones a detector, which is harder to write around than a phrase."""
    shares = share_by_step(f, exploit.carriers)
    verdict = Verdict(exploit, shares, onset(shares))
    checks = candidate_checks(f, exploit)
    if not checks:
        verdict.reason = "no deterministic check sees it; a judged criterion has to be written by a person"
        return verdict
    carrying = set(exploit.carriers)
    flagged = [i for i in range(len(f.lines)) if f.flagged[i]]
    ordinary, ordinary_are = _ordinary(f, verdict.onset)
    spoilt = verdict.onset is not None and "before" not in ordinary_are
    for check in checks:

        def hits(at: Sequence[int], check: Check = check) -> Share:
            return Share(sum(_fires_on(check, f.lines[i], rubrics) for i in at), len(at))

        verdict.options.append(
            Option(
                check,
                hits([i for i in flagged if i in carrying]),
                hits(flagged),
                hits(ordinary),
                ordinary_are,
                Share(sum(fires(check, p, r, None) for p, r in clean), len(clean)) if clean else None,
                spoilt,
            )
        )
    fit = [o for o in verdict.options if o.refused(bound) is None]
    if fit:
        verdict.chosen = max(fit, key=lambda o: (round(o.caught.value, 1), KINDS[o.check.kind].detector, o.caught.hits))
    else:
        best = max(verdict.options, key=lambda o: (o.caught.value, -o.ordinary.high))
        verdict.reason = f"{best.name}: {best.refused(bound)}"
    return verdict


def _ordinary(f: Field, began: int | None) -> tuple[list[int], str]:
    """Answers to measure false vetoes on: not flagged, and before the exploit's onset where those are _FEWEST or more.
    Once an exploit spreads, answers that are not flagged carry it too."""
    all_ = [i for i in range(len(f.lines)) if not f.flagged[i]]
    before = [i for i in all_ if began is not None and f.step[i] < began]
    if len(before) >= _FEWEST:
        return before, f"not flagged, before step {began}"
    return all_, "not flagged, all steps"


def _fires_on(check: Check, line: Line, rubrics: Mapping[str, Rubric]) -> bool:
    return fires(check, line.prompt, line.response, rubrics.get(line.rubric_hash))


def candidate_checks(f: Field, exploit: Exploit) -> list[Check]:
    """Its detectors; the literal phrases of the word runs that together cover it; and the widest run by itself."""
    checks = [Check(find.tell.what, {}) for find in exploit.finds if find.tell.kind == "detector"]
    forms: list[list[str]] = []
    for find in _covering([x for x in exploit.finds if x.tell.kind in WORDED]):
        own: Counter[str] = Counter()
        for i in find.carriers:
            own.update(surface_forms(find.tell.what, f.lines[i].response))
        if own:
            forms.append([form for form, _ in sorted(own.items(), key=lambda item: (-item[1], item[0]))])
    if forms:
        checks.append(_forbidden(list(dict.fromkeys(x for own in forms for x in own))[:MAX_PHRASES]))
        if len(forms) > 1:
            checks.append(_forbidden(forms[0][:MAX_PHRASES]))
    return checks


def _covering(finds: Sequence[Find]) -> list[Find]:
    """Word runs that cover all carriers of `finds`, the widest first. A run that nearly always stands inside a longer
    one is left to the longer: the fewer honest texts say it by chance, the better."""
    closed = [
        x
        for x in finds
        if not any(
            len(y.tell.what) > len(x.tell.what)
            and f" {x.tell.what} " in f" {y.tell.what} "
            and len(set(x.carriers) & set(y.carriers)) >= _INSIDE * len(x.carriers)
            for y in finds
        )
    ]
    chosen: list[Find] = []
    covered: set[int] = set()
    for x in sorted(closed, key=lambda x: (-len(x.carriers), -len(x.tell.what), x.tell)):
        if len(set(x.carriers) - covered) >= _ADDS * len(x.carriers):
            chosen.append(x)
            covered |= set(x.carriers)
    return chosen


def _forbidden(phrases: Sequence[str]) -> Check:
    return Check("keywords:forbidden_words", {"forbidden_words": list(phrases)})


def rubric_of(verdicts: Sequence[Verdict], rubric_id: str, source: str, model: str) -> Rubric | None:
    """The defence rubric of all chosen vetoes, gates without weight; None when nothing was chosen.

    Its provenance is hybrid: the phrases are the policy's, `model`, the rules that chose them are this program's.
    """
    criteria: list[Criterion] = []
    seen: set[str] = set()
    for v in verdicts:
        if v.chosen is None:
            continue
        check = v.chosen.check
        detector = KINDS[check.kind].detector
        if detector:
            name, text = (
                check.kind.partition(":")[2].replace("_", "-"),
                f"The exploit that the detector {check.kind} finds.",
            )
        else:
            first = check.params["forbidden_words"][0]
            name = re.sub(r"[^\w]+", "-", first).strip("-")[:40] or "phrase"
            text = f"Says {first!r}, which was paid without being asked for."
        text += f" Reward of answers to one prompt with it minus without it: {v.exploit.lead.gain:+.2f}."
        base, n = f"no-{name}".lower(), 2
        name = base
        while name in seen:
            name, n = f"{base}-{n}", n + 1
        if any(c.check == check for c in criteria):
            continue
        seen.add(name)
        criteria.append(Criterion(id=name, description=text, weight=0.0, check=check, veto=Veto(0.5, detector)))
    if not criteria:
        return None
    rubric = Rubric(
        id=rubric_id,
        title="Exploits found in a run's own answers",
        scope="task",
        family="defence",
        provenance=Provenance(author="hybrid", source=source, licence="Apache-2.0", model=model),
        # Gates alone: the weights are those of the rubrics they are added to.
        tags=("reward-hacking", "mined", "lint-allow:no-weight"),
        criteria=tuple(criteria),
    )
    return parse_rubric(to_dict(rubric), source)
