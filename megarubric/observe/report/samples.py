"""One pass over a sample of the rollouts: the answers that are shown, and what the hacking signals count."""

from __future__ import annotations

import heapq
import itertools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from megarubric.observe.report.source import Rollout, rollouts
from megarubric.rubrics.checks.registry import KINDS, Text, arguments

STEPS = 40  # so many steps are read, the first and the last among them
ANSWERS = 256  # of each, so many at most
SHOWN = 3  # answers in each group that is shown
LONGEST = 12_000  # characters of a text that is kept
PROMPTS = 1000  # prompts whose change is followed

DETECTORS = tuple(sorted(k.name for k in KINDS.values() if k.detector and not k.needs_rubric))


@dataclass
class StepCounts:
    """What one sampled step amounts to. Rates are shares of its `answers`; `top` is the best tenth by reward."""

    step: int
    answers: int = 0
    tripped: dict[str, float] = field(default_factory=dict)
    top_tripped: float | None = None
    length_correlation: float | None = None
    judge_std: float | None = None
    judge_extreme: float | None = None
    group_std: float | None = None


@dataclass
class Change:
    """Answers to one prompt, early and late, with the mean rewards of their groups."""

    early: Rollout
    late: Rollout
    before: float
    after: float


@dataclass
class Samples:
    """What `scan` found. `openings`: (words, count among the best tenth, its share there, its share overall)."""

    counts: list[StepCounts] = field(default_factory=list)
    best: list[Rollout] = field(default_factory=list)
    worst: list[Rollout] = field(default_factory=list)
    vetoed: list[Rollout] = field(default_factory=list)
    changed: list[Change] = field(default_factory=list)
    openings: list[tuple[str, int, float, float]] = field(default_factory=list)
    answers: int = 0
    steps_in_run: int = 0
    notes: list[str] = field(default_factory=list)


def spread(steps: list[int], most: int) -> list[int]:
    """At most `most` of the steps, evenly, with the first and the last."""
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def scan(files: Mapping[int, Path]) -> Samples:
    """Read a sample of the steps in `files` (step -> file), one answer at a time."""
    found = Samples(steps_in_run=len(files))
    keep = _Keeper()
    all_openings: Counter[str] = Counter()
    top_openings: Counter[str] = Counter()
    chosen = spread(sorted(files), STEPS)
    late = set(chosen[-max(1, len(chosen) // 3) :])
    for step in chosen:
        answers = [_cut(r) for r in itertools.islice(rollouts(files[step], found.notes), ANSWERS)]
        if not answers:
            continue
        found.answers += len(answers)
        trips = [tripped(r) for r in answers]
        top = _top_tenth(answers)
        found.counts.append(_count(step, answers, trips, top))
        keep.add(answers)
        if step in late:
            all_openings.update(opening(r.response) for r in answers)
            top_openings.update(opening(answers[i].response) for i in top)
    found.best, found.worst, found.vetoed = keep.best.rows(), keep.worst.rows(), keep.vetoed.rows()
    found.changed = keep.changes()
    n_all, n_top = all_openings.total(), top_openings.total()
    for words, count in top_openings.most_common(8):
        if words and count > 1:
            found.openings.append((words, count, count / n_top, all_openings[words] / n_all))
    return found


def _cut(r: Rollout) -> Rollout:
    """With texts of a length that can be kept."""
    if len(r.response) <= LONGEST and len(r.prompt) <= LONGEST:
        return r
    return msgspec.structs.replace(r, prompt=_short(r.prompt), response=_short(r.response))


def _short(text: str) -> str:
    left = len(text) - LONGEST
    return text if left <= 0 else f"{text[:LONGEST]}\n[{left:,} more characters]"


def tripped(r: Rollout) -> frozenset[str]:
    """The hack detectors of `rubrics.checks` that fire on an answer (those that need no rubric)."""
    text = Text(r.response, r.prompt, None)
    return frozenset(name for name in DETECTORS if KINDS[name].follows(arguments(name, {}), text))


def opening(response: str, words: int = 4) -> str:
    """The first words, lower case; of a language without spaces the first 12 characters."""
    head = re.findall(r"[^\W_]+(?:['’][^\W_]+)*", response[:400].casefold())[:words]
    return " ".join(head)[:60] if len(head) > 1 else "".join(head)[:12]


def _top_tenth(answers: list[Rollout]) -> list[int]:
    scored = [i for i, r in enumerate(answers) if r.reward is not None]
    scored.sort(key=lambda i: -(answers[i].reward or 0.0))
    return scored[: max(1, len(scored) // 10)] if scored else []


def _count(step: int, answers: list[Rollout], trips: list[frozenset[str]], top: list[int]) -> StepCounts:
    counts = StepCounts(step, len(answers))
    counts.tripped = {name: sum(name in t for t in trips) / len(answers) for name in DETECTORS}
    if top:
        counts.top_tripped = sum(bool(trips[i]) for i in top) / len(top)
    groups: dict[int, list[tuple[float, int]]] = {}
    for r in answers:
        if r.reward is not None:
            groups.setdefault(r.group, []).append((r.reward, len(r.response)))
    pairs = [np.array(rows, np.float64) for rows in groups.values() if len(rows) > 1]
    if pairs:
        counts.group_std = float(np.mean([p[:, 0].std() for p in pairs]))
        centred = np.concatenate([p - p.mean(axis=0) for p in pairs])  # within a prompt: prompts differ in length
        if (centred.std(axis=0) > 1e-9).all() and len(centred) > 3:
            counts.length_correlation = float(np.corrcoef(centred.T)[0, 1])
    scores = np.array(
        [j.score for r in answers for j in r.judgements.values() if j.source == "judge" and j.score is not None]
    )
    if len(scores):
        counts.judge_std = float(scores.std())
        counts.judge_extreme = float(np.mean((scores < 0.02) | (scores > 0.98)))
    return counts


class _Best:
    """The `SHOWN` answers of the greatest key, at most one a prompt and text."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Rollout]] = []
        self._seen: set[str] = set()
        self._order = itertools.count()

    def offer(self, key: float, r: Rollout) -> None:
        if r.prompt_id in self._seen or (len(self._heap) == SHOWN and key <= self._heap[0][0]):
            return
        self._seen.add(r.prompt_id)
        heapq.heappush(self._heap, (key, -next(self._order), r))
        if len(self._heap) > SHOWN:
            self._seen.discard(heapq.heappop(self._heap)[2].prompt_id)

    def rows(self) -> list[Rollout]:
        return [r for _, _, r in sorted(self._heap, key=lambda e: (-e[0], -e[1]))]


class _Keeper:
    """Chooses the answers that are shown."""

    def __init__(self) -> None:
        self.best, self.worst, self.vetoed = _Best(), _Best(), _Best()
        self._first: dict[str, tuple[Rollout, float]] = {}
        self._last: dict[str, tuple[Rollout, float]] = {}

    def add(self, answers: list[Rollout]) -> None:
        rewards: dict[str, list[float]] = {}
        heads: dict[str, Rollout] = {}
        for r in answers:
            if r.reward is None:
                continue
            if r.vetoed:
                self.vetoed.offer(r.r1 if r.r1 is not None else 0.0, r)  # what the veto cost most
            else:
                self.best.offer(r.reward + 1e-9 * r.step, r)
                self.worst.offer(-r.reward + 1e-9 * r.step, r)
            rewards.setdefault(r.prompt_id, []).append(r.reward)
            heads.setdefault(r.prompt_id, r)
        for name, values in rewards.items():
            middle = float(np.mean(values))
            near = min(
                (r for r in answers if r.prompt_id == name and r.reward is not None),
                key=lambda r: abs((r.reward or 0.0) - middle),
            )
            if name in self._first:
                self._last[name] = (near, middle)
            elif len(self._first) < PROMPTS:
                self._first[name] = (near, middle)

    def changes(self) -> list[Change]:
        pairs = [
            Change(self._first[name][0], late, self._first[name][1], after)
            for name, (late, after) in self._last.items()
        ]
        return sorted(pairs, key=lambda c: -abs(c.after - c.before))[:SHOWN]
