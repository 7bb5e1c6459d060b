"""The verbs stats, show and import on small files; importers on rows of every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megarubric.errors import BadInput
from megarubric.rubrics import commands, load_rubrics
from megarubric.rubrics.importers import FORMATS, import_files
from megarubric.rubrics.importers.model import slug, unique_ids

RUBRIC = {
    "id": "ferry",
    "title": "Ferry [red]note[/]",
    "family": "social",
    "prompt": "Write a note about the late ferry.",
    "reference": "It leaves at ten.",
    "provenance": {"author": "llm", "model": "m", "source": "tests", "licence": "Apache-2.0"},
    "criteria": [
        {
            "id": "time",
            "description": "Says when it leaves [brackets stay].",
            "weight": 2,
            "needs_reference": True,
            "saturation": {"theta": 0.5, "beta": 2},
        },
        {"id": "blame", "description": "Blames somebody.", "weight": -1, "veto": {}},
        {"id": "words", "check": {"kind": "length_constraints:number_words", "max": 60}},
    ],
    "pairs": [{"a": "time", "b": "words", "weight": 0.5, "kind": "min"}],
    "shaping": {"kappa": 0.6, "alpha": 1, "power": 2},
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "x.jsonl"
    second = {"id": "zh", "criteria": [{"id": "c", "description": "说明渡轮为什么晚点。"}]}
    file.write_text(json.dumps(RUBRIC) + "\n" + json.dumps(second) + "\n")
    return file


def test_stats(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.stats([corpus], as_json=True) == 0
    stats = json.loads(capsys.readouterr().out)
    expected = {
        "rubrics": 2, "criteria": 4, "criteria_per_rubric": 2.0, "judged": 3, "checks": 1, "mixed": 0.5, "vetoes": 1,
        "pitfalls": 1, "pairs": 1, "saturated": 1, "shaped": 1, "with_prompt": 1, "with_reference": 1, "chinese": 1,
        "absence_weight": 0.8, "author": {"llm": 1, "none": 1}, "tiers": {"2": 3},
        "check_kinds": {"length_constraints:number_words": 1}, "criteria_counts": {"1": 1, "3": 1},
    }  # fmt: skip
    assert {key: stats[key] for key in expected} == expected
    assert stats["scope"] == {"dataset": 0, "task": 1, "instance": 1}
    assert stats["family"]["social"] == 1 and stats["family"]["none"] == 1
    assert stats["weight"] == {"min": -1.0, "p25": 1.0, "median": 1.0, "p75": 1.0, "max": 2.0}
    assert commands.stats([corpus]) == 0
    out = capsys.readouterr().out
    assert "2 rubrics, 4 criteria" in out and "social" in out


def test_show(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.show([corpus], ids=["ferry"]) == 0
    out = capsys.readouterr().out
    for words in (
        "ferry  Ferry [red]note[/]", "Write a note about the late ferry.", "It leaves at ten.", "[brackets stay]",
        "veto when the score is ≥ 0.5", "saturates above 0.5", "needs the reference", "pair time × words: min",
        "max=60", "by llm with m",
    ):  # fmt: skip
        assert words in out
    assert commands.show([corpus], as_json=True) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [r["id"] for r in shown] == ["ferry", "zh"] and shown[0]["criteria"][1]["veto"]["threshold"] == 0.5
    assert shown[0]["hash"] == load_rubrics(corpus).get("ferry").hash
    with pytest.raises(BadInput, match="did you mean ferry"):
        commands.show([corpus], ids=["fery"])


def test_show_stops_after_twenty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": f"r{i}", "criteria": [{"id": "c", "description": "x"}]} for i in range(25)]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    assert commands.show([tmp_path / "x.json"]) == 0
    out = capsys.readouterr().out
    assert "r19" in out and "r20" not in out and "5 more" in out


def test_corpora_of_several_paths_may_not_share_ids(corpus: Path) -> None:
    with pytest.raises(BadInput, match="taken already"):
        commands.stats([corpus, corpus])


# --- importers -------------------------------------------------------------------------------------------------------

BAND = {"1-2": "None.", "3-4": "Few.", "5-6": "Some.", "7-8": "Many.", "9-10": "All."}
WRITINGBENCH = {
    "index": 7, "domain1": "Literature & Arts", "domain2": "Poem", "query": "Write a poem about a ferry.",
    "checklist": [{"name": "Sea imagery", "criteria_description": "Uses the sea.", **BAND},
                  {"name": "诗意", "criteria_description": "Rhymes.", **BAND}],
}  # fmt: skip


def question(name: str, **fields: Any) -> dict[str, Any]:
    return {"id": f"m.{name}", "type": "question", "text": f"Does it {name}?", "pass_answer": "YES", "weight": 1.0,
            "question_type": "scored", **fields}  # fmt: skip


HBQ = {
    "module_id": "m", "version": 2, "title": "Module", "kind": "craft",
    "tree": [
        {"id": "m.a", "type": "group", "title": "A", "score_mode": "weighted_mean", "weight": 3.0,
         "children": [question("rhyme", weight=2.0), question("scan"), question("exist", question_type="hard_gate"),
                      question("hum", question_type="diagnostic"), question("bore", pass_answer="NO")]},
        {"id": "m.b", "type": "group", "title": "Ladder", "score_mode": "cumulative_threshold", "weight": 1.0,
         "children": [question("work"), question("shine")]},
    ],
}  # fmt: skip
HEALTHBENCH = {
    "prompt_id": "q-1", "prompt": [{"role": "user", "content": "My tooth hurts."}],
    "rubrics": [{"criterion": "Asks how long it has hurt.", "points": 5, "tags": ["axis:context"]},
                {"criterion": "Names a dose without asking for age.", "points": -7, "tags": []}],
}  # fmt: skip
RAR = {
    "question": "Why is the sky blue?", "reference_answer": "Rayleigh scattering.",
    "rubric": [{"title": "Scattering", "description": "Essential Criteria: Names scattering.", "weight": 5},
               {"title": "Ocean", "description": "Pitfall Criteria: Says it mirrors the sea.", "weight": -1}],
}  # fmt: skip
RUBRICHUB = {"id": 3, "prompt": "Name a pier.", "rubrics": [{"criterion": "Names a pier.", "points": 2}]}
IFEVAL = {
    "key": 1000, "prompt": "Write without commas, in 300 words or more.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words", "count:unknown"],
    "kwargs": [{"num_words": None}, {"num_words": 300, "relation": "at least", "keyword": None}, {}],
}  # fmt: skip
MT_BENCH = {"question_id": 101, "category": "math", "turns": ["1+1?", "And 2+2?"], "reference": ["2", "4"]}
VICUNA = {"question_id": 1, "text": "How do I keep a diary?", "category": "generic"}


def run(tmp_path: Path, *rows: Any, name: str = "x.jsonl") -> Any:
    file = tmp_path / name
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return import_files([file])[0]


@pytest.mark.parametrize(
    ("row", "format", "family", "author", "criteria"),
    [
        (WRITINGBENCH, "writingbench", "creative", "llm", 2),
        (HBQ, "hbq", "creative", "hybrid", 6),
        (HEALTHBENCH, "healthbench", "safety", "human", 2),
        (RAR, "rar", "reasoning", "llm", 2),
        (RUBRICHUB, "rubrichub", "instruction", "llm", 1),
        (IFEVAL, "ifeval", "instruction", "human", 2),
        (MT_BENCH, "mtbench", "reasoning", "hybrid", 2),
        (VICUNA, "vicuna", "instruction", "hybrid", 4),
    ],
)
def test_formats_are_told_apart(tmp_path: Path, row: Any, format: str, family: str, author: str, criteria: int) -> None:
    report = run(tmp_path, row)
    (rubric,) = report.rubrics
    assert report.format == format and format in FORMATS and not report.refused
    assert rubric.family == family and rubric.provenance.author == author and rubric.provenance.licence
    assert len(rubric.criteria) == criteria == report.criteria_out
    assert report.rows == 1


def test_writingbench(tmp_path: Path) -> None:
    (rubric,) = run(tmp_path, WRITINGBENCH).rubrics
    assert (rubric.id, rubric.prompt, rubric.scope) == ("writingbench.7", "Write a poem about a ferry.", "instance")
    assert [c.id for c in rubric.criteria] == ["sea-imagery", "c2"]
    assert rubric.criteria[0].tier_values == (1.5, 3.5, 5.5, 7.5, 9.5)


def test_hbq_weights_gates_and_ladders(tmp_path: Path) -> None:
    report = run(tmp_path, HBQ)
    (rubric,) = report.rubrics
    by_id = {c.id: c for c in rubric.criteria}
    assert by_id["rhyme"].weight == pytest.approx(2 * by_id["scan"].weight, rel=1e-5)
    group_a = by_id["rhyme"].weight + by_id["scan"].weight + by_id["bore"].weight
    assert group_a == pytest.approx(3 * by_id["b"].weight, rel=1e-5)  # the groups' own weights are 3 and 1
    assert by_id["exist"].weight == 0 and by_id["exist"].veto is not None
    assert by_id["hum"].weight == 0 and by_id["hum"].veto is None
    assert [t.text for t in by_id["bore"].tiers or ()] == ["Yes.", "No."]
    assert [t.text for t in by_id["b"].tiers or ()] == ["No step is reached.", "Does it work?", "Does it shine?"]
    assert (report.criteria_in, report.criteria_out) == (7, 6)


def test_points_pitfalls_and_references(tmp_path: Path) -> None:
    (health,) = run(tmp_path, HEALTHBENCH).rubrics
    assert [c.weight for c in health.criteria] == [5, -7] and health.prompt == "My tooth hurts."
    (rar,) = run(tmp_path, RAR).rubrics
    assert rar.reference == "Rayleigh scattering."
    assert [(c.id, c.description, c.weight) for c in rar.criteria] == [
        ("scattering", "Names scattering.", 5), ("ocean", "Says it mirrors the sea.", -1),
    ]  # fmt: skip
    turns = HEALTHBENCH | {"prompt": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]}
    report = run(tmp_path, turns)
    assert report.rubrics[0].prompt == "User: A\n\nAssistant: B" and sum(report.lost.values()) >= 1


def test_ifeval_drops_nulls_and_counts_what_it_does_not_know(tmp_path: Path) -> None:
    report = run(tmp_path, IFEVAL)
    (rubric,) = report.rubrics
    assert [c.check.params for c in rubric.criteria] == [{}, {"num_words": 300, "relation": "at least"}]
    assert report.criteria_in == 3 and report.lost["the instruction count:unknown, which has no check"] == 1


def test_mt_bench_without_reference_is_counted_not_refused(tmp_path: Path) -> None:
    bare = {key: MT_BENCH[key] for key in ("category", "turns")} | {"question_id": 81}
    report = run(tmp_path, MT_BENCH, bare)
    assert [r.reference for r in report.rubrics] == ["2"] and not report.refused
    assert report.lost["questions without a reference (nothing to judge by)"] == 1


def test_bad_rows_are_refused_by_place_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [WRITINGBENCH | {"checklist": 3}, WRITINGBENCH | {"checklist": [{}]}, [1], WRITINGBENCH, None, {"a": 1}]
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in [WRITINGBENCH, *bad]) + "{\n")
    out = tmp_path / "out.jsonl"
    assert commands.import_([file], out) == 1
    err = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1].split(",")[0] for line in err] == [f"line {n}" for n in range(2, 9)]
    assert "taken already" in err[3]
    assert [r.id for r in load_rubrics(out)] == ["writingbench.7"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "x.jsonl"]


def test_import_says_what_went_in_and_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(json.dumps(HBQ) + "\n")
    (tmp_path / "in" / "b.json").write_text(json.dumps([RAR, RUBRICHUB]))
    assert commands.import_([tmp_path / "in"], tmp_path / "out.jsonl", as_json=True) == 0
    reports = json.loads(capsys.readouterr().out)
    assert [(r["format"], r["rows"], r["rubrics"]) for r in reports] == [("hbq", 1, 1), ("rar", 2, 2)]


def test_unknown_formats(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="its format is none of"):
        run(tmp_path, {"a": 1})
    with pytest.raises(BadInput, match="no such format"):
        import_files([tmp_path / "x.jsonl"], "excel")
    with pytest.raises(BadInput, match="no row could be used"):
        (tmp_path / "y.jsonl").write_text(json.dumps(VICUNA | {"answer_id": 1}) + "\n")
        commands.import_([tmp_path / "y.jsonl"], tmp_path / "out.jsonl")


def test_slugs() -> None:
    assert slug("Sea & imagery (déjà vu)!", "c") == "sea-imagery-deja-vu"
    assert slug("诗意", "c1") == "c1"
    assert unique_ids(["a", "a", "a-2", "a"]) == ["a", "a-2", "a-2-2", "a-3"]
