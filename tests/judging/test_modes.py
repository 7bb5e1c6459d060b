from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megarubric.errors import BadInput
from megarubric.judging.backends import model_identity
from megarubric.judging.cache import CachedBackend, JudgeCache
from megarubric.judging.calibration import Calibration, Map
from megarubric.judging.judge import Judge
from megarubric.judging.modes import Due, Way, all_query, reason_query
from megarubric.judging.opening import assembled, replayed, settings_for
from megarubric.judging.parser import parse_all, parse_pair_scores, parse_reasoned, parse_tier, parse_tier_json
from megarubric.judging.prompt import load_template, plain_text
from megarubric.judging.settings import JudgeSettings
from megarubric.judging.types import JudgeItem, Judgement, TextQuery, TextReply, TierQuery, TierReply
from megarubric.rubrics import parse_rubric

RUBRIC = parse_rubric(
    {
        "id": "r",
        "reference": "The model answer.",
        "criteria": [
            {"id": "a", "description": "First.", "tiers": [{"value": v, "text": f"t{v}"} for v in (0, 2, 10)]},
            {"id": "b", "description": "Second.", "needs_reference": True},
        ],
    },
    "test",
)
ITEM = JudgeItem(RUBRIC, "q", "The answer.")


class Writer:
    """Answers tier queries with `tier` and text queries by `write`."""

    identity, grain, concurrency = "writer", 64, 8

    def __init__(self, write: Callable[[TextQuery], str] = lambda q: "", tier: TierReply | None = None) -> None:
        self._write, self._tier = write, tier or TierReply(error="unused")
        self.asked: list[Any] = []

    async def tier_logprobs(self, queries: Sequence[TierQuery]) -> list[TierReply]:
        self.asked += queries
        return [self._tier] * len(queries)

    async def complete(self, queries: Sequence[TextQuery]) -> list[TextReply]:
        self.asked += queries
        return [TextReply(text=self._write(q)) for q in queries]


def judge(
    backend: Any, items: Sequence[JudgeItem] = (ITEM,), second: Any = None, calibration: Any = None, **settings: Any
) -> tuple[list[dict[str, Judgement]], Judge]:
    j = Judge(backend, JudgeSettings(**settings), second=second, calibration=calibration)
    return asyncio.run(j.judge(items)), j


# --- the parser ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tier"),
    [
        ("1", 1),
        ("Tier [2]", 2),
        (" Tier[0].\n", 0),
        ("<think>Tier [2]? No.</think>\nTier [1]", 1),
        ("Tier [3]", None),
        ("tier 2", None),
        ("2 or 1", None),
        ("Yes", None),
        ("The answer is tier [2]", None),
        ("Tier [2] because", None),
        ("<think>Tier [1]", None),
        ("12", None),
        ("", None),
        ("__import__('os')", None),
    ],
)
def test_a_bare_verdict_is_read_only_in_its_form(text: str, tier: int | None) -> None:
    assert parse_tier(text, ("0", "1", "2")) == tier


@pytest.mark.parametrize(
    ("text", "tier"),
    [
        ('It says "no".\n\nTier [0]', 0),
        ("Good.\nTier [2]\n", 2),
        ("Yes, yes, definitely yes.", None),
        ("Tier [2]\nOn reflection it is worse.", None),
        ("Tier [2]\nOn reflection:\nTier [1]", None),
        ("I would say Tier [2]", None),
        ("Tier [9]", None),
        ("", None),
    ],
)
def test_a_reasoned_verdict_is_the_last_line_and_the_only_one(text: str, tier: int | None) -> None:
    assert parse_reasoned(text, ("0", "1", "2")) == tier


def test_one_for_all_lines() -> None:
    tiers = [("0", "1"), ("0", "1", "2"), ("0", "1")]
    assert parse_all("1: Tier [1]\n2: Tier [2]\n3: Tier [0]", tiers) == [1, 2, 0]
    assert parse_all("2: Tier [1]", tiers) == [None, 1, None]
    assert parse_all("1: Tier [1]\n1: Tier [0]\n2: Tier [7]\n3: Yes", tiers) == [None, None, None]
    assert parse_all("1: Tier [1] 2: Tier [2]", tiers) == [None, None, None]
    assert parse_all("", tiers) == [None] * 3


@pytest.mark.parametrize(
    ("text", "tier"),
    [('{"tier": "1"}', 1), ('{"tier": 2}', 2), ('{"tier": true}', None), ('{"tier": "1", "x": 0}', None),
     ('{"tier": "1"', None), ("[1]", None), ('{"tier": [1]}', None), ('{"tier": 1.0}', None)],
)  # fmt: skip
def test_the_json_form(text: str, tier: int | None) -> None:
    assert parse_tier_json(text, ("0", "1", "2")) == tier


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("9 8.5\nBoth are good.", (9, 8.5)),
        ("\n10, 7\n", (10, 7)),
        ("First, I will solve it.\n9 8", None),
        ("9", None),
        ("9 8 7", None),
        ("9/10 8/10", None),
        ("11 3", None),
        ("-1 3", None),
        ("nan 3", None),
        ("", None),
    ],
)
def test_pair_scores_stand_alone_on_the_first_line(text: str, scores: tuple[float, float] | None) -> None:
    assert parse_pair_scores(text) == scores


# --- asking -------------------------------------------------------------------------------------------------------


def test_reasons_then_a_verdict() -> None:
    writer = Writer(lambda q: "It says so.\nTier [1]")
    rows, j = judge(writer, mode="reason")
    assert (rows[0]["a"].value, rows[0]["a"].score, rows[0]["a"].source) == (2, 0.2, "judge")
    assert len(writer.asked) == 2 and j.stats.read == 2 and all(isinstance(q, TextQuery) for q in writer.asked)
    assert plain_text(writer.asked[0].parts).endswith("</think>\n\n")


def test_one_call_for_all_criteria_of_an_answer() -> None:
    writer = Writer(lambda q: "1: Tier [2]\n2: Tier [0]")
    rows, _ = judge(writer, [ITEM, JudgeItem(RUBRIC, "q", "Another.")], mode="all")
    assert [r["a"].value for r in rows] == [10, 10] and [r["b"].value for r in rows] == [0, 0]
    assert len(writer.asked) == 2
    text = plain_text(writer.asked[0].parts)
    assert "1. First.\n   0: t0\n   1: t2\n   2: t10\n2. Second.\n   0: No.\n   1: Yes." in text
    assert "The model answer." in text


def test_the_config_chooses_per_criterion() -> None:
    writer = Writer(lambda q: "Tier [1]", TierReply(logprobs=(math.log(0.5), math.log(0.5))))
    rows, _ = judge(writer, modes={"r/a": "reason"})
    assert rows[0]["a"].value == 2 and rows[0]["b"].value == 0.5
    assert [type(q).__name__ for q in sorted(writer.asked, key=lambda q: type(q).__name__)] == [
        "TextQuery",
        "TierQuery",
    ]


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        ({"a": "reason"}, ("reason", "tier")),
        ({"[ab]": "all", "a": "reason"}, ("all", "all")),  # the first that fits
        ({"a": "reason", "*": "all"}, ("reason", "all")),
        ({"r/*": "all"}, ("all", "all")),
        ({"other/*": "all", "r*/b": "reason"}, ("tier", "reason")),
        ({"*/b": "reason"}, ("tier", "reason")),
        ({"A": "reason"}, ("tier", "tier")),
    ],
)
def test_globs_choose_the_mode(modes: dict[str, Any], expected: tuple[str, str]) -> None:
    settings = JudgeSettings(modes=modes)
    assert tuple(settings.mode_of(RUBRIC, c) for c in RUBRIC.criteria) == expected


def test_a_glob_that_fits_nothing_is_a_slip_of_the_pen() -> None:
    JudgeSettings(modes={"a": "all", "r/b": "reason"}).check_modes([RUBRIC], "run.yaml")
    with pytest.raises(BadInput, match=r"run\.yaml: judge\.modes: 'calm' fits no judged criterion"):
        JudgeSettings(modes={"a": "all", "calm": "reason"}).check_modes([RUBRIC], "run.yaml")


def test_a_template_of_the_other_kind_is_refused() -> None:
    for settings in ({"template": "all"}, {"reason_template": "all"}, {"all_template": "tier"}):
        with pytest.raises(BadInput, match="cannot be the template of mode"):
            Judge(None, JudgeSettings(**settings))


def test_the_median_of_the_draws_counts_and_their_spread_is_kept() -> None:
    verdicts = ["Tier [0]", "Tier [2]", "Tier [1]", "Tier [1]", "no idea"]
    writer = Writer(lambda q: verdicts[q.draw])
    row = judge(writer, mode="reason", draws=5, temperature=1.0, modes={"b": "tier"})[0][0]
    assert row["a"].value == 2  # the median of 0, 2, 2, 10
    assert row["a"].entropy == pytest.approx(1.5 * math.log(2))


def test_a_minority_of_readable_draws_is_no_judgement() -> None:
    verdicts = ["Tier [2]", "hm", "hm", "hm"]
    row = judge(Writer(lambda q: verdicts[q.draw]), mode="reason", draws=4, temperature=1.0)[0][0]
    assert row["a"].value is None and "agreed form" in (row["a"].reason or "")


@pytest.mark.parametrize("settings", [{"draws": 3}, {"draws": 0}, {"retries": -1}, {"timeout_s": 0.0}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        JudgeSettings(**settings)


def test_a_backend_that_cannot_write_is_refused_for_a_mode_that_needs_it() -> None:
    class Mute:
        identity, grain, concurrency = "mute", 1, 1

        async def tier_logprobs(self, queries: Sequence[TierQuery]) -> list[TierReply]:
            return []

    with pytest.raises(BadInput, match="mute: cannot write text"):
        Judge(Mute(), JudgeSettings(mode="reason"))
    Judge(Mute(), JudgeSettings())


UNSURE = TierReply(logprobs=(math.log(0.34), math.log(0.33), math.log(0.33)))
SURE = TierReply(logprobs=(math.log(0.01), math.log(0.01), math.log(0.98)))


@pytest.mark.parametrize(
    ("first", "second", "value", "escalated"),
    [
        (UNSURE, SURE, (0.02 + 9.8), 1),
        (SURE, UNSURE, (0.02 + 9.8), 0),
        (TierReply(error="down"), SURE, (0.02 + 9.8), 1),
        (UNSURE, TierReply(error="down"), (2 * 0.33 + 10 * 0.33), 1),
    ],
)
def test_a_second_judge_is_asked_where_the_first_is_unsure(
    first: TierReply, second: TierReply, value: float, escalated: int
) -> None:
    tiers = [{"value": v, "text": ""} for v in (0, 2, 10)]
    rubric = parse_rubric({"id": "one", "criteria": [{"id": "a", "description": "d", "tiers": tiers}]}, "t")
    other = Writer(tier=second)
    rows, j = judge(Writer(tier=first), [JudgeItem(rubric, "q", "a")], second=other)
    assert rows[0]["a"].value == pytest.approx(value)
    assert j.stats.escalated == escalated == len(other.asked) and j.stats.asked == 1


def test_the_second_judge_is_asked_in_the_modes_that_write_too() -> None:
    split = ["Tier [0]", "Tier [2]", "Tier [1]"]
    first, second = Writer(lambda q: split[q.draw]), Writer(lambda q: "Tier [1]")
    rows, j = judge(first, second=second, mode="reason", draws=3, temperature=1.0, modes={"b": "tier"})
    assert rows[0]["a"].value == 2 and j.stats.escalated == 2  # a: three draws, three tiers; b: unread
    one, two = Writer(lambda q: "1: Tier [2]"), Writer(lambda q: "1: Tier [1]")
    rows, j = judge(one, second=two, mode="all")
    assert rows[0]["a"].value == 10 and rows[0]["b"].value == 1  # only b was unread, and asked about alone
    assert "First." not in plain_text(two.asked[0].parts)


def test_the_second_judge_has_its_own_template_and_no_calibration() -> None:
    halves = Calibration("writer", {"*": Map((0.0, 1.0), (0.0, 0.5), 99)})
    first, second = Writer(tier=TierReply(error="down")), Writer(tier=TierReply(verdict=1))
    rows, _ = judge(first, second=second, calibration=halves, template="tier_compact", second_template="tier")
    assert rows[0]["b"].score == 1.0 and "system" in plain_text(second.asked[0].parts)
    assert "system" not in plain_text(first.asked[0].parts)


def test_calibration_is_applied_to_what_the_judge_says_and_to_nothing_else() -> None:
    calibration = Calibration("writer", {"r/a": Map((0.0, 1.0), (0.0, 0.5), 99)})
    rows, _ = judge(Writer(lambda q: "1: Tier [2]\n2: Tier [1]"), calibration=calibration, mode="all")
    assert (rows[0]["a"].score, rows[0]["a"].value) == (0.5, 5.0) and rows[0]["b"].score == 1.0
    stored, _ = judge(Writer(), [JudgeItem(RUBRIC, "q", "x", {"a": 10, "b": 1})], calibration=calibration)
    assert stored[0]["a"].score == 1.0


def test_texts_are_kept_and_replayed(tmp_path: Path) -> None:
    cache = JudgeCache(tmp_path / "judge.db")
    verdicts = ["Tier [0]", "Tier [1]", "Tier [1]"]
    writer = Writer(lambda q: verdicts[q.draw])
    settings = {"mode": "reason", "draws": 3, "temperature": 0.7}
    first, _ = judge(CachedBackend(writer, cache), **settings)
    asked = len(writer.asked)
    assert judge(CachedBackend(writer, cache), **settings)[0] == first and len(writer.asked) == asked == 6
    assert judge(CachedBackend(None, cache, identity="writer"), **settings)[0] == first
    missing, _ = judge(CachedBackend(None, cache, identity="writer"), mode="reason")
    assert "replay" in (missing[0]["a"].reason or "")
    cache.close()


def test_whose_judgements_a_replay_reads(tmp_path: Path) -> None:
    cache = JudgeCache(tmp_path / "judge.db")
    with pytest.raises(BadInput, match="holds no judgements"):
        replayed(cache, "none")

    def keep(*identities: str) -> None:
        for identity in identities:
            asyncio.run(cache.put(identity, {identity: b"x"}))

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"hidden_size": 8}')
    float32 = model_identity(model, "float32")
    keep(float32)
    assert replayed(cache, "none").identity == float32
    keep("openai:http://h/v1#big", "openai:http://h/v1#small", model_identity(model, "bfloat16"))
    assert replayed(cache, "http://h#small").identity == "openai:http://h/v1#small"
    assert replayed(cache, str(model), "float32").identity == float32 == replayed(cache, float32).identity
    for name in ("none", "http://h", str(model)):
        with pytest.raises(BadInput, match="several judges"):
            replayed(cache, name)
    for name in ("http://other", "http://h#huge", str(tmp_path / "gone")):
        with pytest.raises(BadInput, match="holds none of"):
            replayed(cache, name)
    (model / "config.json").write_text('{"hidden_size": 9}')  # another model under the same name
    with pytest.raises(BadInput, match="holds none of"):
        replayed(cache, str(model), "float32")
    cache.close()


def test_a_calibration_belongs_to_a_judge_and_to_a_way_of_asking(tmp_path: Path) -> None:
    asked = judge(Writer())[1].asked
    Calibration("writer", {}, asked=asked).save(tmp_path / "c.json")
    parts = (Writer(), None)
    assert assembled(*parts, JudgeSettings(), None, tmp_path / "c.json").calibration is not None
    with pytest.raises(BadInput, match="other templates, modes or draws"):
        assembled(*parts, JudgeSettings(template="tier_compact"), None, tmp_path / "c.json")
    Calibration("another", {}, asked=asked).save(tmp_path / "c.json")
    with pytest.raises(BadInput, match="fitted for another, the judge is writer"):
        assembled(*parts, JudgeSettings(), None, tmp_path / "c.json")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"draws": 0}, "at least 1"), ({"draws": 2}, "mode tier"), ({"temperature": -1.0}, "negative"),
     ({"mode": "reason", "draws": 2, "temperature": 0.0}, "one draw"), ({"timeout_s": 0.0}, "above 0")],
)  # fmt: skip
def test_options_that_cannot_be(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        settings_for("none", None, **changes)


def test_options_name_the_template_of_their_mode() -> None:
    chosen = settings_for("none", "mine.txt", "all", 3)
    assert (chosen.all_template, chosen.template, chosen.temperature) == ("mine.txt", "tier", 0.7)
    assert settings_for("none", "tier_compact").template == "tier_compact"


def test_queries_of_different_modes_have_different_names() -> None:
    due = Due(0, ITEM, RUBRIC.criteria[0])
    template = load_template("reason")
    names = {
        reason_query(template, due, Way(), 10, 0.0).content,
        reason_query(template, due, Way(highest_first=True), 10, 0.0).content,
        reason_query(load_template("tier"), due, Way(), 10, 0.0).content,
        all_query(load_template("all"), [due], Way(), 10, 0.0).content,
    }
    assert len(names) == 4
