"""The tiny model's generator, tokenizer and rubrics, and the committed files against what the generator makes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarubric.rubrics import load_rubrics, parse_rubric
from tools.tiny_model import make
from tools.tiny_model.judging import CRITERIA, draw_question
from tools.tiny_model.rubrics import quickstart_rubrics
from tools.tiny_model.texts import draw_value, load
from tools.tiny_model.writer import (
    MAX_WORDS,
    MIN_WORDS,
    SENTENCE_FAULTS,
    draw_faults,
    draw_request,
    names,
    word_count,
    write,
)

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "tiny-qwen3-moe"
FAMILIES = [family["id"] for family in load("families")]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_faultless_answer_names_both_details_within_bounds(family: str) -> None:
    rng = Random(family)
    for _ in range(50):
        request = draw_request(rng, family=family)
        text = write(request, frozenset(), rng).text
        assert MIN_WORDS <= word_count(text) <= MAX_WORDS
        for slot in request.details:
            assert names(text, request.slots[slot]), (text, request.slots[slot])
        assert "{" not in text


@pytest.mark.parametrize("family", FAMILIES)
def test_length_and_omission_faults_show_in_the_text(family: str) -> None:
    rng = Random(family)
    for _ in range(20):
        request = draw_request(rng, family=family)
        assert word_count(write(request, frozenset({"short"}), rng).text) < MIN_WORDS
        assert word_count(write(request, frozenset({"long"}), rng).text) > MAX_WORDS
        for i, slot in enumerate(request.details):
            assert not names(write(request, frozenset({f"omit_{i}"}), rng).text, request.slots[slot])


def test_sentence_faults_add_one_sentence_each() -> None:
    rng = Random(1)
    for _ in range(100):
        request = draw_request(rng)
        for fault in SENTENCE_FAULTS:
            seed = rng.random()
            plain = write(request, frozenset(), Random(seed)).text
            faulty = write(request, frozenset({fault}), Random(seed)).text
            assert len(faulty) > len(plain)
            assert all(sentence in faulty for sentence in re.split(r"(?<=[.!?]) ", plain))


def test_faults_are_independent_of_the_request() -> None:
    rng = Random(2)
    drawn = [draw_faults(rng) for _ in range(4000)]
    both = sum({"flattery", "self_praise"} <= faults for faults in drawn) / len(drawn)
    each = [sum(name in faults for faults in drawn) / len(drawn) for name in ("flattery", "self_praise")]
    assert both == pytest.approx(each[0] * each[1], abs=0.03)


def test_held_out_values_are_not_in_training_draws() -> None:
    rng = Random(3)
    for kind, spec in load("slots").items():
        train = {draw_value(kind, rng) for _ in range(1500)}
        if "join" in spec:
            assert train.isdisjoint({draw_value(kind, rng, held_out=True) for _ in range(300)})
        assert train.isdisjoint(spec.get("held_out", []))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_judge_questions_have_labels_of_every_tier(criterion: str) -> None:
    rng = Random(criterion)
    questions = [draw_question(rng, criterion) for _ in range(200)]
    for label in range(3 if criterion == "names_both" else 2):
        assert sum(q.label == label for q in questions) > 25
    assert all(0 <= q.label < len(q.tiers) for q in questions)


def test_rows_are_deterministic() -> None:
    assert make.training_rows(20, 20, 20, 20) == make.training_rows(20, 20, 20, 20)
    assert make.training_rows(20, 20, 20, 20) != make.training_rows(20, 20, 20, 20, seed=1)


@pytest.mark.parametrize(("part", "n"), [("train", 200), ("heldout", 40)])
def test_committed_rubrics_are_valid_and_remade(part: str, n: int) -> None:
    path = ROOT / "rubrics" / "quickstart" / f"{part}.jsonl"
    assert len(load_rubrics(path)) == n
    remade = quickstart_rubrics(n, make.SEED, held_out=part == "heldout")
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == remade


def test_train_and_held_out_prompts_differ() -> None:
    train = {rubric["prompt"] for rubric in quickstart_rubrics(200, make.SEED, held_out=False)}
    assert train.isdisjoint(rubric["prompt"] for rubric in quickstart_rubrics(40, make.SEED, held_out=True))


def test_a_quarter_of_the_weight_rewards_absence() -> None:
    rubric = parse_rubric(quickstart_rubrics(1, 0, held_out=False)[0], "made")
    absence = {"on-subject", "no-moral", "length"}
    weights = {c.id: c.weight for c in rubric.criteria}
    weights |= {f"{pair.a}*{pair.b}": pair.weight for pair in rubric.pairs}
    kept = sum(weight for name, weight in weights.items() if set(name.split("*")) <= absence)
    assert kept >= 0.25 * sum(weights.values())
    assert sum(criterion.veto is not None for criterion in rubric.criteria) == 4


@given(st.text())
def test_every_text_round_trips(text: str) -> None:
    backend = _backend()
    assert backend.decode(backend.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def _backend():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def test_digits_and_control_tokens_are_single(tokenizer) -> None:
    for digit in "0123456789":
        assert tokenizer.tokenize(f"a{digit}{digit} {digit}").count(digit) == 3
    assert tokenizer.tokenize("<|im_start|>user") == ["<|im_start|>", "user"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer) == json.loads((MODEL / "config.json").read_text())["vocab_size"]


def test_chat_template_is_qwens(tokenizer) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nGood day.<|im_end|>\n"
    text = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_committed_tokenizer_is_remade(tmp_path: Path) -> None:
    tokenizer = make.build_tokenizer(make.tokenizer_texts(), make.VOCAB_SIZE)
    make.save_tokenizer(tokenizer, tmp_path, make.CONFIG["max_position_embeddings"])
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (MODEL / name).read_text()
