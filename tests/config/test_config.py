"""Configuration: what parses, what is refused, and with which sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megarubric.config import dump, load_sft, load_train
from megarubric.errors import BadInput

MINIMAL = "name: t\nmodel: {path: m}\ndata: {train: d.jsonl}\n"


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_and_overrides(minimal: Path) -> None:
    config = load_train(minimal, ["train.lr=1e-5", "rollout.samples_per_prompt=4", "judge.kind=none", "seed=7"])
    assert (config.train.lr, config.rollout.samples_per_prompt, config.judge.kind, config.seed) == (1e-5, 4, "none", 7)
    assert config.algorithm.name == "grpo"


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_generator_takes(minimal: Path, seed: int) -> None:
    with pytest.raises(BadInput, match="seed: must lie between 0 and"):
        load_train(minimal, [f"seed={seed}"])


def test_a_time_of_day_is_no_number_of_minutes(minimal: Path) -> None:
    with pytest.raises(BadInput, match=r"slurm\.minutes: expected `int`, got `str`$"):
        load_train(minimal, ["slurm.minutes=12:00:00"])
    assert yaml.safe_load("12:00:00") == 43200  # nobody else's loader is changed


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"name: \xfe")
    with pytest.raises(BadInput, match=r"binary\.yaml: is not UTF-8 text \(byte 6\)$"):
        load_train(tmp_path / "binary.yaml", [])
    with pytest.raises(BadInput, match=r"cannot be read: Is a directory$"):
        load_train(tmp_path, [])


JUDGE_REFUSALS = [
    ("kind: none, cache: j.db", "judge.cache: given, but judge.kind is none"),
    ("kind: none, second: m", "judge.second: given, but judge.kind is none"),
    ("kind: url, url: 'localhost:80'", "judge.url: localhost:80 does not start with http"),
    ("kind: url, url: 'http://h', model: m", "judge.model: given, but judge.kind is url"),
    ("mode: essay", "judge.mode: invalid enum value"),
    ("modes: {calm: essay}", "judge.modes"),
    ("draws: 3, temperature: 1", "judge.draws: 3, but no criterion is asked in a mode that writes"),
    ("draws: 3, mode: reason", "judge.temperature: 3 draws at temperature 0 are one draw"),
    ("draws: 3, modes: {calm: reason}", "judge.temperature: 3 draws"),
    ("draws: 0", "judge.draws: must be above 0"),
    ("mode: all, max_tokens: 1024", "judge.max_tokens: 1024 leave no room for the prompt"),
    ("temperature: -1", "judge.temperature: must not be negative"),
    ("retries: -1", "judge.retries: must not be negative"),
    ("escalate_above: 1.5", "judge.escalate_above: must be in [0, 1]"),
    ("second_template: tier", "judge.second_template: given, but judge.second names no second judge"),
    ("replay_only: true", "judge.replay_only: needs judge.cache"),
    ("kind: policy, replay_only: true, cache: j.db", "judge.replay_only: judge.kind is policy"),
    ("kind: policy, calibration: c.json", "judge.calibration: fitted for one judge"),
    ("max_requests: 9", "judge.max_requests: given, but judge.kind is frozen"),
]


@pytest.mark.parametrize(("section", "words"), JUDGE_REFUSALS)
def test_a_judge_that_cannot_be_is_refused_in_a_sentence(minimal: Path, section: str, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_train(minimal, [f"judge={{{section}}}"])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_judge_with_everything(minimal: Path) -> None:
    section = (
        "kind: url, url: 'http://h/v1', modes: {'no-*': tier, 'r.*/calm': reason}, mode: all, draws: 3, "
        "temperature: 0.7, second: m, "
        "second_template: tier_compact, calibration: c.json, cache: j.db, max_requests: 9, escalate_above: 1"
    )
    judge = load_train(minimal, [f"judge={{{section}}}"]).judge
    assert list(judge.modes.items()) == [("no-*", "tier"), ("r.*/calm", "reason")] and judge.draws == 3


def test_dump_reads_back_equal(minimal: Path, tmp_path: Path) -> None:
    config = load_train(minimal, ["train.lr=3e-4"])
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert load_train(again) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rolout.engines=1", "rolout: unknown key; did you mean rollout?"),
        ("rollout.engine=1", "rollout.engine: unknown key; did you mean engines?"),
        ("rollout.engines=two", "rollout.engines: expected `int`"),
        ("rollout.samples_per_prompt=1", "at least 2 samples"),
        ("rollout.top_p=1.5", "rollout.top_p"),
        ("rollout.dynamic_rounds=0", "rollout.dynamic_rounds: must be above 0"),
        ("rollout.oversample=0.5", "rollout.oversample: must be from 1 (off) to 4, is 0.5"),
        ("rollout.oversample=5", "rollout.oversample: must be from 1 (off) to 4, is 5"),
        ("rollout.max_staleness=-1", "rollout.max_staleness: must not be negative"),
        ("rollout={replay: r, dynamic_rounds: 2}", "rollout.dynamic_rounds: rollout.replay draws no prompts"),
        ("rollout={replay: r, oversample: 1.5}", "rollout.oversample: rollout.replay writes no answers"),
        ("parallel.tp=3", "parallel.tp * cp * pp: 1 ranks cannot be divided by tp 3 * cp 1 * pp 1 = 3"),
        ("parallel.ep=2", "1 ranks cannot be divided by etp 1 * ep 2 * pp 1 = 2"),
        ("parallel={ranks: 2, pp: 2, vpp: 2}", "parallel.vpp: interleaving needs pp of at least 3, not 2"),
        ("parallel.cp=0", "parallel.cp: must be at least 1, not 0"),
        ("train.steps=0", "train.steps: must be above 0"),
        ("train.warmup_steps=99", "train.warmup_steps"),
        ("judge.kind=url", "judge.url"),
        ("judge.url=http://h", "judge.url: given, but judge.kind is frozen"),
        ("algorithm.updates_per_step=3", "does not divide"),
        ("algorithm.reject_above=0.9", "reject_above above 1"),
        ("algorithm.kl_coef=-1", "algorithm.kl_coef: must not be negative"),
        ("train.lr=.nan", "train.lr: nan is not a finite number"),
        ("rollout.temperature=.inf", "rollout.temperature: inf is not a finite number"),
        ("exchange.through=gpu", "exchange.through"),
        ("exchange={through: device, delta: true}", "exchange.delta: needs exchange.through host"),
        ("name=a/b", "is not a run name"),
        ("train", "section.key=value"),
        ("train.lr.x=1", "train.lr"),
    ],
)
def test_refused_in_one_line(minimal: Path, override: str, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_train(minimal, [*(["train.lr=0.1"] if override == "train.lr.x=1" else []), override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_older_weights_need_a_correction(minimal: Path) -> None:
    with pytest.raises(BadInput, match=r"rollout\.oversample: older weights .* algorithm\.tis_cap must correct"):
        load_train(minimal, ["rollout.oversample=1.25", "algorithm.tis_cap=0"])
    config = load_train(minimal, ["rollout={oversample: 1.25, dynamic_rounds: 3}", "judge.kind=policy"])
    assert (config.rollout.oversample, config.rollout.dynamic_rounds, config.rollout.max_staleness) == (1.25, 3, 4)


def test_device_buffers_need_a_rank_on_every_gpu_of_an_engine(minimal: Path) -> None:
    with pytest.raises(BadInput, match="policy engines use 2 GPUs of a host and 1 have a trainer rank"):
        load_train(minimal, ["exchange.through=device", "rollout.tensor_parallel=2"])
    two_hosts = ["exchange.through=device", "rollout.engines=4", "parallel={ranks: 4, nodes: 2, ep: 2}"]
    assert load_train(minimal, two_hosts).policy_gpus_per_node == 2


@pytest.mark.parametrize("text", ["", "- a\n", "name: [\n", "name: t\n", "\x00"])
def test_bad_files_name_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"bad\.yaml"):
        load_train(path)
    with pytest.raises(BadInput, match=r"bad\.yaml"):
        load_sft(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        load_train(tmp_path / "none.yaml")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.dictionaries(st.text(), x)))
def test_any_yaml_is_a_config_or_bad_input(tmp_path_factory: pytest.TempPathFactory, tree: object) -> None:
    path = tmp_path_factory.mktemp("any") / "c.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(BadInput):
        load_train(path)
