"""The shipped corpus is what its kits give, and what issue and README say of it; what a kit may not do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megarubric.errors import BadInput
from megarubric.rubrics import load_rubrics
from megarubric.rubrics.corpus import Corpus
from megarubric.rubrics.lint import lint_paths
from megarubric.rubrics.schema import FAMILIES
from megarubric.rubrics.stats import corpus_stats

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools/corpus"))

from compose import PROVENANCE, SHARD_BYTES, SHARDS, check  # noqa: E402
from kit import compose, read_kit  # noqa: E402


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_rubrics(ROOT / "rubrics")


def test_shards_are_what_the_kits_give() -> None:
    assert check() == 0
    assert all(shard.stat().st_size <= SHARD_BYTES < 2_000_000 for shard in SHARDS.glob("*.jsonl"))


def test_the_corpus_has_what_is_said_of_it(corpus: Corpus) -> None:
    stats = corpus_stats([r for r in corpus if "quickstart" not in r.tags])
    assert stats["rubrics"] >= 10_000
    assert stats["scope"]["dataset"] >= 40 and stats["scope"]["task"] >= 400
    assert all(stats["family"][family] >= 300 for family in FAMILIES)
    assert stats["chinese"] >= 500
    assert stats["criteria_per_rubric"] >= 4 and stats["mixed"] >= 0.25 and stats["absence_weight"] >= 0.3
    assert stats["near_duplicates"] < 0.02
    assert set(stats["author"]) == {"hybrid", "llm"}  # nothing is called human that no human wrote


def test_lint_finds_nothing() -> None:
    findings, n = lint_paths([ROOT / "rubrics"])
    assert n >= 10_000 and findings == []


def test_instances_have_prompts_of_their_own(corpus: Corpus) -> None:
    prompts = [r.prompt for r in corpus if r.scope == "instance" and "quickstart" not in r.tags]
    assert all(p and p.strip() for p in prompts)
    assert len(set(prompts)) == len(prompts)


KIT = """\
kit: note
family: social
title: Note
forms:
  - key: short
    prompt: "Write to {who} about {what}. {Extra}"
    criteria:
      - {id: who, d: "Is addressed to {who}."}
      - {id: words, d: "At most {most} words.", check: {kind: "length_constraints:number_words", max: "{most}"}}
scenarios:
  - key: ferry
    name: the ferry
    slots: {who: Bruno, what: the late ferry, extra: "it sails at ten.", most: 40}
    own:
      - {id: time, d: "Says that it sails at ten.", t: ["Another time.", "At ten."], w: 2, veto: 0.5}
"""


def kit(tmp_path: Path, text: str) -> list:
    path = tmp_path / "social/note.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return list(compose(read_kit(path), path, PROVENANCE))


def test_a_scenario_meets_a_form(tmp_path: Path) -> None:
    (rubric,) = kit(tmp_path, KIT)
    assert rubric.id == "social.note.ferry.short" and rubric.title == "Note: the ferry"
    assert rubric.prompt == "Write to Bruno about the late ferry. It sails at ten."
    assert [c.id for c in rubric.criteria] == ["time", "who", "words"]
    time, who, words = rubric.criteria
    assert time.weight == 2 and time.tier_values == (0, 1) and time.veto is not None
    assert who.description == "Is addressed to Bruno." and words.check is not None
    assert words.check.params["max"] == 40  # a number stays a number
    assert rubric.provenance is not None and rubric.provenance.author == "hybrid"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("{who} about", "{whom} about"), r"ferry.short: no slot \{whom\}"),
        (("slots: {", "slots: {more: 1, "), "ferry: no form uses the slot more"),
        (("w: 2,", "w: 2, forms: [long],"), "criteria speak of this case"),
        (('t: ["Another time.", "At ten."]', "weight: 3"), "unknown field `weight`"),
        (("kit: note", "kit: letter"), "should stand in social/letter.yaml"),
        (("{id: who", "{id: words"), "criterion id 'words' appears twice"),
        (("family: social\n", "family: social\nfamily: social\n"), "line 3"),
    ],
)
def test_what_a_kit_may_not_do(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    assert change[0] in KIT
    with pytest.raises(BadInput, match=words) as caught:
        kit(tmp_path, KIT.replace(*change, 1))
    assert "note.yaml" in str(caught.value) and "\n" not in str(caught.value)
