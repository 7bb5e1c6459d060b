"""The 25 IFEval kinds: true and false examples each, arguments that are refused, and laws that hold for any text."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarubric.errors import BadInput
from megarubric.rubrics import Check
from megarubric.rubrics.checks import KINDS, parse_check, run_check
from megarubric.rubrics.checks.text import sentences, treebank_words

PROMPT = "Tell me about the ferry."
ENGLISH = "the ferry leaves the harbour at nine in the morning and comes back when the wind allows it"

# kind, arguments, responses that follow, responses that do not
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    (
        "keywords:existence",
        {"keywords": ["ferry", "late"]},
        ["The ferry is late.", "FERRY LATE", "Ferryman came later."],
        ["The ferry is here.", "late", "f-erry late"],
    ),
    ("keywords:existence", {"keywords": ["C++"]}, ["I write C++ code."], ["I write C code.", "CCC"]),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["late", "very"]},
        ["The ferry is here.", "The translated text.", "later"],
        ["It is late.", "VERY good", "(late)", "it's late's fault"],
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["渡轮"]}, ["船晚点了。"], ["我等渡轮很久。"]),
    (
        "keywords:frequency",
        {"keyword": "ferry", "frequency": 2, "relation": "at least"},
        ["ferry Ferry", "ferryferry", "A ferry, a ferry, a ferry."],
        ["ferry", "boat"],
    ),
    (
        "keywords:frequency",
        {"keyword": " ferry ", "frequency": 2, "relation": "less than"},
        ["ferry", "boat"],
        ["ferry ferry"],
    ),
    ("keywords:frequency", {"keyword": "a", "frequency": 1, "relation": "exactly"}, ["a"], ["aa", "b"]),
    ("keywords:frequency", {"keyword": "a", "frequency": 1, "relation": "at most"}, ["a", "b"], ["aa"]),
    (
        "keywords:letter_frequency",
        {"letter": "Z", "let_frequency": 2, "let_relation": "at least"},
        ["zZ", "buzz"],
        ["z", "none"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "#", "let_frequency": 1, "let_relation": "less than"},
        ["none"],
        ["# heading"],
    ),
    (
        "language:response_language",
        {"language": "en"},
        [ENGLISH, "123 456"],
        ["Die Fähre fährt um neun Uhr morgens ab."],
    ),
    ("language:response_language", {"language": "de"}, ["Die Fähre fährt um neun Uhr morgens ab."], [ENGLISH]),
    ("language:response_language", {"language": "zh"}, ["渡轮九点钟离开港口，风停了才会回来。"], [ENGLISH]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        ["One. Two! Three?", "A. b. c? D! Four."],
        ["One. Two.", "Dr. Rosa came at 3.5 a.m. in the rain."],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        ["One. Two.", "no mark at all"],
        ["One. Two! Three?", "一。二！三？"],
    ),
    (
        "length_constraints:number_sentences",
        {"min": 2, "max": 3},
        ["One. Two.", "A b. C d. E f."],
        ["One.", "A. b. c. d. e."],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["one\n***\ntwo", "***\none\n***\ntwo\n***", "one *** two"],
        ["one", "one\n\ntwo", "one\n***\n***\ntwo", "a\n***\nb\n***\nc"],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2, "separator": "blank line"},
        ["one\n\ntwo", "one\n \n\n\ntwo\n"],
        ["one\ntwo", "one\n***\ntwo"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 4, "relation": "at least"},
        ["one two three four", "it's me you"],
        ["one two three", "..."],
    ),
    ("length_constraints:number_words", {"num_words": 4, "relation": "less than"}, ["one two three"], ["a b c d"]),
    (
        "length_constraints:number_words",
        {"relation": "between", "min": 2, "max": 3},
        ["one two", "one two three"],
        ["one", "one two three four"],
    ),
    ("length_constraints:number_words", {"max": 2}, ["one", "one two"], ["one two three"]),
    ("length_constraints:number_words", {"num_words": 2, "relation": "exactly"}, ["one two"], ["one", "a b c"]),
    ("length_constraints:number_words", {"num_words": 2, "relation": "at most"}, ["one two"], ["a b c"]),
    ("length_constraints:number_characters", {"min": 3, "max": 4}, ["渡轮 晚", "abcd"], ["渡轮", "渡轮晚点了"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Ferry"},
        ["one\n\nferry two", "one\n\n'Ferry', two", 'one\n\n"ferry." two'],
        ["one\n\nThe ferry", "ferry", "one\n\nferry\n\nthree", "one\n\n\n\nferry two", "one\nferry"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[name] [address]", "[a][b][c]", "[]\n[x]"],
        ["[name]", "[a\nb] [c]", "name"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Done.\nP.S. One more.", "p.s. x", "P. S. x", "inline P.S. x"],
        ["PS: x", "P.S x", "none"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S. x", "p. p. s x"], ["P.S. x"]),
    ("detectable_content:postscript", {"postscript_marker": "PS:"}, ["ps: x"], ["P.S. x", "ps x"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "- a\n- b", "text\n  * a\n  - b", "*a\n-b"],
        ["* a", "* a\n* b\n* c", "** a **\n* b", "1. a\n2. b"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "I think. My answer is maybe."],
        ["my answer is yes.", "My answer is yes", "Yes."],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b*", "**a** and *b*", "**bold**\n*x*"],
        ["*a*", "* a\n* b", "** ** and * *", "*a\nb* *c*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb", "SECTION1 SECTION2 SECTION3"],
        ["SECTION 1", "Section 1 Section 2", "SECTION one SECTION two"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": 1}', '```json\n{"a": 1}\n```', "```\n[1, 2]\n```", "3", '```JSON {"a": null}```'],
        ["{a: 1}", 'Here: {"a": 1}', "[" * 5000, '{"a": 1} end'],
    ),
    (
        "detectable_format:title",
        {},
        ["<<The Ferry>>\ntext", "text <<a>> text", "<<< a >>>"],
        ["<<>>", "<< >>", "<The Ferry>", "<<a\nb>>"],
    ),
    (
        "combination:two_responses",
        {},
        ["one\n******\ntwo", "******one******two******"],
        ["one", "one******one", "one******two******three", "one************two"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Tell me about the ferry."},
        ["Tell me about the ferry. It is late.", "  tell me ABOUT the ferry.\n\nLate."],
        ["It is late.", "Sure. Tell me about the ferry. Late."],
    ),
    ("combination:repeat_prompt", {}, ["Tell me about the ferry. It is late."], ["It is late."]),
    (
        "startend:end_checker",
        {"end_phrase": "Any other questions?"},
        ["Late. Any other questions?", '"Late. any other questions?"', "x ANY OTHER QUESTIONS?\n"],
        ["Any other questions? No.", "Late."],
    ),
    ("startend:quotation", {}, ['"The ferry is late."', ' "" ', '"a" and "b"'], ['"', "'late'", "“late”", '"late".']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["I saw NASA.", "DON'T", "A,B", "HE--SHE", "YES!NO"],
        ["NASA", "STATE-OF-THE-ART", "Nasa Esa", "A/B"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        ["NASA came", "none"],
        ["I saw NASA."],
    ),
    ("change_case:english_capital", {}, [ENGLISH.upper()], [ENGLISH, "DIE FÄHRE FÄHRT UM NEUN UHR MORGENS AB", "123"]),
    (
        "change_case:english_lowercase",
        {},
        [ENGLISH],
        [ENGLISH.upper(), "die fähre fährt um neun uhr morgens ab", "123"],
    ),
    ("punctuation:no_comma", {}, ["No comma here. None; none: none"], ["One, two", ","]),
]

IFEVAL = [
    "keywords:existence", "keywords:frequency", "keywords:forbidden_words", "keywords:letter_frequency",
    "language:response_language", "length_constraints:number_sentences", "length_constraints:number_paragraphs",
    "length_constraints:number_words", "length_constraints:nth_paragraph_first_word",
    "detectable_content:number_placeholders", "detectable_content:postscript",
    "detectable_format:number_bullet_lists", "detectable_format:constrained_response",
    "detectable_format:number_highlighted_sections", "detectable_format:multiple_sections",
    "detectable_format:json_format", "detectable_format:title", "combination:two_responses",
    "combination:repeat_prompt", "startend:end_checker", "change_case:capital_word_frequency",
    "change_case:english_capital", "change_case:english_lowercase", "punctuation:no_comma", "startend:quotation",
]  # fmt: skip


def value(kind: str, args: dict[str, Any], response: str) -> float:
    return run_check(parse_check(kind, args), PROMPT, response)


def test_all_25_kinds_exist_and_are_covered_here() -> None:
    assert len(set(IFEVAL)) == 25
    assert set(IFEVAL) <= set(KINDS)
    assert set(IFEVAL) <= {kind for kind, *_ in CASES}


@pytest.mark.parametrize(("kind", "args", "good", "bad"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_examples(kind: str, args: dict[str, Any], good: list[str], bad: list[str]) -> None:
    for response in good:
        assert value(kind, args, response) == 1.0, response
    for response in bad:
        assert value(kind, args, response) == 0.0, response


@pytest.mark.parametrize(("kind", "args"), [(kind, args) for kind, args, *_ in CASES])
def test_a_blank_response_follows_nothing(kind: str, args: dict[str, Any]) -> None:
    assert value(kind, args, " \n ") == 0.0


@pytest.mark.parametrize(
    ("kind", "args", "says"),
    [
        ("keywords:exist", {}, "did you mean keywords:existence"),
        ("keywords:existence", {}, "keywords is missing"),
        ("keywords:existence", {"keywords": []}, "keywords"),
        ("keywords:existence", {"keywords": ["a", " "]}, "blank"),
        ("keywords:existence", {"keywords": "ferry"}, "keywords"),
        ("keywords:existence", {"keywords": ["a"], "words": 1}, "unknown argument 'words'; it takes keywords"),
        ("keywords:frequency", {"keyword": "a", "frequency": -1, "relation": "at least"}, "frequency"),
        ("keywords:frequency", {"keyword": "a", "frequency": True, "relation": "at least"}, "frequency"),
        ("keywords:frequency", {"keyword": "a", "frequency": 1, "relation": "more"}, "at least, at most"),
        ("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1, "let_relation": "at least"}, "letter"),
        ("language:response_language", {"language": "klingon"}, "not one of"),
        ("length_constraints:number_words", {}, "num_words is missing"),
        ("length_constraints:number_words", {"num_words": 3}, "relation is missing"),
        ("length_constraints:number_words", {"relation": "between"}, "min, max or both"),
        ("length_constraints:number_words", {"relation": "between", "min": 5, "max": 3}, "above"),
        ("length_constraints:number_words", {"relation": "between", "min": 5, "num_words": 3}, "range has min and max"),
        ("length_constraints:number_words", {"relation": "at least", "min": 5}, "between"),
        ("length_constraints:number_words", {"num_words": "80", "relation": "at least"}, "num_words"),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 1, "nth_paragraph": 2, "first_word": "a"},
            "above",
        ),
        ("punctuation:no_comma", {"x": 1}, "it takes no arguments"),
        ("hack:repetition", {"share": 1.5}, "share"),
        ("detectable_format:number_bullet_lists", {"num_bullets": 10**40}, "num_bullets"),
    ],
)
def test_unfit_arguments_are_refused_in_one_sentence(kind: str, args: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        parse_check(kind, args)
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match=re.escape(kind)):
        run_check(Check(kind, args), PROMPT, "text")


def test_sentences() -> None:
    assert sentences('Dr. Rosa came. She left at 9 a.m. on Monday, e.g. by ferry! Did she? "Yes." He said no. End') == [
        "Dr. Rosa came.", "She left at 9 a.m. on Monday, e.g. by ferry!", "Did she?", '"Yes."', "He said no.", "End",
    ]  # fmt: skip
    assert sentences("It cost 3.50 euros. Wait... what? See example.com. J. Austen wrote it.") == [
        "It cost 3.50 euros.", "Wait... what?", "See example.com.", "J. Austen wrote it.",
    ]  # fmt: skip
    assert sentences("渡轮晚点了。我等了两小时！你呢？“很好。”完") == [
        "渡轮晚点了。",
        "我等了两小时！",
        "你呢？",
        "“很好。”",
        "完",
    ]
    assert sentences("  \n ") == []


def test_treebank_words() -> None:
    assert treebank_words("I CANNOT, DON'T; it's A/B (U.S.) 3,000 GONNA") == [
        "I", "CAN", "NOT", ",", "DO", "N'T", ";", "it", "'s", "A/B", "(", "U.S", ".", ")", "3,000", "GON", "NA",
    ]  # fmt: skip


TEXT = st.text(alphabet=st.characters(codec="utf-8"), max_size=400) | st.text(
    alphabet="ab *-[]<>\n.,!?\"'#`P1", max_size=200
)


@given(TEXT, st.integers(0, 30))
def test_at_least_and_less_than_are_opposites(text: str, n: int) -> None:
    if not text.strip():
        return
    for kind, name in (
        ("length_constraints:number_words", "num_words"),
        ("length_constraints:number_sentences", "num_sentences"),
        ("length_constraints:number_characters", "num_characters"),
    ):
        assert value(kind, {name: n, "relation": "at least"}, text) != value(
            kind, {name: n, "relation": "less than"}, text
        )


@given(TEXT)
def test_no_text_is_too_strange(text: str) -> None:
    """Every kind gives 0 or 1 on any text, the same again the second time."""
    for kind, args, *_ in CASES:
        if not kind.startswith(("language", "change_case:english")):
            first = value(kind, args, text)
            assert first in (0.0, 1.0)
            assert value(kind, args, text) == first
    for kind in ("hack:flattery_opening", "hack:self_praise", "hack:judge_address", "hack:repetition"):
        assert value(kind, {}, text) in (0.0, 1.0)


@given(TEXT)
def test_sentences_lose_no_character(text: str) -> None:
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_what_json_writes_is_json(data: Any) -> None:
    assert value("detectable_format:json_format", {}, json.dumps(data)) == 1.0
    assert value("detectable_format:json_format", {}, f"```json\n{json.dumps(data)}\n```") == 1.0


@pytest.mark.parametrize(
    "piece", ["\n", " ", "[", "<<", "*", "- ", "a ", "!", "***", '"', "Great question, ", "\u200b", "中", "this is "]
)
def test_long_monotonous_text_is_read_in_linear_time(piece: str) -> None:
    """30,000 characters: a pattern that backtracks takes minutes on one of these, far beyond the test's time limit."""
    text = "x" + piece * (30_000 // len(piece)) + "x"
    for kind, args, *_ in CASES:
        if not kind.startswith(("language", "change_case:english")):
            assert value(kind, args, text) in (0.0, 1.0)
    for kind in ("hack:flattery_opening", "hack:self_praise", "hack:judge_address", "hack:repetition"):
        assert value(kind, {}, text) in (0.0, 1.0)
