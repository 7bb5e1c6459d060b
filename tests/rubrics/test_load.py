"""Files and corpora: YAML, JSON, JSONL, directories; bad files give one line with the place."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from megarubric.errors import BadInput
from megarubric.rubrics import Corpus, load_rubrics, parse_rubric

YAML = """\
id: story.plain   # a comment
title: "Plain: narrative"
scope: task
family: creative
provenance: {author: human, source: megarubric, licence: Apache-2.0}
tags: [story, 'voice']
criteria:
  - id: calm
    description: >
      States what happened,
      without consoling.
    tiers:
      - {value: 0, text: No}
      - {value: 1.5, text: yes}
  - id: length
    weight: 5e-1
    check: {kind: "length_constraints:number_words", relation: between, min: 80, max: 160}
pairs:
reference: null
"""


def rubric(rubric_id: str, **fields: Any) -> dict[str, Any]:
    return {"id": rubric_id, "criteria": [{"id": "c", "description": "Says so."}], **fields}


def write(path: Path, *rubrics: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rubrics))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        load_rubrics(path)
    line = str(caught.value)
    assert "\n" not in line and str(path) in line
    return line


def test_yaml(tmp_path: Path) -> None:
    file = tmp_path / "plain.yaml"
    file.write_text(YAML)
    (loaded,) = load_rubrics(file)
    calm, length = loaded.criteria
    assert loaded.title == "Plain: narrative"
    assert calm.description == "States what happened, without consoling.\n"
    assert [t.text for t in calm.tiers or ()] == ["No", "yes"]  # text, as written; YAML 1.1 would read false and true
    assert calm.tier_values == (0.0, 1.5)
    assert (length.weight, loaded.pairs, loaded.reference) == (0.5, (), None)


def test_yaml_lists_and_documents(tmp_path: Path) -> None:
    file = tmp_path / "many.yml"
    file.write_text("- id: a\n  criteria: [{id: c, description: x}]\n- id: b\n  criteria: [{id: c, description: x}]\n")
    assert [r.id for r in load_rubrics(file)] == ["a", "b"]
    file.write_text("id: a\ncriteria: [{id: c, description: x}]\n---\nid: b\ncriteria: [{id: c, description: x}]\n")
    assert [r.id for r in load_rubrics(file)] == ["a", "b"]


def test_json(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps(rubric("a"), indent=1))
    assert [r.id for r in load_rubrics(file)] == ["a"]
    file.write_text(json.dumps([rubric("a"), rubric("b")]))
    assert [r.id for r in load_rubrics(str(file))] == ["a", "b"]


def test_jsonl_with_bom_crlf_and_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(rubric(i)).encode() for i in "abc") + b"\r\n\n")
    assert [r.id for r in load_rubrics(file)] == ["a", "b", "c"]


def test_directory_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / "sub" / "b.jsonl", rubric("b"))
    write(tmp_path / "a.jsonl", rubric("a"))
    (tmp_path / "z.yaml").write_text("id: z\ncriteria: [{id: c, description: x}]\n")
    write(tmp_path / ".hidden" / "x.jsonl", rubric("x"))
    write(tmp_path / ".y.jsonl", rubric("y"))
    (tmp_path / "README.md").write_text("not a rubric")
    corpus = load_rubrics(tmp_path)
    assert [r.id for r in corpus] == ["a", "b", "z"]
    assert corpus.source("b") == f"{tmp_path / 'sub' / 'b.jsonl'}: line 1"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("x.yaml", YAML.replace("weight: 5e-1", "weigth: 1"), ["line 16", "story.plain", "criterion length", "weigth"]),
        ("x.yaml", YAML.replace("value: 1.5", "value: high"), ["line 14", "criterion calm", "tiers[1].value"]),
        ("x.yaml", YAML.replace("weight: 5e-1", "weight: 1\n    weight: 2"), ["line 17", "weight", "twice"]),
        ("x.yaml", YAML.replace("weight: 5e-1", "weight: .inf"), ["line 16", "finite"]),
        ("x.yaml", YAML.replace("weight: 5e-1", "weight: true"), ["line 16", "weight", "true or false"]),
        ("x.yaml", YAML.replace("weight: 5e-1", "weight: 1:30"), ["line 16", "weight", "text"]),
        ("x.yaml", YAML.replace("weight: 5e-1", "weight: '1'"), ["line 16", "weight"]),
        ("x.yaml", YAML.replace('"Plain: narrative"', "2024-05-01"), ["line 2", "date", "quote"]),
        ("x.yaml", YAML.replace('"Plain: narrative"', "Plain: narrative"), ["line 2", "not YAML"]),
        ("x.yaml", YAML.replace('"Plain: narrative"', "1984"), ["line 2", "title", "text"]),
        ("x.yaml", YAML.replace("family: creative", "family: !!python/object:os.system x"), ["line 4", "tag"]),
        ("x.yaml", "a: &a [1]\nb: *a\n", ["line 2", "alias"]),
        ("x.yaml", "? [a]\n: 1\n", ["line 1", "key"]),
        ("x.yaml", "[" * 5000, ["nested deeper"]),
        ("x.yaml", "a: " + "{b: " * 100, ["nested deeper"]),
        ("x.yaml", "id: a\ncriteria:\n\t- id: c\n", ["line 3", "not YAML"]),
        ("x.yaml", "", ["no rubric"]),
        ("x.yaml", "just text", ["line 1", "mapping", "text"]),
        ("x.yaml", "id: \x00\n", ["not YAML"]),
        ("x.json", '{"id": "a",\n "criteria": [}', ["line 2", "not JSON"]),
        ("x.json", '{"id": "a", "criteria": [{"id": "c", "description": "x", "weight": NaN}]}', ["NaN"]),
        ("x.json", "[" * 100_000, ["nested"]),
        ("x.json", "", ["not JSON"]),
        ("x.json", json.dumps([rubric("a"), {"title": "b"}]), ["entry 2", "id: required"]),
        ("x.json", "[]", ["no rubric"]),
        ("x.json", "9" * 5000, ["x.json"]),
        ("x.jsonl", "", ["no rubric"]),
        ("x.jsonl", json.dumps(rubric("a")) + "\n{", ["line 2", "not JSON"]),
        ("x.jsonl", json.dumps(rubric("a")) + "\n" + json.dumps(rubric("b", hue=1)), ["line 2", "rubric b", "hue"]),
        ("x.jsonl", '{"id": "a", "id": "b"}', ["line 1", "'id'", "twice"]),
        ("x.jsonl", '{"id": "a", "criteria": [{"id": "c", "description": "x", "weight": 1e999}]}', ["finite"]),
        ("x.jsonl", '{"id": "a", "criteria": [{"id": "c", "description": "\\ud800"}]}', ["line 1", "UTF-8"]),
        ("x.jsonl", '["a"]', ["line 1", "mapping"]),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, name: str, text: str, says: list[str]) -> None:
    file = tmp_path / name
    file.write_text(text)
    line = refusal(file)
    for word in says:
        assert word in line, line


def test_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(json.dumps(rubric("a")).encode() + b'\n{"id": "\xff"}\n')
    assert "line 2" in refusal(file)
    (tmp_path / "x.yaml").write_bytes(b"id: a\ntitle: \xff\n")
    assert "line 2" in refusal(tmp_path / "x.yaml")


def test_missing_and_odd_paths(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.yaml")
    (tmp_path / "x.txt").write_text("x")
    assert "a rubric file is one of" in refusal(tmp_path / "x.txt")
    (tmp_path / "empty").mkdir()
    assert "holds no rubric file" in refusal(tmp_path / "empty")


def test_an_id_that_comes_twice_names_both_places(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", rubric("x"), rubric("twin"))
    second = write(tmp_path / "b.jsonl", rubric("twin"))
    line = refusal(tmp_path)
    assert f"{first}: line 2" in line and f"{second}: line 1" in line and "twin" in line


def make_corpus() -> Corpus:
    trees = [
        rubric(f"r{i:03d}", tags=["even" if i % 2 == 0 else "odd", "all"], family=("style", "safety", "social")[i % 3],
               scope=("task", "dataset")[i % 2])
        for i in range(60)
    ]  # fmt: skip
    return Corpus([parse_rubric(t, "f") for t in trees], name="made")


def test_look_up() -> None:
    corpus = make_corpus()
    assert len(corpus) == 60
    assert corpus.get("r007").id == "r007"
    assert "r007" in corpus and "x" not in corpus
    with pytest.raises(BadInput, match=r"made: rubric r0007: no such rubric; did you mean r"):
        corpus.get("r0007")
    assert [r.id for r in corpus.by_tag("odd")][:2] == ["r001", "r003"]
    assert len(corpus.by_tag("all")) == 60 and corpus.by_tag("none") == ()
    assert len(corpus.by_family("style")) == 20 and len(corpus.by_scope("dataset")) == 30
    assert corpus.by_scope("instance") == ()


def test_samples_depend_on_seed_and_ids_alone() -> None:
    corpus = make_corpus()
    draw = [r.id for r in corpus.sample(10, seed=1)]
    assert len(set(draw)) == 10
    backwards = Corpus(reversed(corpus.rubrics))
    assert [r.id for r in backwards.sample(10, seed=1)] == draw
    assert [r.id for r in corpus.sample(5, seed=1)] == draw[:5]
    assert [r.id for r in corpus.sample(10, seed=2)] != draw
    assert sorted(r.id for r in corpus.sample(60, seed=3)) == [r.id for r in corpus]
    assert corpus.sample(0, seed=3) == []
    with pytest.raises(BadInput, match="has 60 rubrics"):
        corpus.sample(61, seed=0)


def test_every_rubric_is_drawn_about_equally_often() -> None:
    corpus = make_corpus()
    counts = dict.fromkeys((r.id for r in corpus), 0)
    for seed in range(600):
        for drawn in corpus.sample(6, seed):
            counts[drawn.id] += 1
    assert min(counts.values()) > 30 and max(counts.values()) < 95  # 60 expected, standard deviation 7.3


def test_ten_thousand_rubrics_load(tmp_path: Path) -> None:
    """The content of a realistic corpus; its time is in the benchmarks, not here."""
    tree = rubric("x", title="t" * 40, prompt="p" * 300)
    tiers = [{"value": v, "text": "t" * 50} for v in range(3)]
    tree["criteria"] = [{"id": f"c{k}", "description": "d" * 80, "tiers": tiers} for k in range(6)]
    write(tmp_path / "big.jsonl", *({**tree, "id": f"r{i}"} for i in range(10_000)))
    start = time.process_time()
    assert len(load_rubrics(tmp_path)) == 10_000
    print(f"10,000 rubrics in {time.process_time() - start:.2f} s of processor time")
