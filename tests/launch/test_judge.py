"""The `judge` section against the files it names, before any process starts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from megarubric.config import load_train
from megarubric.errors import BadInput
from megarubric.judging.backends import model_identity
from megarubric.judging.cache import JudgeCache
from megarubric.judging.calibration import Calibration
from megarubric.launch.judge import check_judge, engines_of, judge_use, second_index
from megarubric.rubrics import parse_rubric

RUBRIC = parse_rubric({"id": "r", "criteria": [{"id": "calm", "description": "Calm."}]}, "test")
MODEL = Path(__file__).parents[2] / "models/tiny-qwen3-moe"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"name: t\nmodel: {{path: {MODEL}}}\ndata: {{train: d.jsonl}}\n")
    identity = model_identity(MODEL, "float32")
    Calibration(identity, {}).save(tmp_path / "own.json")
    Calibration("another", {}).save(tmp_path / "other.json")
    (tmp_path / "half.json").write_text("{")
    (tmp_path / "mine.txt").write_text("{{question}}")
    for name, judges in (("one.db", [identity]), ("empty.db", [])):
        cache = JudgeCache(tmp_path / name)
        for judge in judges:
            asyncio.run(cache.put(judge, {judge: b"x"}))
        cache.close()
    return path


def check(config: Path, overrides: Sequence[str]) -> None:
    here = [o.replace("@", f"{config.parent}/") for o in overrides]
    check_judge(load_train(config, here), config, [RUBRIC])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["judge.kind=none"],
        ["judge.calibration=@own.json"],
        ["judge.kind=url", "judge.url=http://h", "judge.second=http://g#m", "judge.calibration=@other.json"],
        ["judge.cache=@one.db", "judge.replay_only=true"],
        ["judge.modes={'r/*': reason}"],
        ["rollout.replay=x", "judge.template=gone"],  # nobody is asked
    ],
)
def test_what_can_be(config: Path, overrides: list[str]) -> None:
    check(config, overrides)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["judge.template=gone"], "gone: cannot be read; known templates"),
        (["judge.template=@mine.txt"], "missing"),
        (["judge.all_template=tier"], "cannot be the template of mode all"),
        (["judge.modes={clam: reason}"], "'clam' fits no judged criterion"),
        (["judge.model=@gone"], "judge.model is not a Hugging Face directory"),
        (["judge.second=@gone"], "judge.second is not a Hugging Face directory"),
        (["judge.calibration=@gone.json"], "gone.json: cannot be used as a calibration"),
        (["judge.calibration=@half.json"], "half.json: cannot be used as a calibration"),
        (["judge.calibration=@other.json"], "fitted for another"),
        (["judge.cache=@gone.db", "judge.replay_only=true"], "gone.db: no such file"),
        (["judge.cache=@run.yaml"], "run.yaml: cannot be used as a judgement cache"),
        (["judge.cache=@empty.db", "judge.replay_only=true"], "holds no judgements"),
        (["judge.cache=@one.db", "judge.replay_only=true", "model.dtype=bfloat16"], "holds none of"),
    ],
)
def test_what_cannot_be_is_a_sentence(config: Path, overrides: list[str], reason: str) -> None:
    with pytest.raises(BadInput, match=reason) as caught:
        check(config, overrides)
    assert "\n" not in str(caught.value)
    assert not (config.parent / "gone.db").exists()


@pytest.mark.parametrize(
    ("overrides", "engines"),
    [
        ([], ["judge"]),
        (["judge.second=m"], ["judge", "second-judge"]),
        (["judge.second=http://h"], ["judge"]),
        (["judge.engines=3", "judge.second=m"], ["judge-0", "judge-1", "judge-2", "second-judge"]),
        (["judge.kind=policy", "judge.second=m"], ["second-judge"]),
        (["judge.kind=url", "judge.url=http://h"], []),
        (["judge.cache=j.db", "judge.replay_only=true"], []),
        (["rollout.replay=x"], []),
    ],
)
def test_the_engines_a_judge_starts(config: Path, overrides: list[str], engines: list[str]) -> None:
    assert engines_of(load_train(config, overrides)) == engines


@pytest.mark.parametrize(
    ("overrides", "index"),
    [
        (["judge.engines=2"], 2),
        (["judge.engines=4"], 0),  # no GPU is left: it shares those of the first
        (["parallel.nodes=2", "judge.engines=3"], 3),
        (["parallel.nodes=2", "judge.engines=2", "judge.tensor_parallel=3"], 0),  # two are left, but on two hosts
        (["judge.kind=policy"], 0),
    ],
)
def test_a_second_judge_has_gpus_of_its_own_if_any_are_left(config: Path, overrides: list[str], index: int) -> None:
    gpus = ["parallel.card=h100", "parallel.ranks=8", "judge.tensor_parallel=2", "judge.second=m"]
    assert second_index(load_train(config, [*gpus, *overrides])) == index


def test_judge_engines_that_cannot_be(config: Path) -> None:
    gpus = ["parallel.card=h100", "parallel.ranks=8", "judge.tensor_parallel=4"]
    for overrides, words in (
        ([*gpus, "judge.engines=3"], "judge.engines: 3 on 4 GPUs each, but parallel.nodes 1 of 8 have room for 2"),
        (
            [*gpus, "parallel.nodes=2", "judge.tensor_parallel=8"],
            "judge.engines: 1 on 8 GPUs each, but parallel.nodes 2 of 4 have room for 0",
        ),
        (["judge.engines=0"], "judge.engines: must be above 0"),
        (["judge.engines=2", "judge.kind=policy"], "judge.engines: given, but judge.kind is policy"),
    ):
        with pytest.raises(BadInput, match=words):
            load_train(config, overrides)


def test_a_verb_uses_the_same_judge(config: Path) -> None:
    c = load_train(config, ["judge.kind=url", "judge.url=http://h", "judge.url_model=m", "judge.mode=all"])

    def factory(directory: Path, device: str):  # type: ignore[no-untyped-def]
        raise AssertionError

    use = judge_use(c, None, factory)
    assert (use.judge, use.settings and use.settings.mode, use.dtype) == ("http://h#m", "all", "float32")
    assert judge_use(c, "other", factory).judge == "other"
