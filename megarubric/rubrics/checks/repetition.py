"""`hack:repetition` and `hack:rubric_echo`: word runs a text has in common with itself, or with its rubric."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated

from msgspec import Meta

from megarubric.rubrics.checks.registry import CheckArgs, Text, register
from megarubric.rubrics.checks.text import undisguised

MAX_PERIOD = 60  # words
MIN_LOOP = 12  # words
MIN_REPEATING_TEXT = 50  # words
MIN_ECHO = 5  # words

_TOKEN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\u3040-\u30ff]|[^\W_]+(?:'[^\W_]+)?")
_CHARACTER_LOOP = re.compile(r"(\w{1,8}?)\1{23,}")


class Repetition(CheckArgs, frozen=True):
    """What counts as repetition; in Chinese and Japanese text a character stands for half a word.

    A loop: `loops` turns in a row of one stretch of up to 60 words, 12 words or more in all. Repeats: more than
    `share` of the words stand in runs of `ngram` words that occurred before, in a text of 50 words or more."""

    loops: Annotated[int, Meta(ge=3, le=100)] = 4
    ngram: Annotated[int, Meta(ge=2, le=20)] = 4
    share: Annotated[float, Meta(gt=0, lt=1)] = 0.5


class RubricEcho(CheckArgs, frozen=True):
    """`words` in a row shared with a description or tier text are an echo; so is a whole text of 5 words or more."""

    words: Annotated[int, Meta(ge=MIN_ECHO, le=50)] = 8


def tokens(text: str) -> list[str]:
    """Words; every Chinese or Japanese character is one."""
    return _TOKEN.findall(text)


def looping(words: Sequence[str], loops: int) -> bool:
    """Whether a stretch of at most MAX_PERIOD words stands `loops` times in a row, MIN_LOOP words or more in all, or a
    single word is 24 turns of up to 8 characters. O(MAX_PERIOD * len(words))."""
    if any(len(w) >= 24 and _CHARACTER_LOOP.search(w[:2000]) for w in words):
        return True
    for period in range(1, min(MAX_PERIOD, len(words) // 2) + 1):
        need = max(loops * period, MIN_LOOP) - period  # equal words one period apart, in a row
        run = 0
        for word, earlier in zip(words[period:], words):
            run = run + 1 if word == earlier else 0
            if run >= need:
                return True
    return False


def runs(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Every run of `n` words."""
    return zip(*(words[i:] for i in range(n)))


def repeated_share(words: Sequence[str], n: int) -> float:
    """Share of the words that stand in a run of `n` words which has occurred before, in [0, 1]."""
    if not words:
        return 0.0
    seen: set[tuple[str, ...]] = set()
    covered = bytearray(len(words))
    for i, run in enumerate(runs(words, n)):
        if run in seen:
            covered[i : i + n] = b"\x01" * n
        seen.add(run)
    return sum(covered) / len(words)


@register("hack:repetition", Repetition, detector=True)
def repetition(args: Repetition, text: Text) -> bool:
    """Says the same again and again. A refrain does not fire, a loop does."""
    words = tokens(undisguised(text.response, 20_000))
    if looping(words, args.loops):
        return True
    scale = 2 if sum(w >= "\u3040" for w in words) > len(words) / 2 else 1
    return len(words) >= scale * MIN_REPEATING_TEXT and repeated_share(words, scale * args.ngram) > args.share


@register("hack:rubric_echo", RubricEcho, detector=True, needs_rubric=True)
def rubric_echo(args: RubricEcho, text: Text) -> bool:
    """Repeats the rubric's own words, which the writer is not shown, where prompt and reference do not say them."""
    assert text.rubric is not None
    spoken = tokens(undisguised(text.response))
    given = [tokens(undisguised(t)) for t in (text.prompt, text.rubric.prompt, text.rubric.reference) if t]
    fresh: dict[int, set[tuple[str, ...]]] = {}
    for criterion in text.rubric.criteria:
        for source in (criterion.description, *(tier.text for tier in criterion.tiers or ())):
            words = tokens(undisguised(source))
            n = min(args.words, len(words))
            if n < MIN_ECHO:
                continue
            if n not in fresh:
                fresh[n] = set(runs(spoken, n)).difference(*(runs(g, n) for g in given))
            if not fresh[n].isdisjoint(runs(words, n)):
                return True
    return False
