"""`length_constraints:*`: words, sentences, paragraphs, and characters for languages without spaces."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from msgspec import Meta

from megarubric.rubrics.checks.counts import Range
from megarubric.rubrics.checks.registry import CheckArgs, Count, Phrase, Text, register
from megarubric.rubrics.checks.text import count_words, sentences


class NumberWords(Range, frozen=True):
    num_words: Count | None = None

    def number(self) -> tuple[str, int | None]:
        return "num_words", self.num_words


class NumberCharacters(Range, frozen=True):
    num_characters: Count | None = None

    def number(self) -> tuple[str, int | None]:
        return "num_characters", self.num_characters


class NumberSentences(Range, frozen=True):
    num_sentences: Count | None = None

    def number(self) -> tuple[str, int | None]:
        return "num_sentences", self.num_sentences


class NumberParagraphs(Range, frozen=True):
    """`num_paragraphs` alone means exactly so many (IFEval)."""

    num_paragraphs: Count | None = None
    separator: Literal["***", "blank line"] = "***"

    def number(self) -> tuple[str, int | None]:
        return "num_paragraphs", self.num_paragraphs

    def problem(self) -> str | None:
        alone = self.relation is None and self.min is None and self.max is None and self.num_paragraphs is not None
        return None if alone else super().problem()

    def admits(self, count: int) -> bool:
        exact = self.relation is None and self.num_paragraphs is not None
        return count == self.num_paragraphs if exact else super().admits(count)


class NthParagraphFirstWord(CheckArgs, frozen=True):
    num_paragraphs: Annotated[int, Meta(ge=1, le=10**9)]
    nth_paragraph: Annotated[int, Meta(ge=1, le=10**9)]
    first_word: Phrase

    def problem(self) -> str | None:
        if self.nth_paragraph > self.num_paragraphs:
            return f"nth_paragraph {self.nth_paragraph} is above num_paragraphs {self.num_paragraphs}"
        return None


@register("length_constraints:number_words", NumberWords)
def number_words(args: NumberWords, text: Text) -> bool:
    """So many runs of word characters."""
    return args.admits(count_words(text.response))


@register("length_constraints:number_characters", NumberCharacters)
def number_characters(args: NumberCharacters, text: Text) -> bool:
    """So many characters, white space not counted. Not in IFEval: the length of Chinese and Japanese text."""
    return args.admits(sum(not c.isspace() for c in text.response))


@register("length_constraints:number_sentences", NumberSentences)
def number_sentences(args: NumberSentences, text: Text) -> bool:
    """So many sentences, by the splitter of `checks.text`."""
    return args.admits(len(sentences(text.response)))


@register("length_constraints:number_paragraphs", NumberParagraphs)
def number_paragraphs(args: NumberParagraphs, text: Text) -> bool:
    """So many paragraphs between `***` dividers; an empty one fails unless it is the first or last. With `separator:
    blank line` (not in IFEval) a paragraph is a block of lines that are not blank."""
    if args.separator == "blank line":
        blocks = re.split(r"\n[^\S\n]*\n", text.response)
        return args.admits(sum(bool(b.strip()) for b in blocks))
    parts = [bool(p.strip()) for p in text.response.split("***")]
    if not all(parts[1:-1]):
        return False
    return args.admits(sum(parts))


@register("length_constraints:nth_paragraph_first_word", NthParagraphFirstWord)
def nth_paragraph_first_word(args: NthParagraphFirstWord, text: Text) -> bool:
    """So many paragraphs between double newlines, and paragraph n (from 1) begins with the word, in any case."""
    paragraphs = text.response.split("\n\n")
    filled = sum(bool(p.strip()) for p in paragraphs)
    if args.nth_paragraph > filled or filled != args.num_paragraphs:
        return False
    words = paragraphs[args.nth_paragraph - 1].split()  # counted with the blank ones, as IFEval does
    if not words:
        return False
    word = re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'), maxsplit=1)[0]
    return word.lower() == args.first_word.lower()
