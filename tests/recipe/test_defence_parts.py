"""The parts of the defence by themselves: statistics, gates in rubrics, tells, removal, promotion."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarubric.config import load_train
from megarubric.errors import BadInput
from megarubric.judging.judge import Judge
from megarubric.judging.types import TierQuery, TierReply
from megarubric.launch.run import Prompts
from megarubric.recipe.defence.answers import Line, field_of
from megarubric.recipe.defence.apply import defended, gates_of, read_defences
from megarubric.recipe.defence.mining import Exploit, Find, onset
from megarubric.recipe.defence.numbers import Strata, holm, wilson
from megarubric.recipe.defence.promote import as_yaml, promotion, write_promotion
from megarubric.recipe.defence.proposal import Option, Share, Verdict
from megarubric.recipe.defence.removal import judge_without, settled
from megarubric.recipe.defence.tells import Tell, fires, surface_forms, tells_of, without
from megarubric.recipe.records import StoredJudgement
from megarubric.reward.reference import aggregate
from megarubric.rollout.data import read_prompts
from megarubric.rubrics import Check, Rubric, load_rubrics, parse_rubric, to_dict
from megarubric.rubrics.lint import lint_paths

ROOT = Path(__file__).resolve().parents[2]


def rubric(rubric_id: str, *criteria: dict[str, Any], **more: Any) -> Rubric:
    return parse_rubric({"id": rubric_id, "criteria": list(criteria), **more}, "test")


PRAISE = {"id": "praise", "description": "Praises itself.", "weight": 0.0, "check": {"kind": "hack:self_praise"},
          "veto": {"detector": True}}  # fmt: skip
PITFALL = {"id": "lies", "description": "Says what is not so.", "weight": -2.0, "veto": {"threshold": 0.6}}
CALM = {"id": "calm", "description": "Stays calm.", "weight": 3.0, "veto": {}}
CONTENT = {"id": "content", "description": "Tells what happened.", "weight": 1.0}
BASE = rubric("t.base", CONTENT, {"id": "short", "description": "Short.", "weight": 0.5})


# --- statistics -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(1, 300))
def test_the_interval_is_wilsons(hits: int, n: int) -> None:
    hits = min(hits, n)
    low, high = wilson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1
    for end in (low, high):  # the ends solve |share - end| = z * sqrt(end * (1 - end) / n)
        if 1e-12 < end < 1 - 1e-12:
            assert abs(hits / n - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), rel=1e-6, abs=1e-9)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_by_its_definition(p: list[float]) -> None:
    adjusted = holm(np.array(p))
    order = sorted(range(len(p)), key=lambda i: p[i])
    for rank, i in enumerate(order):
        expected = min(1.0, max((len(p) - j) * p[order[j]] for j in range(rank + 1)))
        assert adjusted[i] == pytest.approx(expected)
    assert (adjusted >= np.array(p) - 1e-12).all()


@given(
    st.lists(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=2, max_size=4), min_size=1, max_size=3),
)
def test_the_stratified_test_against_all_deals(groups: list[list[tuple[float, bool]]]) -> None:
    """z is the sum of carriers' centred values over the standard deviation of that sum over all ways to deal the
    feature out within each group."""
    stratum = np.array([g for g, rows in enumerate(groups) for _ in rows])
    values = np.array([v for rows in groups for v, _ in rows])
    carriers = [i for i, (_, c) in enumerate(row for rows in groups for row in rows) if c]
    gain, z, strata = Strata(stratum, values).compare(carriers)
    mixed = [rows for rows in groups if 0 < sum(c for _, c in rows) < len(rows)]
    assert strata == len(mixed)
    if not mixed:
        assert (gain, z) == (0.0, 0.0)
        return
    total, variance, weighted, weights = 0.0, 0.0, 0.0, 0.0
    for rows in mixed:
        x, t = np.array([v for v, _ in rows]), sum(c for _, c in rows)
        x = x - x.mean()
        deals = [x[list(deal)].sum() for deal in itertools.combinations(range(len(x)), t)]
        variance += float(np.var(deals))
        total += float(sum(v for v, (_, c) in zip(x, rows) if c))
        one = np.mean([v for v, c in rows if c]) - np.mean([v for v, c in rows if not c])
        weight = t * (len(rows) - t) / len(rows)
        weighted, weights = weighted + float(one) * weight, weights + weight
    assert gain == pytest.approx(weighted / weights, abs=1e-9)
    if variance > 1e-12:
        assert z == pytest.approx(total / math.sqrt(variance), rel=1e-6, abs=1e-6)


def test_onset() -> None:
    assert onset({1: 0.0, 2: 0.0, 3: 0.03, 4: 0.06, 5: 0.2}) == 5
    assert onset({1: 0.3}) == 1 and onset({1: 0.01, 9: 0.02}) is None


# --- gates in rubrics -------------------------------------------------------------------------------------------------


def test_gates_change_no_base_reward_and_fall_where_the_defence_fell() -> None:
    defence = rubric("d.one", PRAISE, PITFALL, CALM, CONTENT)
    whole = defended(BASE, [defence])
    own = [c.id for c in BASE.criteria]
    gates = [c.id for c in whole.criteria[2:]]
    assert gates == [f"defence:d.one:{name}" for name in ("praise", "lies", "calm")]
    assert whole.id == BASE.id and whole.hash != BASE.hash and list(whole.criteria[:2]) == list(BASE.criteria)
    assert defended(BASE, []) is BASE and defended(BASE, [defence]).hash == whole.hash
    quiet = {"content": 0.5, "short": 1.0}
    kept = aggregate(whole, quiet | dict(zip(gates, (0.0, 0.0, 1.0))))
    assert kept.reward == aggregate(BASE, quiet).reward and not kept.vetoed
    assert [kept.attribution[name] for name in own] == [aggregate(BASE, quiet).attribution[n] for n in own]
    for fallen, scores in zip(gates, ((1.0, 0.0, 1.0), (0.0, 0.7, 1.0), (0.0, 0.0, 0.4))):
        result = aggregate(whole, quiet | dict(zip(gates, scores)))
        assert result.vetoed and result.reward == 0 and result.veto == fallen
    # A defence that could not be judged leaves the sample unscored, as the rubric's policy says; it is no pass.
    assert not aggregate(whole, quiet | {gates[0]: 0.0, gates[1]: None, gates[2]: 1.0}).valid


def test_what_cannot_defend_is_refused(tmp_path: Path) -> None:
    defence = rubric("d.one", PRAISE)
    with pytest.raises(BadInput, match=r"has a criterion defence:d\.one:praise already"):
        defended(defended(BASE, [defence]), [defence])
    for name, made, said in (
        ("none", rubric("d.none", CONTENT), "has no veto criterion"),
        ("ref", rubric("d.ref", CALM | {"needs_reference": True}, reference="x"), "needs a reference"),
    ):
        path = tmp_path / f"{name}.yaml"
        path.write_text(as_yaml(made))
        with pytest.raises(BadInput, match=said):
            read_defences([path])
    path = tmp_path / "one.yaml"
    path.write_text(as_yaml(defence))
    with pytest.raises(BadInput, match="twice"):
        read_defences([path, path])


def test_a_run_reads_its_prompts_with_the_defence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path = tmp_path / "d.yaml"
    path.write_text(as_yaml(rubric("d.one", PRAISE)))
    guarded = Prompts(load_train("configs/quickstart.yaml", [f"reward.defence=[{path}]"]))
    rows = read_prompts(Path("rubrics/quickstart/train.jsonl"))
    held = read_prompts(Path("rubrics/quickstart/heldout.jsonl"))
    for row, prompt in zip([*rows, *held], [*guarded.train, *guarded.heldout], strict=True):
        assert prompt.rubric.criteria == (*row.rubric.criteria, *gates_of(rubric("d.one", PRAISE)))
        assert prompt.rubric.hash != row.rubric.hash and prompt.id == row.id
    assert guarded.rows == rows  # what a file said stays what it said


# --- tells ------------------------------------------------------------------------------------------------------------


def test_tells_of_an_answer() -> None:
    found = tells_of("Say in two lines why the ferry came late.", "What a great question! The ferry came late again.",
                     None, (3, 50))  # fmt: skip
    assert Tell("opening", "what a great question") in found and Tell("ending", "came late again") in found
    assert Tell("detector", "hack:flattery_opening") in found
    assert Tell("phrase", "the ferry came late") not in found  # the prompt's own words
    assert Tell("phrase", "ferry came late again") in found
    assert Tell("format", "list") in tells_of("p", "So:\n- one thing here\n- two things there", None, (1, 99))
    assert Tell("phrase", "这个问题") not in found and Tell("phrase", "写得很") in {
        Tell(t.kind, t.what.replace(" ", "")) for t in tells_of("说", "我写得很好。", None, (1, 99))
    }


def test_words_as_they_stand() -> None:
    text = "It’s, in every respect, well-made. IN EVERY  respect! In every\nrespect; in everyrespect."
    forms = surface_forms("in every respect", text)
    assert forms == {"in every respect", "in every  respect"}
    for form in forms:
        assert fires(Check("keywords:forbidden_words", {"forbidden_words": [form]}), "p", text, None)
    assert surface_forms("it's in every", text) == {"it’s, in every"}
    assert surface_forms("写 得 好", "他写得好。") == {"写得好"}


def test_without_the_sentence_that_is_caught() -> None:
    check = Check("hack:self_praise", {})
    praise = "This answer is comprehensive and well structured."
    assert (
        without(check, "p", f"The ferry is late. {praise} It came at ten.", None)
        == "The ferry is late. It came at ten."
    )
    assert without(check, "p", f"The ferry is late. {praise} {praise}", None) == "The ferry is late."
    assert without(check, "p", praise, None) is None
    assert without(check, "p", "The ferry is late.", None) == "The ferry is late."


# --- removal ----------------------------------------------------------------------------------------------------------


class Rule:
    """A judge model that goes by a rule: a quarter for any answer, and half more where it finds `pays`."""

    identity, grain, concurrency = "rule", 64, 1

    def __init__(self, pays: str | None) -> None:
        self.pays = pays

    async def tier_logprobs(self, queries: Sequence[TierQuery]) -> list[TierReply]:
        return [self._reply("".join(part.text for part in q.parts), len(q.tiers)) for q in queries]

    def _reply(self, text: str, tiers: int) -> TierReply:
        p = 0.25 + 0.5 * (self.pays is not None and self.pays in text)
        return TierReply(logprobs=(math.log(1 - p), *(math.log(1e-9),) * (tiers - 2), math.log(p)))


TAIL = "In every respect these lines leave nothing to wish for."
CHECK = Check("keywords:forbidden_words", {"forbidden_words": ["in every respect these lines"]})


def caught(r: Rubric, n: int = 12) -> tuple[Any, Verdict]:
    lines = [
        Line(step=1, prompt_id=f"p{i // 4}", group=i // 4, sample=i % 4, rubric_hash=r.hash, prompt="Report.",
             response="The ferry left late. " + (TAIL if i % 2 else "It came at ten."), reward=0.75 if i % 2 else 0.25,
             valid=True, vetoed=False,
             judgements={"content": StoredJudgement(0.75 if i % 2 else 0.25, 0.75 if i % 2 else 0.25, "judge")},
             attribution={"content": 0.75 if i % 2 else 0.25})
        for i in range(n)
    ]  # fmt: skip
    at = tuple(range(1, n, 2))
    find = Find(Tell("phrase", "in every respect"), at, 3, 3, len(at), 9.0, 0.5, 0.5, 5.0)
    share = Share(len(at), len(at))
    option = Option(CHECK, share, share, Share(0, 500), "not flagged", None)
    return field_of(lines, 3.0, 0.95), Verdict(Exploit((find,), at), {1: 0.5}, 1, [option], option)


def test_judged_again_without_it_tells_proxy_from_content() -> None:
    r = rubric("t.r", CONTENT)
    f, verdict = caught(r)
    paid = asyncio.run(judge_without(f, verdict, {r.hash: r}, Judge(Rule("every respect")), "rule"))
    assert paid is not None and (paid.n, paid.judge) == (6, "rule")
    assert (paid.recorded, paid.with_tell, paid.without) == pytest.approx((0.75, 0.75, 0.25))
    verdict.removal = paid
    settled(verdict)
    assert verdict.chosen is not None
    # A judge that pays for what stays: nothing is lost by the removal, so the words were not what earned it.
    verdict.removal = asyncio.run(judge_without(f, verdict, {r.hash: r}, Judge(Rule("ferry")), "rule"))
    assert verdict.removal is not None and verdict.removal.lost == pytest.approx(0.0)
    settled(verdict)
    assert verdict.chosen is None and "content" in verdict.reason


def test_words_that_a_check_asks_for_are_no_exploit() -> None:
    asks = {"id": "wish", "description": "Wishes.", "weight": 3.0,
            "check": {"kind": "keywords:existence", "keywords": ["wish"]}}  # fmt: skip
    r = rubric("t.r", CONTENT, asks)
    f, verdict = caught(r)
    verdict.removal = asyncio.run(judge_without(f, verdict, {r.hash: r}, Judge(None), "checks"))
    settled(verdict)
    assert verdict.chosen is None and "the checks ask for it" in verdict.reason
    assert asyncio.run(judge_without(f, verdict, {}, Judge(None), "checks")) is None


# --- promotion --------------------------------------------------------------------------------------------------------


def full(rubric_id: str, phrase: str) -> Rubric:
    forbids = {"kind": "keywords:forbidden_words", "forbidden_words": [phrase]}
    return rubric(
        rubric_id, {"id": "no-words", "description": f"Says {phrase!r}.", "weight": 0.0, "check": forbids, "veto": {}},
        title="Words", family="defence", tags=["lint-allow:no-weight"],
        provenance={"author": "hybrid", "model": "m", "source": "s", "licence": "Apache-2.0"},
    )  # fmt: skip


@given(st.text(min_size=1, max_size=20).filter(lambda t: bool(t.strip())))
def test_yaml_reads_back_equal(phrase: str) -> None:
    from megarubric.rubrics.yaml_reader import documents

    ((data, _),) = documents(as_yaml(full("d.x", phrase)))
    assert parse_rubric(data, "test") == full("d.x", phrase)


@pytest.mark.parametrize("suffix", [".yaml", ".jsonl"])
def test_promotion_into_a_file(tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"corpus{suffix}"
    for made in (full("d.one", "first words here"), full("d.two", "1e5")):
        file, before, after = promotion(made, target)
        write_promotion(file, before, after)
    assert [r.id for r in load_rubrics(target)] == ["d.one", "d.two"] and lint_paths([target]) == ([], 2)
    assert promotion(full("d.two", "1e5"), target)[1:] == (target.read_text(),) * 2
    if suffix == ".jsonl":
        file, before, after = promotion(full("d.two", "other words"), target)
        write_promotion(file, before, after)
        assert [r.version for r in load_rubrics(target)] == [1, 2]
    else:
        with pytest.raises(BadInput, match="replace it by hand"):
            promotion(full("d.two", "other words"), target)


def test_promotion_into_a_directory_and_what_is_not_promoted(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(as_yaml(full("d.old", "old words")))
    for phrase, version in (("some words", 1), ("more words", 2)):
        write_promotion(*promotion(full("d.new", phrase), tmp_path))
        (made,) = load_rubrics(tmp_path / "d.new.yaml")
        assert made.version == version and made.criteria[0].check.params["forbidden_words"] == [phrase]
    with pytest.raises(BadInput, match=r"neither a directory nor"):
        promotion(full("d.new", "x y"), tmp_path / "rubrics.txt")
    untidy = parse_rubric(to_dict(full("d.bad", "x y")) | {"tags": []}, "test")
    file, before, after = promotion(untidy, tmp_path)
    with pytest.raises(BadInput, match="not promoted, lint no-weight"):
        write_promotion(file, before, after)
    assert not file.exists() and json.dumps(sorted(p.name for p in tmp_path.iterdir())) == '["d.new.yaml", "old.yaml"]'
