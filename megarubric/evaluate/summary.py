"""What a set of scored answers amounts to: mean reward, vetoes, and a mean for every criterion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from megarubric.judging.types import Judgement
from megarubric.reward.reference import RewardResult


class CriterionSummary(msgspec.Struct, frozen=True):
    """Over the answers whose rubric has the criterion: mean normalised score of the judged ones (None: none judged),
    the share judged, how often it was the first failing veto."""

    mean: float | None
    judged: int
    asked: int
    vetoes: int


class Example(msgspec.Struct, frozen=True):
    """One answer as a person reads it."""

    prompt_id: str
    prompt: str
    response: str
    reward: float | None
    veto: str | None


class Summary(msgspec.Struct, frozen=True):
    """`reward` is the mean over valid answers, nan when none is; `words` the mean length of an answer."""

    answers: int
    reward: float
    valid_fraction: float
    veto_rate: float
    unread_fraction: float
    words: float
    criteria: dict[str, CriterionSummary]
    examples: list[Example] = []


def summarize(
    judged: Sequence[Mapping[str, Judgement]],
    rewards: Sequence[RewardResult],
    responses: Sequence[str],
    examples: Sequence[Example] = (),
) -> Summary:
    """Summary of N answers: `judged[i]` and `rewards[i]` belong to `responses[i]`."""
    valid = [r.reward for r in rewards if r.valid and r.reward is not None]
    unread = asked = 0
    scores: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    vetoes: dict[str, int] = {}
    for row, result in zip(judged, rewards, strict=True):
        for name, j in row.items():
            counts[name] = counts.get(name, 0) + 1
            kept = scores.setdefault(name, [])
            if j.score is not None:
                kept.append(j.score)
            if j.source == "judge":
                asked += 1
                unread += not j.read
        if result.veto is not None:
            vetoes[result.veto] = vetoes.get(result.veto, 0) + 1
    n = len(rewards)
    return Summary(
        answers=n,
        reward=sum(valid) / len(valid) if valid else float("nan"),
        valid_fraction=len(valid) / n if n else 0.0,
        veto_rate=sum(r.vetoed for r in rewards) / n if n else 0.0,
        unread_fraction=unread / asked if asked else 0.0,
        words=sum(len(r.split()) for r in responses) / n if n else 0.0,
        criteria={
            name: CriterionSummary(
                sum(kept) / len(kept) if kept else None, len(kept), counts[name], vetoes.get(name, 0)
            )
            for name, kept in scores.items()
        },
        examples=list(examples),
    )


def flat(summary: Summary, prefix: str) -> dict[str, float]:
    """The summary as flat metric names (spec/cli.md)."""
    values = {
        f"{prefix}/reward": summary.reward,
        f"{prefix}/valid_fraction": summary.valid_fraction,
        f"{prefix}/veto_rate": summary.veto_rate,
        f"{prefix}/words": summary.words,
    }
    for name, c in summary.criteria.items():
        if c.mean is not None:
            values[f"{prefix}/criterion/{name}"] = c.mean
    return values
