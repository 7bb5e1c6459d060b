"""Reading a model's drafts: the agreed form becomes criteria, everything else one sentence, and nothing a traceback."""

from __future__ import annotations

import json
import string
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarubric.rubrics import parse_rubric, to_dict
from megarubric.rubrics.schema import FAMILIES, Criterion, Rubric
from megarubric.rubrics.synthesis.atomise import compound, parse_split, split_by_rule
from megarubric.rubrics.synthesis.draft import MAX_CRITERIA, MAX_REPLY, parse_draft, read_criterion, read_object
from megarubric.rubrics.synthesis.model import BadDraft, Draft
from megarubric.rubrics.synthesis.schema import DRAFT_SCHEMA, SPLIT_SCHEMA

TIERS = [{"value": 0, "text": "Nothing of it."}, {"value": 1, "text": "Said in so many words."}]
CRITERION: dict[str, Any] = {
    "description": "Says that the ferry leaves at noon.",
    "weight": 2,
    "tiers": TIERS,
    "check": None,
    "veto": False,
    "needs_reference": False,
}
DRAFT: dict[str, Any] = {"title": "Late ferry", "family": "instruction", "criteria": [CRITERION]}


def draft(**changes: Any) -> str:
    return json.dumps(DRAFT | changes)


def criterion(**changes: Any) -> dict[str, Any]:
    return {k: v for k, v in (CRITERION | changes).items() if v is not ...}


def test_a_draft_in_the_agreed_form() -> None:
    found, notes = parse_draft(draft())
    assert (found.title, found.family, notes) == ("Late ferry", "instruction", [])
    (c,) = found.criteria
    assert (c.id, c.weight, c.tier_values, c.veto) == ("says-that-the-ferry-leaves-at", 2.0, (0.0, 1.0), None)


@pytest.mark.parametrize(
    "text",
    [
        "```json\n" + draft() + "\n```",
        "```\n" + draft() + "\n```",
        "<think>First {a rubric}.</think>\n" + draft(),
        "\n  " + draft() + "  \n",
    ],
)
def test_wrappings_that_mean_nothing(text: str) -> None:
    assert parse_draft(text)[0] == parse_draft(draft())[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the reply is empty"),
        ("<think>Let me see", "reasoning that never ends"),
        ("I cannot do that.", "no JSON object"),
        ("Here it is: " + draft(), "text before the JSON object"),
        (draft() + "\nI hope this helps!", "text behind the JSON object"),
        (draft()[:-20], "not JSON: "),
        (draft() + draft(), "text behind the JSON object"),
        ("[" + draft() + "]", "text before the JSON object"),
        ('{"criteria": NaN}', "not JSON: NaN"),
        ('{"criteria": [], "criteria": []}', "the key 'criteria' appears twice"),
        ('{"criteria": ' + "[" * 100_000, "not JSON: "),
        ('{"criteria": ' + "9" * 10_000 + "}", "not JSON: "),
        ("{" + " " * MAX_REPLY + "}", "more than 200000"),
        ("{}", "criteria: missing"),
        (draft(criteria={}), "must be a list, not a mapping"),
        (draft(criteria=[]), "no criteria"),
        (draft(title="\ud800"), "cannot be written as JSON"),
        (draft(rubric=1), "unknown key 'rubric'"),
        (draft(title=7), "title must be text"),
        (draft(family="poetry"), "is not one of instruction"),
        (draft(criteria=[{}] * 10_000), "10000 criteria, at most 40"),
        (draft(criteria=["Be good."]), "criterion 1: a criterion is an object, not text"),
    ],
)
def test_a_reply_that_is_no_draft_is_one_sentence(text: str, reason: str) -> None:
    with pytest.raises(BadDraft, match="") as caught:
        parse_draft(text)
    assert reason in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tiers": [TIERS[1], TIERS[0]]}, "tier values must increase strictly"),
        ({"tiers": [TIERS[0], TIERS[0]]}, "tier values must increase strictly"),
        ({"tiers": TIERS[:1]}, "at least two tiers"),
        ({"tiers": ["low", "high"]}, "tiers"),
        ({"weight": "high"}, "weight: must be a number, not text"),
        ({"weight": 1e999}, "not JSON"),
        ({"weight": 10**400}, "weight"),
        ({"weight": 0}, "weight 0 without a veto"),
        ({"description": "  "}, "no description"),
        ({"description": ...}, "no description"),
        ({"description": "x" * 1001}, "a text of 1001 characters"),
        ({"veto": "yes"}, "veto must be true or false"),
        ({"veto": {"threshold": 2}}, "veto.threshold"),
        ({"score": 5}, "unknown key 'score'"),
        ({"check": {"kind": "shell:rm"}, "tiers": None}, "unknown check kind"),
        ({"check": {"kind": "length_constraints:number_words"}, "tiers": None}, "length_constraints:number_words"),
        ({"check": {"kind": "detectable_format:json_format"}}, "tiers or a check, not both"),
    ],
)
def test_a_bad_criterion_costs_itself_only(changes: dict[str, Any], reason: str) -> None:
    text = draft(criteria=[criterion(**changes), CRITERION])
    if reason == "not JSON":  # json.dumps writes Infinity
        with pytest.raises(BadDraft, match="Infinity"):
            parse_draft(text)
        return
    found, notes = parse_draft(text)
    assert len(found.criteria) == 1
    (note,) = notes
    assert note.action == "dropped" and note.reason.startswith("criterion 1: ") and reason in note.reason


def test_a_veto_is_set_to_fire_on_the_worst_tier_only() -> None:
    three = [{"value": v, "text": f"Tier {v} of it."} for v in (0, 1, 4)]
    positive = read_criterion(criterion(tiers=three, veto=True))
    negative = read_criterion(criterion(tiers=three, veto=True, weight=-1))
    assert positive.veto is not None and positive.veto.threshold == 0.125  # between 0 and 1/4
    assert negative.veto is not None and negative.veto.threshold == 0.625  # between 1/4 and 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = ("title", "family", "criteria", "description", "weight", "tiers", "value", "text", "check", "kind", "veto", "id")


@st.composite
def mangled(draw: st.DrawFn) -> str:
    """A good draft with values swapped, keys renamed, or characters cut out."""
    tree = json.loads(draft(criteria=[CRITERION, criterion(tiers=None), criterion(veto=True)]))  # a copy
    for _ in range(draw(st.integers(0, 3))):
        spot: Any = tree
        while isinstance(spot, dict | list) and spot:
            key = draw(st.sampled_from(sorted(spot) if isinstance(spot, dict) else range(len(spot))))
            if draw(st.booleans()) or not isinstance(spot[key], dict | list):
                value = draw(
                    JSON | st.sampled_from([10**400, -1, 0, "", 1e308]) | st.builds(lambda: deepcopy(CRITERION))
                )
                if isinstance(spot, dict) and draw(st.booleans()):
                    spot[draw(st.sampled_from(KEYS) | st.text(max_size=5))] = value
                else:
                    spot[key] = value
                break
            spot = spot[key]
    text = json.dumps(tree)
    start, length = draw(st.integers(0, len(text))), draw(st.sampled_from([0, 0, 0, 1, 5, 40]))
    return text[:start] + draw(st.sampled_from(["", "", "{", '"', "\x00", "\ud800", "```"])) + text[start + length :]


@given(st.text() | st.text(alphabet=string.punctuation + "01a ", max_size=60) | mangled())
def test_any_reply_is_a_draft_of_valid_criteria_or_a_reason(text: str) -> None:
    try:
        found, _ = parse_draft(text)
    except BadDraft as error:
        assert str(error) and "\n" not in str(error)
        return
    assert isinstance(found, Draft) and 1 <= len(found.criteria) <= MAX_CRITERIA
    assert len({c.id for c in found.criteria}) == len(found.criteria)
    rubric = Rubric(id="r", title=found.title, family=found.family, criteria=found.criteria)
    assert parse_rubric(to_dict(rubric), "test").criteria == found.criteria


@given(mangled(), st.integers(1, 3))
def test_any_reply_is_parts_or_a_reason(text: str, n: int) -> None:
    asked = [Criterion(id=f"c{i}", description="Names it and says why.") for i in range(n)]
    try:
        parts = parse_split(text.replace("criteria", "parts"), asked)
    except BadDraft:
        return
    assert all(0 <= at < n and len(split) >= 2 for at, split in parts.items())


# --- splitting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Names the ferry and explains why it is late.", ("Names the ferry.", "Explains why it is late.")),
        (
            "The answer names the ferry and gives its hour.",
            ("The answer names the ferry.", "The answer gives its hour."),
        ),
        ("Names the ferry, and says when it leaves", ("Names the ferry.", "Says when it leaves.")),
    ],
)
def test_joint_demands_are_split_by_rule(text: str, parts: tuple[str, ...]) -> None:
    whole = Criterion(id="c", description=text, weight=-3.0)
    assert compound(whole)
    split = split_by_rule(whole)
    assert split is not None and tuple(p.description for p in split) == parts
    assert [p.weight for p in split] == [-1.5, -1.5] and not any(compound(p) for p in split)


@pytest.mark.parametrize(
    "text",
    [
        "Names either the ferry or explains the delay.",
        "Names the ferry; explains the delay.",
        "Names it and gives fog, ice, and snow as causes.",  # the second part is compound again
        "Calm and avoids praise of the reader.",  # "Calm" is no sentence
    ],
)
def test_what_a_rule_would_garble_is_left_to_the_model(text: str) -> None:
    assert split_by_rule(Criterion(id="c", description=text)) is None


def test_a_veto_or_graded_tiers_belong_to_the_whole() -> None:
    text = "Names the ferry and explains why it is late."
    three = read_criterion({"description": text, "tiers": [{"value": v, "text": f"t{v}"} for v in (0, 1, 2)]})
    gate = read_criterion({"description": text, "veto": True})
    assert split_by_rule(three) is None and split_by_rule(gate) is None


def test_parts_written_by_a_model() -> None:
    asked = [Criterion(id=f"c{i}", description="Names it and says why.", weight=3.0) for i in range(3)]
    parts = [
        {"of": 1, "description": "Names it.", "tiers": TIERS},
        {"of": 1, "description": "Says why.", "tiers": TIERS},
        {"of": 2, "description": "Names it and says why.", "tiers": TIERS},  # compound still
        {"of": 2, "description": "Says why.", "tiers": TIERS},
        {"of": 3, "description": "Names it.", "tiers": TIERS},  # alone
    ]
    split = parse_split(json.dumps({"parts": parts}), asked)
    assert list(split) == [0] and [(p.description, p.weight) for p in split[0]] == [
        ("Names it.", 1.5),
        ("Says why.", 1.5),
    ]
    for bad in ({"of": 4, "description": "x"}, {"of": True, "description": "x"}, {"description": "x"}, 7):
        with pytest.raises(BadDraft):
            parse_split(json.dumps({"parts": [bad]}), asked)


# --- structured output -----------------------------------------------------------------------------------------------


def objects(schema: Any) -> list[dict[str, Any]]:
    if isinstance(schema, list):
        return [o for s in schema for o in objects(s)]
    if not isinstance(schema, dict):
        return []
    own = [schema] if schema.get("type") == "object" else []
    return own + [o for s in schema.values() for o in objects(s)]


def test_schemas_are_strict_and_ask_for_what_the_parser_reads() -> None:
    for schema in (DRAFT_SCHEMA, SPLIT_SCHEMA):
        for o in objects(schema):
            assert o["required"] == list(o["properties"]) and o["additionalProperties"] is False
    assert DRAFT_SCHEMA["properties"]["family"]["enum"] == list(FAMILIES)
    kinds = DRAFT_SCHEMA["properties"]["criteria"]["items"]["properties"]["check"]["anyOf"][1:]
    sample = {"string": "at most", "integer": 3, "array": ["fog"]}
    for kind in kinds:  # a check that follows the schema is one that the rubric format has
        check = {k: (v["enum"][0] if "enum" in v else sample[v["type"]]) for k, v in kind["properties"].items()}
        assert read_criterion(criterion(tiers=None, check=check)).check is not None
    assert read_object("{}") == {}
