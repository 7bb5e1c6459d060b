"""Which tells separate answers of abnormally high reward from ordinary ones, and pay within one prompt's answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from megarubric.recipe.defence.answers import Field
from megarubric.recipe.defence.numbers import Strata, holm, upper_tail
from megarubric.recipe.defence.tells import WORDED, Tell, tells_of, word_tells
from megarubric.rubrics import Rubric
from megarubric.rubrics.checks.text import count_words

MIN_PROMPTS = 5  # an exploit recurs on prompts that have nothing in common
MIN_GROUPS = 5  # groups that hold carriers and others
LEAST_LIFT = 1.5
_MANY_WORDS = 1_000_000
_BUCKETS = 1 << 22
SAME = 0.7  # overlap of carriers from which two tells are one exploit
_LESS_TELLING = {"detector": 0, "opening": 1, "ending": 1, "phrase": 1, "repetition": 2, "format": 3, "length": 4}


@dataclass(frozen=True, slots=True)
class Find:
    """One tell's numbers over the mined answers. `carriers` are indices into the field.

    `lift`: share of carriers among the flagged over that among the others (half an answer added to each count).
    `gain`: mean reward of carriers minus that of the other answers of their own groups; `judged_gain` the same of the
    part of the reward that judged criteria gave. `p` belongs to `judged_gain` and holds for all tells tested together
    (Holm); `p_reward` likewise to `gain`.
    """

    tell: Tell
    carriers: tuple[int, ...]
    prompts: int
    groups: int
    flagged: int
    lift: float
    gain: float
    judged_gain: float
    z: float
    p: float = 1.0
    p_reward: float = 1.0


@dataclass(frozen=True, slots=True)
class Exploit:
    """Finds whose carriers are much the same, the one that says most first. `carriers` is their union."""

    finds: tuple[Find, ...]
    carriers: tuple[int, ...]

    @property
    def lead(self) -> Find:
        return self.finds[0]


@dataclass(frozen=True, slots=True)
class Mined:
    """`exploits` pay by what judged criteria say; `asked` are tells that pay because a check asks for them. `tested`
    counts the tells that occurred often enough to be tested."""

    exploits: list[Exploit]
    asked: list[Exploit]
    tested: int


def carriers_of(field: Field, rubrics: Mapping[str, Rubric], min_support: int) -> dict[Tell, list[int]]:
    """Every tell of at least `min_support` answers to MIN_PROMPTS prompts, with the answers that carry it.

    Long runs are read twice: nearly all word runs occur once, and a first look that only counts hashes keeps them out
    of memory. Which tells are found does not depend on the hashes.
    """
    words = np.array([count_words(x.response) for x in field.lines])
    length = (int(np.quantile(words, 0.1)), int(np.quantile(words, 0.9)))
    twice = int(words.sum()) > _MANY_WORDS
    seen = np.zeros(_BUCKETS, np.uint32)
    err = Console(stderr=True)
    bar = partial(track, console=err, transient=True, disable=not err.is_terminal)
    if twice:
        for line in bar(field.lines, "counting"):
            tells = word_tells(line.prompt, line.response)
            seen[np.unique(np.fromiter((hash(t) % _BUCKETS for t in tells), np.int64, len(tells)))] += 1
    found: defaultdict[Tell, list[int]] = defaultdict(list)
    for i, line in enumerate(bar(field.lines, "reading answers")):
        for tell in tells_of(line.prompt, line.response, rubrics.get(line.rubric_hash), length):
            if not twice or tell.kind not in WORDED or seen[hash(tell) % _BUCKETS] >= min_support:
                found[tell].append(i)
    return {
        tell: at
        for tell, at in found.items()
        if len(at) >= min_support and len({field.lines[i].prompt_id for i in at}) >= MIN_PROMPTS
    }


def mine(
    field: Field, rubrics: Mapping[str, Rubric], *, alpha: float = 0.01, min_gain: float = 0.05, min_support: int = 8
) -> Mined:
    """The exploits of a run, the surest first.

    A tell is tested within groups of answers to one prompt in one step, so neither easy prompts nor progress over the
    run passes for its doing. It is one of an exploit when the judged part of the reward rises by `min_gain` or more
    with an adjusted p below `alpha`, makes up half of the rise or more, and the lift is LEAST_LIFT or more.
    """
    found = carriers_of(field, rubrics, min_support)
    judged, reward = Strata(field.group, field.judged), Strata(field.group, field.reward)
    finds: list[Find] = []
    p_judged, p_reward = [], []
    flagged, n = int(field.flagged.sum()), len(field.lines)
    for tell in sorted(found):
        at = found[tell]
        judged_gain, z, groups = judged.compare(at)
        gain, z_reward, _ = reward.compare(at)
        if groups < MIN_GROUPS:
            continue
        hit = int(field.flagged[at].sum())
        lift = ((hit + 0.5) / (flagged + 1)) / ((len(at) - hit + 0.5) / (n - flagged + 1))
        prompts = len({field.lines[i].prompt_id for i in at})
        finds.append(Find(tell, tuple(at), prompts, groups, hit, lift, gain, judged_gain, z))
        p_judged.append(upper_tail(z))
        p_reward.append(upper_tail(z_reward))
    adjusted, adjusted_reward = holm(np.array(p_judged)), holm(np.array(p_reward))
    finds = [
        replace(f, p=float(p), p_reward=float(q)) for f, p, q in zip(finds, adjusted, adjusted_reward, strict=True)
    ]
    judges_pay = [f for f in finds if f.p < alpha and f.judged_gain >= max(min_gain, 0.5 * f.gain)]
    hacks = [f for f in judges_pay if f.lift >= LEAST_LIFT]
    known = {f.tell for f in judges_pay}
    asked = [f for f in finds if f.p_reward < alpha and f.gain >= min_gain and f.tell not in known]
    level = alpha / max(1, len(finds))
    return Mined(
        _one_by_one(hacks, field, field.judged, level, min_gain),
        _one_by_one(asked, field, field.reward, level, min_gain),
        len(finds),
    )


def _one_by_one(
    finds: Sequence[Find], field: Field, values: NDArray[np.float64], level: float, min_gain: float
) -> list[Exploit]:
    """Exploits, the surest first, each with the finds whose carriers are much the same. What is left is tested again on
    the answers that carry none of the exploits before, at p below `level`: a tell that pays only in their company (the
    length of answers that praise themselves) is no exploit of its own.

    The lead of an exploit is the most telling kind of tell, then the one with most carriers, then the longest.
    """
    out: list[Exploit] = []
    left = sorted(finds, key=lambda f: (-f.z, -len(f.tell.what), f.tell))
    explained = np.zeros(len(field.lines), bool)
    while left:
        first, theirs = left[0], set(left[0].carriers)
        same: list[Find] = [first]
        rest: list[Find] = []
        for f in left[1:]:
            mine_ = set(f.carriers)
            alike = len(mine_ & theirs) >= SAME * min(len(mine_), len(theirs))
            (same if alike else rest).append(f)
        same.sort(key=lambda f: (_LESS_TELLING[f.tell.kind], -len(f.carriers), -len(f.tell.what), f.tell))
        carriers = sorted({i for f in same for i in f.carriers})
        out.append(Exploit(tuple(same), tuple(carriers)))
        explained[carriers] = True
        kept = np.flatnonzero(~explained)
        if not len(kept):
            break
        place = np.full(len(field.lines), -1)
        place[kept] = np.arange(len(kept))
        _, groups = np.unique(field.group[kept], return_inverse=True)
        strata = Strata(groups, values[kept])
        left = [f for f in rest if _pays(strata, [p for i in f.carriers if (p := place[i]) >= 0], level, min_gain)]
    return out


def _pays(strata: Strata, carriers: Sequence[int], level: float, min_gain: float) -> bool:
    gain, z, groups = strata.compare(carriers) if carriers else (0.0, 0.0, 0)
    return groups >= MIN_GROUPS and gain >= min_gain and upper_tail(z) < level


def share_by_step(field: Field, carriers: Sequence[int]) -> dict[int, float]:
    """Step -> share of its mined answers that carry."""
    carrying = np.zeros(len(field.lines), bool)
    carrying[list(carriers)] = True
    return {int(s): float(carrying[field.step == s].mean()) for s in np.unique(field.step)}


def onset(shares: Mapping[int, float], least: float = 0.05, window: int = 3) -> int | None:
    """The first step whose share, averaged over itself and up to `window` - 1 steps before it, is `least` or more."""
    steps = sorted(shares)
    for i, step in enumerate(steps):
        near = [shares[s] for s in steps[max(0, i - window + 1) : i + 1]]
        if sum(near) / len(near) >= least:
            return step
    return None
