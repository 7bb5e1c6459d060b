"""What is seen on the surface of one answer: word runs at its edges and inside, shape, length, hack detectors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from megarubric.rubrics import Check, Rubric
from megarubric.rubrics.checks import KINDS, run_check
from megarubric.rubrics.checks.repetition import repeated_share, runs, tokens
from megarubric.rubrics.checks.text import sentences, undisguised

Kind = Literal["opening", "ending", "phrase", "detector", "format", "repetition", "length"]
DETECTORS = tuple(name for name, kind in KINDS.items() if kind.detector)
WORDED = ("opening", "ending", "phrase")
SHORTEST, LONGEST = 3, 7  # words of a run
_FORMATS = {
    "headings": re.compile(r"^#{1,6} \S", re.MULTILINE),
    "list": re.compile(r"^\s*(?:[-*•]|\d+[.)]) \S", re.MULTILINE),
    "bold": re.compile(r"\*\*[^*\n]+\*\*"),
    "table": re.compile(r"^\|.*\|\s*$", re.MULTILINE),
    "code fence": re.compile(r"^```", re.MULTILINE),
    "exclamations": re.compile(r"![^!]*![^!]*!"),
    "emoji": re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]"),
    "rule": re.compile(r"^(?:-{3,}|\*{3,}|_{3,})\s*$", re.MULTILINE),
}


class Tell(NamedTuple):
    """A surface feature. `what` is a run of words joined by spaces, or the name of a detector, a format, a length."""

    kind: Kind
    what: str

    def __str__(self) -> str:
        return f'{self.kind} "{self.what}"' if self.kind in WORDED else f"{self.kind} {self.what}"


def sentence_tokens(text: str) -> list[list[str]]:
    """The words of each sentence, disguises off; every Chinese or Japanese character is one."""
    return [words for s in sentences(text) if (words := tokens(undisguised(s)))]


def word_tells(prompt: str, response: str) -> set[Tell]:
    """Openings, endings and phrases. Runs of words that the prompt holds are left out: they are its own words."""
    spoken = sentence_tokens(response)
    given = tokens(undisguised(prompt))
    asked = {n: set(runs(given, n)) for n in range(SHORTEST, LONGEST + 1)}
    found = {Tell("phrase", " ".join(run)) for words in spoken for n, run in _runs(words) if run not in asked[n]}
    for kind, words in (("opening", spoken[0]), ("ending", spoken[-1])) if spoken else ():
        for n in range(SHORTEST, min(LONGEST, len(words)) + 1):
            run = tuple(words[:n] if kind == "opening" else words[-n:])
            if run not in asked[n]:
                found.add(Tell("opening" if kind == "opening" else "ending", " ".join(run)))
    return found


def tells_of(prompt: str, response: str, rubric: Rubric | None, length: tuple[int, int]) -> set[Tell]:
    """All tells of an answer. `length` is (short, long): an answer of so many words or fewer is short, of so many or
    more long."""
    found = word_tells(prompt, response)
    found |= {Tell("detector", name) for name in DETECTORS if fires(Check(name), prompt, response, rubric)}
    found |= {Tell("format", name) for name, shape in _FORMATS.items() if shape.search(response)}
    flat = [w for words in sentence_tokens(response) for w in words]
    if repeated_share(flat, 4) > 0.25:
        found.add(Tell("repetition", "a quarter of the words stand in runs that were there before"))
    if len(flat) >= length[1]:
        found.add(Tell("length", f"{length[1]} words or more"))
    elif len(flat) <= length[0]:
        found.add(Tell("length", f"{length[0]} words or fewer"))
    return found


def _runs(words: list[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    for n in range(SHORTEST, LONGEST + 1):
        for run in runs(words, n):
            yield n, run


def fires(check: Check, prompt: str, response: str, rubric: Rubric | None) -> bool:
    """Whether a veto with this check would fall: a detector holds, or another check does not."""
    kind = KINDS[check.kind]
    if kind.needs_rubric and rubric is None:
        return False
    return (run_check(check, prompt, response, rubric) >= 0.5) == kind.detector


def surface_forms(what: str, response: str) -> set[str]:
    """The words of `what` as they stand in a response, in lower case, with the signs between them. What a disguise
    hides (letters of other scripts, markup inside words) is not found: a literal phrase would not match it either."""
    words = what.split(" ")
    shape = "" if _unspaced(words[0]) else r"(?<!\w)"
    for i, word in enumerate(words):
        if i:
            shape += r"[^\w\n]*" if _unspaced(word) or _unspaced(words[i - 1]) else r"[^\w\n]+"
        shape += re.escape(word).replace("'", "['’]")
    shape += "" if _unspaced(words[-1]) else r"(?!\w)"
    return {m[0].lower() for m in re.finditer(shape, response, re.IGNORECASE)}


def _unspaced(word: str) -> bool:
    """A character of a script without spaces, which `tokens` makes a word of its own."""
    return len(word) == 1 and word >= "\u3040"


def without(check: Check, prompt: str, response: str, rubric: Rubric | None) -> str | None:
    """The response without the sentences that make `check` fire: the fewest that are dropped one at a time, each the
    one after which it fires no more, or else the first that fires by itself. None when nothing is left, or when it
    fires whatever single sentences go."""
    text = response
    while fires(check, prompt, text, rubric):
        parts = sentences(text)
        if len(parts) < 2:
            return None
        shorter = [" ".join(parts[:i] + parts[i + 1 :]) for i in range(len(parts))]
        silent = [s for s in shorter if not fires(check, prompt, s, rubric)]
        if silent:
            return silent[0]
        alone = [i for i, part in enumerate(parts) if fires(check, prompt, part, rubric)]
        if not alone:
            return None
        text = shorter[alone[0]]
    return text
