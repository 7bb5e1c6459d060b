"""Proxy gain and content: the answers that a veto catches, scored again without the sentences that it catches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from megarubric.judging.judge import Judge
from megarubric.judging.types import JudgeItem, Judgement
from megarubric.recipe.defence.answers import Field
from megarubric.recipe.defence.proposal import Removal, Verdict
from megarubric.recipe.defence.tells import without
from megarubric.reward.batch import aggregate_batch
from megarubric.rubrics import Rubric


async def judge_without(
    f: Field, verdict: Verdict, rubrics: Mapping[str, Rubric], judge: Judge, name: str, most: int = 32
) -> Removal | None:
    """Score up to `most` of the caught carriers as they are and without what is caught; None when none can be scored
    both ways (no rubric at hand, nothing left of the answers, or unscored).

    A `judge` without a backend scores by checks: judged criteria keep the recorded judgement on both sides, so what is
    lost is what the checks asked the removed words for.
    """
    option = verdict.chosen or next(iter(verdict.options), None)
    if option is None:
        return None
    picked: list[tuple[int, str, Rubric]] = []
    # Which ones is decided by their place alone.
    for i in sorted(verdict.exploit.carriers, key=lambda i: hashlib.sha256(f.lines[i].place.encode()).digest()):
        line = f.lines[i]
        rubric = rubrics.get(line.rubric_hash)
        if len(picked) == most or rubric is None:
            continue
        rest = without(option.check, line.prompt, line.response, rubric)
        if rest is not None and rest.strip() and rest != line.response:
            picked.append((i, rest, rubric))
    if not picked:
        return None
    items = []
    for i, rest, rubric in picked:
        line = f.lines[i]
        kept: dict[str, Judgement] | None = None
        if judge.backend is None:
            kept = {k: j.judgement(k) for k, j in line.judgements.items() if j.source != "check"}
        items.append(JudgeItem(rubric, line.prompt, line.response, kept=kept))
        items.append(JudgeItem(rubric, line.prompt, rest, kept=kept))
    judged = await judge.judge(items)
    rewards = _rewards([item.rubric for item in items], judged)
    both = [
        (f.reward[i], a, b)
        for (i, _, _), a, b in zip(picked, rewards[::2], rewards[1::2], strict=True)
        if a is not None and b is not None
    ]
    if not both:
        return None
    recorded, with_tell, rest_reward = (float(sum(column) / len(both)) for column in zip(*both))
    return Removal(name, len(both), recorded, with_tell, rest_reward)


def _rewards(rubrics: Sequence[Rubric], judged: Sequence[Mapping[str, Judgement]]) -> list[float | None]:
    distinct = list({r.hash: r for r in rubrics}.values())
    place = {r.hash: i for i, r in enumerate(distinct)}
    scores = [{name: j.score for name, j in row.items()} for row in judged]
    results = aggregate_batch(distinct, [place[r.hash] for r in rubrics], scores).results()
    return [None if r.reward is None else float(r.reward) for r in results]


def settled(verdict: Verdict) -> None:
    """Withdraw the proposal when removal shows that the gain is no proxy gain: without the caught words the answers
    keep more than half of what they gain over the others, or the checks asked for the words."""
    r, gain = verdict.removal, verdict.exploit.lead.gain
    if r is None or verdict.chosen is None:
        return
    if r.judge == "checks":
        if r.with_tell - r.without > 0.5 * gain:
            verdict.chosen = None
            verdict.reason = (
                f"the checks ask for it: they take {r.with_tell - r.without:.2f} of the gain when it is removed"
            )
    elif r.lost < 0.5 * gain:
        verdict.chosen = None
        verdict.reason = f"content: judged again without it the answers keep {gain - r.lost:+.2f} of {gain:+.2f}"
