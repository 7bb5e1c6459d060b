"""Every lint rule on a rubric it must find and one it must let by; fixes; rows and exit statuses of the verb."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megarubric.rubrics import commands, load_rubrics, parse_rubric
from megarubric.rubrics.lint import RULES, absence_share, fix_files, lint_paths, lint_rubric, near_duplicates
from megarubric.rubrics.lint.near import grams, jaccard, rubric_text, signatures

TIERS = [{"value": 0, "text": "Names no boat."}, {"value": 1, "text": "Names the ferry by its name."}]
CLEAN: dict[str, Any] = {
    "id": "ferry.note",
    "title": "A note about the ferry",
    "scope": "task",
    "family": "social",
    "provenance": {"author": "human", "source": "tests", "licence": "Apache-2.0"},
    "criteria": [
        {"id": "ferry", "description": "Names the ferry.", "tiers": TIERS},
        {"id": "time", "description": "Says when it leaves."},
        {"id": "blame", "description": "Blames nobody for the delay."},
        {"id": "words", "check": {"kind": "length_constraints:number_words", "max": 60}},
    ],
}


def found(tree: dict[str, Any]) -> dict[str, list[str | None]]:
    out: dict[str, list[str | None]] = {}
    for finding in lint_rubric(parse_rubric(tree, "f"), "f"):
        out.setdefault(finding.rule, []).append(finding.criterion)
    return out


def with_criterion(**fields: Any) -> dict[str, Any]:
    tree = copy.deepcopy(CLEAN)
    tree["criteria"].append({"id": "new", "description": "Says where it lands.", **fields})
    return tree


def judged(description: str, *texts: str, **fields: Any) -> dict[str, Any]:
    tiers = [{"value": k, "text": t} for k, t in enumerate(texts)]
    return with_criterion(description=description, **({"tiers": tiers} if texts else {}), **fields)


HACK = {"kind": "hack:self_praise"}
FINDS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # rule, a rubric that has it, one that looks like it and has not
    ("compound-criterion", judged("Names the pier and explains the delay."), judged("Names the pier.")),
    (
        "compound-criterion",
        judged("Names the pier and explains the delay."),
        judged("Names the pier and explains the delay.", "Does neither.", "Does one of the two.", "Does both."),
    ),
    (
        "compound-criterion",
        judged("Is short, plain, and warm."),
        judged("Speaks of the cost, without consoling or exhorting."),
    ),
    ("compound-criterion", judged("说明时间并且给出地点。"), judged("说明时间。")),
    ("no-description", judged(" "), with_criterion(description="", check={"kind": "punctuation:no_comma"})),
    ("vague-word", judged("The note is engaging."), judged("The note opens with the delay.")),
    (
        "vague-word",
        judged("The note is engaging.", "Not engaging.", "Engaging."),
        judged(
            "The note is engaging.", "A reader could stop after the first line.", "Each line adds news of the ferry."
        ),
    ),
    ("tier-text", judged("Says where.", "", "Says where it lands."), judged("Says where.", "No.", "Yes, by name.")),
    (
        "tier-text",
        judged("Says where.", *(f"Grade {k}." for k in range(11))),
        judged("Says where.", *(f"Grade {k}." for k in range(9))),
    ),
    (
        "overlapping-tiers",
        judged("Length.", "50-100 words", "80-160 words"),
        judged("Length.", "50-80 words", "80-160 words"),
    ),
    (
        "overlapping-tiers",
        judged("Pier.", "Names the pier somewhere.", "Somewhere names the pier."),
        judged("Pier.", "Names no pier somewhere.", "Names the pier somewhere."),
    ),
    (
        "overlapping-tiers",
        judged("Boats.", "No boat.", "At least one boat.", "At least two boats."),
        judged("Boats.", "No boat.", "Exactly one boat.", "At least two boats."),
    ),
    (
        "presence-only",
        CLEAN | {"criteria": [{"id": w, "description": f"Mentions {w}."} for w in ("piers", "boats", "gulls")]},
        CLEAN,
    ),
    ("double-counting", judged("The ferry: names the ferry."), judged("Names the pier.")),
    (
        "double-counting",
        with_criterion(check={"kind": "length_constraints:number_words", "max": 60}),
        with_criterion(check={"kind": "length_constraints:number_words", "max": 70}),
    ),
    (
        "double-counting",
        CLEAN | {"pairs": [{"a": "ferry", "b": "time", "weight": 1}, {"a": "time", "b": "ferry", "weight": 1}]},
        CLEAN
        | {
            "pairs": [{"a": "ferry", "b": "time", "weight": 1}, {"a": "time", "b": "ferry", "weight": 1, "kind": "min"}]
        },
    ),
    (
        "reference",
        with_criterion(needs_reference=True),
        with_criterion(needs_reference=True) | {"reference": "Pier 4."},
    ),
    ("reference", judged("Agrees with the reference answer."), judged("Speaks of the delay.")),
    ("reference", CLEAN | {"reference": "Pier 4."}, CLEAN),
    (
        "veto-polarity",
        with_criterion(check=HACK, weight=0, veto={}),
        with_criterion(check=HACK, weight=0, veto={"detector": True}),
    ),
    ("veto-polarity", with_criterion(check=HACK, weight=1), with_criterion(check=HACK, weight=-1, veto={})),
    (
        "veto-on-good",
        judged("Pier.", "no", "part", "all", veto={"threshold": 0.9}),
        judged("Pier.", "no", "part", "all", veto={"threshold": 0.4}),
    ),
    (
        "veto-on-good",
        with_criterion(weight=-1, veto={"threshold": 0.0}),
        with_criterion(weight=-1, veto={"threshold": 0.5}),
    ),
    ("veto-on-good", with_criterion(veto={"threshold": 0.0}), with_criterion(veto={})),
    (
        "veto-on-good",
        judged("Insults.", "none", "one", "many", weight=-1, veto={"threshold": 0.5}),
        judged("Insults.", "none", "one", "many", weight=-1, veto={"threshold": 0.9}),
    ),
    ("veto-on-good", judged("The note is engaging.", veto={}), judged("Insults nobody.", veto={})),
    ("dominated-weights", with_criterion(weight=10), with_criterion(weight=2)),
    (
        "no-weight",
        CLEAN | {"criteria": [{"id": "a", "description": "Insults nobody.", "weight": 0, "veto": {}}]},
        CLEAN | {"criteria": [{"id": "a", "description": "Insults nobody.", "weight": 0.1, "veto": {}}]},
    ),
    (
        "unreachable-saturation",
        with_criterion(check={"kind": "punctuation:no_comma"}, saturation={"theta": 0.5, "beta": 2}),
        with_criterion(check={"kind": "punctuation:no_comma"}),
    ),
    (
        "unreachable-saturation",
        judged("Pier.", "no", "part", "all", saturation={"theta": 0.7, "beta": 2}),
        judged("Pier.", "no", "part", "all", saturation={"theta": 0.3, "beta": 2}),
    ),
    ("scope-and-prompt", CLEAN | {"scope": "instance"}, CLEAN | {"scope": "instance", "prompt": "Write a note."}),
    ("scope-and-prompt", CLEAN | {"prompt": "Write a note."}, CLEAN),
    ("provenance", {k: v for k, v in CLEAN.items() if k != "provenance"}, CLEAN),
    ("provenance", CLEAN | {"provenance": {"author": "human", "source": "x"}}, CLEAN),
    (
        "provenance",
        CLEAN | {"provenance": CLEAN["provenance"] | {"model": "m"}},
        CLEAN | {"provenance": CLEAN["provenance"] | {"author": "llm", "model": "m"}},
    ),
    ("metadata", CLEAN | {"title": ""}, CLEAN),
    ("metadata", {k: v for k, v in CLEAN.items() if k != "family"}, CLEAN),
    (
        "contradicting-checks",
        with_criterion(check={"kind": "length_constraints:number_words", "relation": "at least", "num_words": 80}),
        with_criterion(check={"kind": "length_constraints:number_words", "relation": "at least", "num_words": 40}),
    ),
    ("untidy-text", CLEAN | {"title": " A note "}, CLEAN),
    ("untidy-text", CLEAN | {"tags": ["a", "a"]}, CLEAN | {"tags": ["a", "b"]}),
    ("untidy-text", judged("Says where. "), judged("Says where.")),
]


def test_a_clean_rubric_has_no_finding() -> None:
    assert found(CLEAN) == {}


@pytest.mark.parametrize(("rule", "bad", "good"), FINDS, ids=lambda v: v if isinstance(v, str) else "")
def test_rule(rule: str, bad: dict[str, Any], good: dict[str, Any]) -> None:
    assert rule in found(bad)
    assert rule not in found(good)


def test_every_rule_is_tested_and_explained() -> None:
    assert {rule for rule, *_ in FINDS} | {"near-duplicate", "unreadable"} == set(RULES)
    for rule in RULES.values():
        assert len(rule.reason) > 40 and rule.example


def test_both_sides_of_contradictions() -> None:
    cases = [{"kind": "change_case:english_capital"}, {"kind": "change_case:english_lowercase"}]
    assert "contradicting-checks" in found(
        CLEAN | {"criteria": [{"id": f"c{k}", "check": c} for k, c in enumerate(cases)]}
    )
    words = [
        {"kind": "keywords:existence", "keywords": ["Ferry"]},
        {"kind": "keywords:forbidden_words", "forbidden_words": ["ferry"]},
    ]
    assert "contradicting-checks" in found(
        CLEAN | {"criteria": [{"id": f"c{k}", "check": c} for k, c in enumerate(words)]}
    )


def test_a_tag_allows_a_finding() -> None:
    tree = judged("The note is engaging.")
    assert "vague-word" in found(tree)
    assert "vague-word" not in found(tree | {"tags": ["lint-allow:vague-word"]})


def test_absence_share() -> None:
    assert absence_share(parse_rubric(CLEAN, "f")) == pytest.approx(0.5)
    assert absence_share(parse_rubric(with_criterion(weight=-2), "f")) == pytest.approx(4 / 6)
    nothing = CLEAN | {"criteria": [{"id": "a", "description": "x", "weight": 0}]}
    assert absence_share(parse_rubric(nothing, "f")) is None


# --- near-duplicates -------------------------------------------------------------------------------------------------


def prose(rng: random.Random, n: int) -> str:
    return " ".join(f"w{rng.randrange(3000)}" for _ in range(n))


def as_rubric(name: str, text: str) -> Any:
    return parse_rubric({"id": name, "criteria": [{"id": "c", "description": text}]}, "f")


def test_near_duplicates_are_those_an_exact_count_finds() -> None:
    rng = random.Random(3)
    rubrics = []
    for i in range(120):
        base = prose(rng, 150).split(" ")
        rubrics.append(as_rubric(f"r{i}", " ".join(base)))
        changed = list(base)
        for _ in range(rng.choice([0, 1, 2, 6, 20, 60])):
            changed[rng.randrange(len(changed))] = "other"
        rubrics.append(as_rubric(f"r{i}b", " ".join(changed)))

    def four(r: Any) -> set[tuple[str, ...]]:
        words = rubric_text(r).split()
        return {tuple(words[k : k + 4]) for k in range(len(words) - 3)}

    sets = [four(r) for r in rubrics]
    exact = {i for i in range(len(rubrics)) for j in range(i) if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) > 0.8}
    found_pairs = near_duplicates(rubrics)
    assert {i for i, _, _ in found_pairs} == exact and len(exact) > 30
    for i, j, overlap in found_pairs:
        assert overlap == pytest.approx(len(sets[i] & sets[j]) / len(sets[i] | sets[j]))


def test_signatures_estimate_the_jaccard_similarity() -> None:
    rng = random.Random(5)
    errors = []
    for share in (0.2, 0.5, 0.9):
        for _ in range(20):
            words = prose(rng, 300).split(" ")
            other = [w if rng.random() < share else f"x{rng.randrange(10**6)}" for w in words]
            sets = grams([" ".join(words), " ".join(other)])
            marks = signatures(sets)
            errors.append(float(np.mean(marks[0] == marks[1])) - jaccard(sets[0], sets[1]))
    assert abs(float(np.mean(errors))) < 0.02 and float(np.max(np.abs(errors))) < 0.2


def test_short_and_empty_texts() -> None:
    assert [len(s) for s in grams(["", "one", "one two three four", "a b c d e", "渡轮晚点了"])] == [1, 1, 1, 2, 2]
    assert near_duplicates([]) == []
    assert [
        (i, j) for i, j, _ in near_duplicates([as_rubric("a", "same words here"), as_rubric("b", "same words here")])
    ] == [(1, 0)]


# --- the verb --------------------------------------------------------------------------------------------------------


def write(path: Path, *trees: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(t) + "\n" for t in trees))
    return path


def test_json_rows_and_exit_statuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean = write(tmp_path / "clean.jsonl", CLEAN)
    assert commands.lint([clean], as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == []
    flawed = write(tmp_path / "flawed.jsonl", judged("The note is engaging.") | {"id": "flawed"})
    assert commands.lint([clean, flawed], as_json=True) == 1
    rows = json.loads(capsys.readouterr().out)
    assert rows[0] == {
        "file": str(flawed),
        "rubric": "flawed",
        "criterion": "new",
        "rule": "vague-word",
        "message": "'engaging' is not anchored: no tier says what it looks like",
    }
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(CLEAN | {"id": "a", "colour": 1}) + "\n{\n" + json.dumps(CLEAN | {"id": "b"}) + "\n")
    assert commands.lint([broken], as_json=True) == 2
    out = capsys.readouterr()
    rows = [r for r in json.loads(out.out) if r["rule"] == "unreadable"]
    assert [(r["rubric"], r["file"]) for r in rows] == [("a", str(broken)), (None, str(broken))]
    assert "colour" in rows[0]["message"] and "line 2" in rows[1]["message"]
    assert "line 1" in out.err and "colour" in out.err


def test_an_unreadable_criterion_is_named(tmp_path: Path) -> None:
    findings, _ = lint_paths([write(tmp_path / "a.jsonl", judged("Names it.") | {"pairs": [{"a": "new", "b": "x"}]})])
    assert [(f.rule, f.criterion) for f in findings] == [("unreadable", None)]
    tree = copy.deepcopy(CLEAN)
    tree["criteria"][1]["wieght"] = 1
    findings, _ = lint_paths([write(tmp_path / "b.jsonl", tree)])
    assert [(f.rule, f.rubric, f.criterion) for f in findings] == [("unreadable", "ferry.note", "time")]


@pytest.mark.parametrize(("name", "text"), [("x.yaml", ""), ("x.jsonl", "\n"), ("x.json", "[]")])
def test_a_file_without_a_rubric_is_not_clean(
    tmp_path: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    assert commands.lint([tmp_path / name], as_json=True) == 2
    out = capsys.readouterr()
    assert [(r["rule"], r["message"]) for r in json.loads(out.out)] == [("unreadable", "holds no rubric")]
    assert name in out.err


def test_equal_ids_across_paths_are_found(tmp_path: Path) -> None:
    findings, n = lint_paths([write(tmp_path / "a.jsonl", CLEAN), write(tmp_path / "b.jsonl", CLEAN)])
    assert n == 1
    assert any(f.rule == "unreadable" and "taken already" in f.message for f in findings)


def test_near_duplicates_are_reported_once(tmp_path: Path) -> None:
    findings, _ = lint_paths([write(tmp_path / "a.jsonl", CLEAN, CLEAN | {"id": "twin"}, CLEAN | {"id": "triplet"})])
    assert [(f.rubric, f.rule) for f in findings] == [("twin", "near-duplicate"), ("triplet", "near-duplicate")]


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flawed = write(tmp_path / "flawed.jsonl", judged("The note is [bold]engaging[/]."))
    assert commands.lint([flawed]) == 1
    out = capsys.readouterr().out
    assert "vague-word" in out and "1 rubrics, 1 findings" in out


def test_fix_mends_and_leaves_the_rest_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    untidy = with_criterion(check=HACK, weight=0, veto={}) | {"id": "untidy", "title": " A note ", "tags": ["a", "a"]}
    file = tmp_path / "x.jsonl"
    kept = '{"id": "kept",   "criteria": [{"id": "c", "description": "Says so."}]}'
    file.write_text(kept + "\n\n" + json.dumps(untidy) + "\n")
    assert fix_files([file]) == (1, [])
    lines = file.read_text().split("\n")
    assert lines[0] == kept and lines[1] == "" and lines[3] == ""
    mended = load_rubrics(file).get("untidy")
    assert (mended.title, mended.tags) == ("A note", ("a",))
    assert mended.criteria[-1].veto is not None and mended.criteria[-1].veto.detector
    assert fix_files([file]) == (0, [])
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]

    array = tmp_path / "y.json"
    array.write_text(json.dumps([CLEAN | {"title": "x "}, CLEAN | {"id": "other"}]))
    assert fix_files([array]) == (1, [])
    assert [r.title for r in load_rubrics(array)] == ["x", "A note about the ferry"]

    yaml = tmp_path / "z.yaml"
    yaml.write_text("# kept\nid: z\ntitle: ' x '\ncriteria: [{id: c, description: x}]\n")
    before = yaml.read_text()
    assert fix_files([yaml]) == (0, [yaml])
    assert yaml.read_text() == before
    assert commands.lint([yaml], fix=True) == 1
    assert "comments" in capsys.readouterr().err
