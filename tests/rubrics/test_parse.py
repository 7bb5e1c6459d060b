"""What a rubric may be, what it may not, and what the one line says."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import msgspec
import pytest

from megarubric.errors import BadInput
from megarubric.rubrics import Check, Rubric, Tier, Veto, dumps, parse_rubric, to_dict

FULL: dict[str, Any] = {
    "id": "story.plain-narrative",
    "version": 3,
    "title": "Plain narrative voice",
    "scope": "task",
    "family": "creative",
    "provenance": {"author": "human", "source": "megarubric", "licence": "Apache-2.0"},
    "tags": ["story", "voice"],
    "prompt": None,
    "reference": None,
    "criteria": [
        {
            "id": "calm",
            "description": "States what happened, without consoling.",
            "weight": 1.0,
            "tiers": [
                {"value": 0, "text": "Consoles."},
                {"value": 1, "text": "One lapse."},
                {"value": 2.5, "text": "Plain throughout."},
            ],
            "needs_reference": False,
        },
        {
            "id": "length",
            "description": "Between 80 and 160 words.",
            "weight": 0.5,
            "check": {"kind": "length_constraints:number_words", "relation": "between", "min": 80, "max": 160},
        },
        {
            "id": "no-flattery",
            "description": "Opens by praising the question.",
            "weight": 0,
            "tiers": [{"value": 0, "text": "no"}, {"value": 1, "text": "yes"}],
            "veto": {"threshold": 0.5, "detector": True},
            "saturation": {"theta": 0.7, "beta": 3.0},
        },
    ],
    "pairs": [{"a": "calm", "b": "length", "weight": 0.2, "kind": "min"}],
    "shaping": {"kappa": 0.6, "alpha": 1.0, "power": 2.0},
    "veto_reward": 0.0,
    "on_missing_veto": "unscored",
}
SMALL: dict[str, Any] = {"id": "r", "criteria": [{"id": "c", "description": "Says so."}]}


def changed(path: str, value: Any, base: dict[str, Any] = FULL) -> dict[str, Any]:
    """A copy of `base` with the value at a dotted path set; `...` takes the key out."""
    tree = copy.deepcopy(base)
    node: Any = tree
    *front, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    for part in front:
        node = node[part]
    if value is ...:
        del node[last]
    elif isinstance(node, list) and last == len(node):
        node.append(value)
    else:
        node[last] = value
    return tree


def test_every_field_is_read() -> None:
    rubric = parse_rubric(FULL, "f")
    assert (rubric.id, rubric.version, rubric.scope, rubric.family) == ("story.plain-narrative", 3, "task", "creative")
    assert rubric.tags == ("story", "voice")
    assert rubric.provenance is not None and rubric.provenance.licence == "Apache-2.0"
    calm, length, flattery = rubric.criteria
    assert calm.tiers is not None and calm.tiers[2] == Tier(2.5, "Plain throughout.")
    assert calm.tier_values == (0.0, 1.0, 2.5)
    assert length.check == Check("length_constraints:number_words", {"relation": "between", "min": 80, "max": 160})
    assert length.tier_values == (0.0, 1.0)
    assert flattery.veto == Veto(0.5, True) and flattery.saturation is not None and flattery.saturation.beta == 3.0
    assert (rubric.pairs[0].a, rubric.pairs[0].b, rubric.pairs[0].weight, rubric.pairs[0].kind) == (
        "calm",
        "length",
        0.2,
        "min",
    )
    assert rubric.shaping is not None and rubric.shaping.power == 2.0
    assert rubric.criterion("length") is length


def test_defaults() -> None:
    rubric = parse_rubric(SMALL, "f")
    criterion = rubric.criteria[0]
    assert criterion.tier_values == (0.0, 1.0)
    assert (criterion.weight, criterion.tiers, criterion.check, criterion.veto) == (1.0, None, None, None)
    assert (rubric.pairs, rubric.shaping, rubric.veto_reward, rubric.on_missing_veto) == ((), None, 0.0, "unscored")
    assert parse_rubric(changed("criteria.0.veto", {}, SMALL), "f").criteria[0].veto == Veto(0.5, False)
    assert rubric.scope == "task"
    assert parse_rubric({**SMALL, "prompt": "Tell me."}, "f").scope == "instance"


def test_round_trip() -> None:
    for tree in (FULL, SMALL, {**SMALL, "prompt": "渡轮 \U0001f6f3", "tags": None, "pairs": None}):
        rubric = parse_rubric(tree, "f")
        for defaults in (False, True):
            assert parse_rubric(to_dict(rubric, defaults=defaults), "f") == rubric
            assert parse_rubric(json.loads(dumps(rubric, defaults=defaults)), "f") == rubric


def test_parsing_leaves_its_input_alone() -> None:
    tree = copy.deepcopy(FULL)
    parse_rubric(tree, "f")
    assert tree == FULL


def test_rubrics_are_frozen() -> None:
    with pytest.raises(AttributeError):
        parse_rubric(SMALL, "f").id = "x"  # type: ignore[misc]


def test_hash_is_of_the_meaning() -> None:
    rubric = parse_rubric(FULL, "f")
    assert len(rubric.hash) == 64 and int(rubric.hash, 16) >= 0
    shuffled = {key: FULL[key] for key in reversed(FULL)}
    assert parse_rubric(shuffled, "f").hash == rubric.hash
    assert parse_rubric(to_dict(rubric, defaults=True), "f").hash == rubric.hash
    assert parse_rubric(changed("criteria.0.weight", 1), "f").hash == rubric.hash
    assert parse_rubric(changed("criteria.0.weight", ...), "f").hash == rubric.hash  # 1.0 is the default
    hashes = {
        parse_rubric(changed(path, value), "f").hash
        for path, value in [
            ("title", "x"), ("version", 4), ("criteria.0.weight", 1.5), ("criteria.0.tiers.2.text", "x"),
            ("criteria.1.check.max", 161), ("pairs.0.kind", "gap"), ("shaping", None), ("veto_reward", -1.0),
            ("reference", "x"), ("tags", ["voice", "story"]),
        ]
    }  # fmt: skip
    assert len(hashes) == 10 and rubric.hash not in hashes


def test_hash_is_stable() -> None:
    """The canonical form is a contract of caches and checkpoints: a change of it must be seen."""
    assert parse_rubric(SMALL, "f").hash == "72d79707758689f6d6fcb23be00641bddf8c38d4a714556c7d086c2f440e1f40"


REFUSED = [
    # what is changed, to what, words of the line
    ("id", ..., ["id", "missing"]),
    ("id", "Story", ["id", "a-z"]),
    ("id", "a b", ["id"]),
    ("id", "", ["id"]),
    ("id", "a\n", ["id"]),
    ("id", 7, ["id", "text"]),
    ("version", "1", ["version"]),
    ("version", 1.5, ["version"]),
    ("version", True, ["version"]),
    ("version", -1, ["version"]),
    ("version", 10**30, ["version"]),
    ("scope", "global", ["scope", "dataset, instance, task"]),
    ("family", "poetry", ["family", "creative"]),
    ("provenance.author", "robot", ["provenance.author", "human"]),
    ("provenance.author", "llm", ["provenance.model", "llm", "missing"]),
    ("provenance.author", "hybrid", ["provenance.model", "hybrid"]),
    ("provenance.author", ..., ["provenance.author", "missing"]),
    ("provenance.license", "MIT", ["license", "unknown key", "licence"]),
    ("tags", "story", ["tags", "list"]),
    ("tags", [1], ["tags"]),
    ("criteria", ..., ["criteria", "missing"]),
    ("criteria", [], ["criteria"]),
    ("criteria", {}, ["criteria", "list"]),
    ("criteria.0", "calm", ["criteria[0]"]),
    ("criteria.0.id", ..., ["criteria[0]", "id", "missing"]),
    ("criteria.0.id", "a b", ["criterion a b", "not an id"]),
    ("criteria.0.id", "length", ["length", "twice"]),
    ("criteria.0.weigth", 1, ["criterion calm", "weigth", "unknown key", "did you mean weight"]),
    ("criteria.0.weight", "1", ["criterion calm", "weight", "number"]),
    ("criteria.0.weight", True, ["criterion calm", "weight"]),
    ("criteria.0.weight", None, ["criterion calm", "weight"]),
    ("criteria.0.weight", math.nan, ["criterion calm", "weight", "finite"]),
    ("criteria.0.weight", math.inf, ["criterion calm", "weight", "finite"]),
    ("criteria.0.weight", 10**400, ["criterion calm", "weight"]),
    ("criteria.0.id", "a*b", ["criterion a*b", "not an id"]),
    ("criteria.0.description", 3, ["criterion calm", "description", "text"]),
    ("criteria.0.description", "\ud800", ["story.plain-narrative", "UTF-8"]),
    ("criteria.0.tiers", [{"value": 0, "text": "only"}], ["criterion calm", "tiers", "two"]),
    ("criteria.0.tiers", [], ["criterion calm", "tiers", "two"]),
    ("criteria.0.tiers.1.value", 0, ["criterion calm", "tiers[1].value", "increase"]),
    ("criteria.0.tiers.2.value", -1, ["criterion calm", "tiers[2].value", "increase"]),
    ("criteria.0.tiers.2.value", math.inf, ["criterion calm", "finite"]),
    ("criteria.0.tiers.0.value", "low", ["criterion calm", "tiers[0].value"]),
    ("criteria.0.tiers.0.value", ..., ["criterion calm", "tiers[0].value", "missing"]),
    ("criteria.0.tiers.0.txt", "x", ["criterion calm", "tiers[0].txt", "text"]),
    ("criteria.0.check", {"kind": "punctuation:no_comma"}, ["criterion calm", "not both"]),
    ("criteria.0.needs_reference", "yes", ["criterion calm", "needs_reference", "true or false"]),
    ("criteria.1.check", "punctuation:no_comma", ["criterion length", "check", "mapping"]),
    ("criteria.1.check.kind", ..., ["criterion length", "check.kind", "missing"]),
    ("criteria.1.check.kind", "length_constraints:number_word", ["criterion length", "number_words"]),
    ("criteria.1.check.maximum", 3, ["criterion length", "unknown argument 'maximum'"]),
    ("criteria.1.check.min", 200, ["criterion length", "above"]),
    ("criteria.2.veto.threshold", 1.5, ["criterion no-flattery", "veto.threshold", "at most 1"]),
    ("criteria.2.veto.threshold", -0.1, ["criterion no-flattery", "veto.threshold", "at least 0"]),
    ("criteria.2.veto.threshold", math.nan, ["criterion no-flattery", "veto.threshold"]),
    ("criteria.2.veto", True, ["criterion no-flattery", "veto", "mapping"]),
    ("criteria.2.veto.detect", True, ["criterion no-flattery", "veto.detect", "detector"]),
    ("criteria.2.saturation.theta", 1.0, ["criterion no-flattery", "theta", "below 1"]),
    ("criteria.2.saturation.theta", -0.1, ["criterion no-flattery", "theta"]),
    ("criteria.2.saturation.beta", 0, ["criterion no-flattery", "beta", "above 0"]),
    ("criteria.2.saturation.beta", math.inf, ["criterion no-flattery", "beta"]),
    ("criteria.2.saturation.beta", ..., ["criterion no-flattery", "beta", "missing"]),
    ("pairs.0.a", "clam", ["pair clam*length", "unknown criterion", "did you mean calm"]),
    ("pairs.0.b", "calm", ["pair calm*calm", "two different"]),
    ("pairs.0.kind", "max", ["pair calm*length", "kind", "min"]),
    ("pairs.0.weight", math.nan, ["pair calm*length", "weight"]),
    ("pairs.0.weight", ..., ["pair calm*length", "weight", "missing"]),
    ("shaping.kappa", 1.0, ["shaping.kappa", "below 1"]),
    ("shaping.alpha", -1, ["shaping.alpha", "at least 0"]),
    ("shaping.alpha", math.inf, ["shaping.alpha"]),
    ("shaping.power", 0.5, ["shaping.power", "at least 1"]),
    ("shaping.gamma", 1, ["shaping.gamma", "unknown key"]),
    ("veto_reward", math.inf, ["veto_reward", "finite"]),
    ("veto_reward", None, ["veto_reward"]),
    ("on_missing_veto", "maybe", ["on_missing_veto", "fail, pass, unscored"]),
    ("criterias", [], ["criterias", "unknown key", "did you mean criteria"]),
    ("prompt", 5, ["prompt", "text"]),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "says"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_refused_in_one_line_that_names_file_place_and_key(path: str, value: Any, says: list[str]) -> None:
    with pytest.raises(BadInput) as caught:
        parse_rubric(changed(path, value), "corpus.jsonl", "line 7")
    line = str(caught.value)
    assert line.startswith("corpus.jsonl: line 7")
    assert "\n" not in line
    for word in says:
        assert word in line, line
    if path != "id":
        assert "rubric story.plain-narrative" in line


@pytest.mark.parametrize("junk", [None, 3, "text", [], [FULL], True, b"x", {}, {1: 2}, {"id": {}}])
def test_what_is_no_rubric_at_all(junk: object) -> None:
    with pytest.raises(BadInput, match=r"^f: "):
        parse_rubric(junk, "f")


def test_messages_stay_short() -> None:
    with pytest.raises(BadInput) as caught:
        parse_rubric({**FULL, "x" * 10_000: 1}, "f")
    assert len(str(caught.value)) < 400
    with pytest.raises(BadInput) as caught:
        parse_rubric({**FULL, "family": "y" * 10_000}, "f")
    assert len(str(caught.value)) < 400


def test_structs_are_msgspec_structs() -> None:
    assert issubclass(Rubric, msgspec.Struct)
    assert json.loads(msgspec.json.encode(parse_rubric(SMALL, "f")))["criteria"][0]["id"] == "c"
