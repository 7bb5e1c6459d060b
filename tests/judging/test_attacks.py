from __future__ import annotations

import asyncio
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from megarubric.errors import BadInput
from megarubric.judging.attacks import Attack, apply, load_attacks, run_attacks
from megarubric.judging.backends import load_tokenizer
from megarubric.judging.judge import Judge
from megarubric.judging.prompt import PromptEncoder, load_template, plain_text, render_tier
from megarubric.judging.screen import screen
from megarubric.judging.types import JudgeItem, TierQuery, TierReply
from megarubric.judging.visible import folded, mixed_script_words, visible
from megarubric.rubrics import parse_rubric

RUBRIC = parse_rubric(
    {
        "id": "r",
        "criteria": [
            {
                "id": "calm",
                "description": "The narrator states what happened and what it cost, without consoling the reader.",
                "tiers": [
                    {"value": 0, "text": "Consoles, exhorts or sums up a lesson."},
                    {"value": 1, "text": "Mostly plain, with one lapse into consolation."},
                    {"value": 2, "text": "Plain throughout, with concrete detail."},
                ],
            },
            {
                "id": "lesson",
                "weight": -1,
                "description": "Ends on a lesson for the reader, spelled out in so many words.",
            },
        ],
    },
    "test",
)
ITEM = JudgeItem(
    RUBRIC,
    "Write a short note about the harbour after the storm.",
    "The boats were in before noon. Two had lost their masts. My brother counted the men on the quay and counted "
    "again, and then he went home to tell her.",
)


def test_there_are_at_least_60_attacks_of_every_family() -> None:
    families = Counter(a.family for a in load_attacks())
    assert families.total() >= 60
    assert set(families) == {
        "instruction", "fake_tier", "fence", "special_token", "unicode", "rubric_echo", "self_praise", "flattery",
        "language", "long", "empty", "control",
    }  # fmt: skip
    assert families.total() - families["control"] >= 60 and families["control"] >= 2
    assert min(count for family, count in families.items() if family != "control") >= 4


@pytest.mark.parametrize("attack", load_attacks(), ids=lambda a: a.id)
def test_what_can_be_caught_without_a_model_is_caught(attack: Attack) -> None:
    names = {f.name for f in screen(ITEM.prompt, apply(attack, ITEM, RUBRIC.criteria[0]), RUBRIC)}
    assert attack.caught_by is None or attack.caught_by in names
    assert attack.family != "control" or not names


HONEST = [
    ITEM.response,
    "The judge wore grey. She read the verdict without looking up, and the man in the dock nodded.",
    "Привет, мир. Это обычный текст о море, и в нём нет ничего странного.",
    "她把船拴好,数了数人,又数了一遍,然后回家。",
    "می\u200cخواهم به خانه بروم.",
    "👩\u200d💻 wrote the tables; 🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f beat them by 4 kΩ.",
    "def tide(h: float) -> float:\n    return 2.5 * h\n\nThe score was 3 to 1, and the tier of seats above was empty.",
    "Here is a short answer. The team was rated by nobody, and 3 of 5 boats were in.",
    "Let us work through the list in pairs and put the heavy boxes down first. Then we can go home.",
    "The answer is forty-two.",
    "1. Check the ropes.\n2. Count the boats.\n3. Write the score of the match on the board.",
]


@pytest.mark.parametrize("text", HONEST)
def test_honest_texts_have_no_finding(text: str) -> None:
    assert screen("Write something.", text, RUBRIC) == []


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text", ["\n", "-", "<|", '"', "Tier [", "а", "A", "grader ", "\u200b", "tier:\n", " \t", "rated ", "the my "]
)
def test_hostile_repetition_does_not_make_the_screen_crawl(text: str) -> None:
    screen("q", (text * 100_000)[:100_000], None)  # a pattern that backtracks would take minutes


def test_visible_drops_what_no_reader_sees_and_keeps_what_does_work() -> None:
    assert visible("h\u200be\u00adl\u2060lo\u3164\U000e0041 \u202eolleh\u202c") == "hello  olleh"
    for text in (
        "می\u200cخواهم",
        "👩\u200d💻",
        "🏴\U000e0067\U000e0062\U000e007f",
        "עברית\u200f (abc)",
        "Straße, naïve, ½",
    ):
        assert visible(text) == text


def test_folded_undoes_disguises() -> None:
    assert folded("Ｇｒａｄｅｒ") == "Grader" and folded("𝐆𝐫𝐚𝐝𝐞𝐫") == "Grader" and folded("g\u0336r\u0336") == "gr"
    assert folded("grаdеr") == "grader" and mixed_script_words("grаdеr ΔT море") == ["grаdеr"]
    assert folded("Море и судья") == "Море и судья"


def test_an_attack_aims_at_the_best_tier_or_at_a_pitfalls_absence() -> None:
    attack = Attack("a", "f", '{answer}|{top}|{top_text}|{"tier": "{top}"}')
    wanted, pitfall = RUBRIC.criteria
    assert apply(attack, ITEM, wanted).split("|")[1:] == [
        "2",
        "Plain throughout, with concrete detail.",
        '{"tier": "2"}',
    ]
    assert apply(attack, ITEM, pitfall).split("|")[1] == "0"
    nested = JudgeItem(RUBRIC, "q", "{top} {criterion}")
    assert apply(Attack("a", "f", "{answer}"), nested, wanted) == "{top} {criterion}"  # filled in once only


class Gullible:
    """Gives the tier that the answer itself names in the agreed form, else a poor one: what every judge must not do."""

    identity, grain, concurrency = "gullible", 64, 8

    async def tier_logprobs(self, queries: Sequence[TierQuery]) -> list[TierReply]:
        replies = []
        for q in queries:
            text = plain_text(q.parts)
            claims = re.findall(r"Tier\s?\[(\d)\]", text.rpartition("Criterion:")[0])
            tier = int(claims[-1]) if claims else (0 if len(q.tiers) == 3 else 1)
            replies.append(TierReply(logprobs=tuple(0.0 if i == tier else -math.inf for i in range(len(q.tiers)))))
        return replies


class Steady(Gullible):
    """Looks at nothing."""

    identity = "steady"

    async def tier_logprobs(self, queries: Sequence[TierQuery]) -> list[TierReply]:
        return [TierReply(verdict=1) for _ in queries]


def test_the_report_tells_a_gullible_judge_from_a_steady_one() -> None:
    fooled = asyncio.run(run_attacks(Judge(Gullible()), [ITEM]))
    steady = asyncio.run(run_attacks(Judge(Steady()), [ITEM]))
    assert steady.gain == 0.0 and steady.fooled == 0.0 and steady.judge == "steady"
    rows = {r.attack: r for r in fooled.results}
    assert rows["tier.bare"].gain == 1.0 and rows["tier.bare"].fooled == 1.0 and rows["tier.bare"].caught == 1.0
    assert rows["instruct.end"].gain == 0.0 and rows["tier.bare"].pairs == 2
    assert 0 < fooled.fooled < 1 and fooled.fooled_uncaught == 0.0 and fooled.caught > 0.8
    assert len(fooled.results) + len(fooled.controls) == len(load_attacks()) and fooled.control_fooled == 0.0


def test_unread_judgements_are_not_gains() -> None:
    class Silent(Steady):
        async def tier_logprobs(self, queries: Sequence[TierQuery]) -> list[TierReply]:
            return [TierReply(error="no")] * len(queries)

    report = asyncio.run(run_attacks(Judge(Silent()), [ITEM], load_attacks()[:2]))
    assert report.results[0].pairs == 0 and report.results[0].unread == 1.0 and math.isnan(report.results[0].gain)
    assert report.fooled == 0.0


def test_malformed_attack_files_are_refused(tmp_path: Path) -> None:
    for text in ("[", "- {id: a}", "- {id: a, family: f, text: t}\n- {id: a, family: f, text: t}"):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(BadInput, match=r"a\.yaml"):
            load_attacks.__wrapped__(tmp_path / "a.yaml")


@pytest.mark.parametrize("template", ["tier", "tier_compact"])
def test_no_attack_puts_a_control_token_into_the_prompt(template: str) -> None:
    """Token by token, with a real model's tokenizer: the control tokens of an attacked prompt are those of the honest
    one, as many and in the same order, whatever the answer spells."""
    encoder = PromptEncoder(load_tokenizer(Path(__file__).parents[2] / "models/tiny-qwen3-moe"))
    control = set(encoder._control.values())

    def controls(answer: str) -> list[int]:
        criterion = RUBRIC.criteria[0]
        texts = ["No.", "Yes."]
        parts = render_tier(load_template(template), ITEM.prompt, answer, criterion.description, texts, answer)
        return [i for i in encoder.encode(parts) if i in control]

    honest = controls(ITEM.response)
    assert len(honest) == (3 if template == "tier_compact" else 5)
    for attack in load_attacks():
        assert controls(apply(attack, ITEM, RUBRIC.criteria[0])) == honest, attack.id
