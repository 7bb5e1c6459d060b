"""`startend:*`, `combination:*`, `punctuation:*`, `change_case:*` and `language:*`: the response as a whole."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from megarubric.rubrics.checks.counts import Relation, holds
from megarubric.rubrics.checks.formats import NoArgs
from megarubric.rubrics.checks.language import LANGUAGES, detect
from megarubric.rubrics.checks.registry import CheckArgs, Count, Phrase, Text, register
from megarubric.rubrics.checks.text import treebank_words


class EndChecker(CheckArgs, frozen=True):
    end_phrase: Phrase


class RepeatPrompt(CheckArgs, frozen=True):
    """Without `prompt_to_repeat` the prompt of the sample is meant."""

    prompt_to_repeat: Phrase | None = None


class CapitalWordFrequency(CheckArgs, frozen=True):
    capital_frequency: Count
    capital_relation: Relation


class ResponseLanguage(CheckArgs, frozen=True):
    language: Annotated[str, Meta(min_length=2)]

    def problem(self) -> str | None:
        if self.language not in LANGUAGES:
            return f"language: {self.language[:20]!r} is not one of {', '.join(sorted(LANGUAGES))}"
        return None


@register("startend:end_checker", EndChecker)
def end_checker(args: EndChecker, text: Text) -> bool:
    """Ends with the phrase, in any case; double quotation marks around the response do not count."""
    return text.response.strip().strip('"').lower().endswith(args.end_phrase.strip().lower())


@register("startend:quotation", NoArgs)
def quotation(args: NoArgs, text: Text) -> bool:
    """The whole response stands in double quotation marks."""
    body = text.response.strip()
    return len(body) > 1 and body[0] == body[-1] == '"'


@register("combination:two_responses", NoArgs)
def two_responses(args: NoArgs, text: Text) -> bool:
    """Exactly two different responses with `******` between them (and perhaps before and after)."""
    parts = [part.strip() for part in text.response.split("******")]
    if not all(parts[1:-1]):
        return False
    filled = [part for part in parts if part]
    return len(filled) == 2 and filled[0] != filled[1]


@register("combination:repeat_prompt", RepeatPrompt)
def repeat_prompt(args: RepeatPrompt, text: Text) -> bool:
    """Begins with the prompt, in any case."""
    prompt = (args.prompt_to_repeat or text.prompt).strip().lower()
    return bool(prompt) and text.response.strip().lower().startswith(prompt)


@register("punctuation:no_comma", NoArgs)
def no_comma(args: NoArgs, text: Text) -> bool:
    """No comma (U+002C)."""
    return "," not in text.response


@register("change_case:capital_word_frequency", CapitalWordFrequency)
def capital_word_frequency(args: CapitalWordFrequency, text: Text) -> bool:
    """So many words in capitals; words are split as in the Penn Treebank ("DON'T" is DO and N'T)."""
    return holds(sum(w.isupper() for w in treebank_words(text.response)), args.capital_relation, args.capital_frequency)


@register("change_case:english_capital", NoArgs)
def english_capital(args: NoArgs, text: Text) -> bool:
    """In capitals throughout, and in English; text whose language cannot be told passes."""
    return text.response.isupper() and detect(text.response) in ("en", None)


@register("change_case:english_lowercase", NoArgs)
def english_lowercase(args: NoArgs, text: Text) -> bool:
    """Without capitals, and in English; text whose language cannot be told passes."""
    return text.response.islower() and detect(text.response) in ("en", None)


@register("language:response_language", ResponseLanguage)
def response_language(args: ResponseLanguage, text: Text) -> bool:
    """In that language by langdetect (seeded); text whose language cannot be told passes. `zh` means either script."""
    found = detect(text.response)
    return found is None or found == args.language or (args.language == "zh" and found.startswith("zh-"))
