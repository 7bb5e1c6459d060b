"""`keywords:*`. Keywords are literal text, in any letter case.

IFEval puts them into a regular expression unescaped; for keywords of letters that is the same, and here "C++" and "..."
mean themselves and no keyword can be a pattern that never ends.
"""

from __future__ import annotations

import functools
import re
from typing import Annotated

from msgspec import Meta

from megarubric.rubrics.checks.counts import Relation, holds
from megarubric.rubrics.checks.registry import CheckArgs, Count, Phrase, Phrases, Text, register


class Existence(CheckArgs, frozen=True):
    keywords: Phrases


class ForbiddenWords(CheckArgs, frozen=True):
    forbidden_words: Phrases


class Frequency(CheckArgs, frozen=True):
    keyword: Phrase
    frequency: Count
    relation: Relation


class LetterFrequency(CheckArgs, frozen=True):
    letter: Annotated[str, Meta(min_length=1, max_length=1, pattern=r"\S")]
    let_frequency: Count
    let_relation: Relation


@functools.lru_cache(4096)
def _literal(phrase: str) -> re.Pattern[str]:
    return re.compile(re.escape(phrase), re.IGNORECASE)


def _unspaced(char: str) -> bool:
    """Whether the character belongs to a script written without spaces, where words have no visible bounds."""
    return "\u2e80" <= char <= "\u9fff" or "\uac00" <= char <= "\ud7a3" or "\uf900" <= char <= "\ufaff"


@functools.lru_cache(4096)
def _whole_word(phrase: str) -> re.Pattern[str]:
    """The phrase with a word bound at either end; no bound is asked where the phrase ends in Chinese or Japanese."""
    left = "" if _unspaced(phrase[0]) else r"\b"
    right = "" if _unspaced(phrase[-1]) else r"\b"
    return re.compile(left + re.escape(phrase) + right, re.IGNORECASE)


@register("keywords:existence", Existence)
def existence(args: Existence, text: Text) -> bool:
    """Every keyword occurs, also inside a longer word."""
    return all(_literal(k).search(text.response) for k in args.keywords)


@register("keywords:forbidden_words", ForbiddenWords)
def forbidden_words(args: ForbiddenWords, text: Text) -> bool:
    """No forbidden word occurs as a whole word."""
    return not any(_whole_word(w).search(text.response) for w in args.forbidden_words)


@register("keywords:frequency", Frequency)
def frequency(args: Frequency, text: Text) -> bool:
    """The keyword occurs so often, also inside longer words."""
    return holds(len(_literal(args.keyword.strip()).findall(text.response)), args.relation, args.frequency)


@register("keywords:letter_frequency", LetterFrequency)
def letter_frequency(args: LetterFrequency, text: Text) -> bool:
    """The letter (or sign) occurs so often, in either case."""
    return holds(text.response.lower().count(args.letter.lower()), args.let_relation, args.let_frequency)
