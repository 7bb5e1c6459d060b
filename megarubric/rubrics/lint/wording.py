"""Words that rules look for, and how alike two texts are."""

from __future__ import annotations

import re

from megarubric.rubrics.checks.phrases import words

# Praise without a measure: two judges mean two things by it.
VAGUE = re.compile(
    r"\b"
    + words(
        "good well_written high_quality great excellent nice appropriate appropriately proper properly adequate",
        "adequately engaging interesting compelling effective effectively professional polished strong creative",
        "creatively impressive insightful thoughtful sophisticated suitable reasonable sufficient sufficiently natural",
        "well_structured well_organi[sz]ed quality meaningful powerful beautiful beautifully elegant",
    )
    + r"\b|恰当|适当|良好|优秀|高质量|有吸引力|合适|出色",
    re.IGNORECASE,
)
# Demands that something be absent, exact or right.
ABSENCE = re.compile(
    r"\b"
    + words(
        r"no not without never none neither nor avoids? avoiding free_of only at_most no_more_than fewer_than",
        r"less_than refrains? omits? leaves_out instead_of rather_than doesn't don't isn't aren't cannot nothing",
        "nobody nowhere stays",
        r"correct correctly accurate accurately exact exactly right true factual wrong incorrect false error errors",
        r"invents? invented contradicts? consistent unsupported between under keeps_to limited absent restraint",
        "resists?",
    )
    + r"\b|不|没有|避免|无|未|仅|只|准确|正确|错误|不超过|少于",
    re.IGNORECASE,
)
_JOINT_VERBS = words(
    "names states explains gives uses avoids keeps stays ends begins opens closes says tells describes mentions shows",
    "lists cites quotes answers asks refuses offers is has does includes contains provides identifies makes takes",
    "follows addresses presents compares defines supports maintains demonstrates acknowledges suggests recommends",
    "writes speaks reads admits invents repeats adds leaves remains covers matches respects warns points considers",
    "evaluates assesses measures does_not never",
)
COMPOUND = re.compile(
    rf"\b(?:and|but|or|nor|while|then)\s+(?:(?:also|then|never|clearly|not)\s+)?{_JOINT_VERBS}\b"
    r"|\band/or\b|\bas well as\b|\bin addition\b|\bwhile also\b|;\s+\w|\bboth\b[^.,;]{1,60}\band\b"
    r"|(?:(?<![\w'-])[\w'-]{1,40}(?: [\w'-]{1,40}){0,2}, ){2,8}(?:and|or) \w|并且|同时|以及|；",
    re.IGNORECASE,
)
# Tier texts that grade a joint demand part by part.
PARTIAL = re.compile(
    r"\b(?:one|two|three|some|part|either|neither|both|half|most|only|all|any|none|partly|each)\b|部分|其中|都|全部|一半|之一",
    re.IGNORECASE,
)
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_]+(?:['’-][^\W_]+)*")
_NEGATIONS = "no not without never none neither nor isn't doesn't don't fails lacks 不 没 无 未"
_STOP_WORDS = """
    the a an of to in and or is are it its that this with for as by on at be from into which who what than then
    does do has have their they he she his her
"""
_NEGATION = frozenset(_NEGATIONS.split())
_STOP = frozenset(_STOP_WORDS.split())


def word_list(text: str) -> list[str]:
    """Lower-case words; every Chinese character is one."""
    return [w.lower() for w in _WORD.findall(text)]


def content(text: str) -> frozenset[str]:
    """The words that carry meaning."""
    return frozenset(w for w in word_list(text) if w not in _STOP)


def alike(a: str, b: str) -> float:
    """Jaccard similarity of the content words, in [0, 1]; 0 when one denies what the other says or their numbers
    differ."""
    x, y = content(a), content(b)
    if not x or not y:
        return 0.0
    differ = x ^ y
    if differ & _NEGATION or any(any(c.isdigit() for c in w) for w in differ):
        return 0.0
    return len(x & y) / len(x | y)
