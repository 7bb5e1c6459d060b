"""`megarubric filter` with real engines and the shipped tiny model: what it writes, and that it asks nothing twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megarubric.config import load_train
from megarubric.errors import BadInput
from megarubric.launch.filter import _write_rows, run_filter
from megarubric.recipe.scoring import ScoreFile, ScoreRow
from megarubric.rollout.data import read_prompts

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/quickstart.yaml"


def words(runs: Path, *more: str) -> list[str]:
    return [
        f"runs_dir={runs}", "name=f", "filter.limit=6", "filter.samples_per_prompt=3", "rollout.max_new_tokens=32",
        f"judge.cache={runs}/judge.sqlite", *more,
    ]  # fmt: skip


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def go(runs: Path, *more: str) -> int:
    return run_filter(str(CONFIG), words(runs, *more), fresh=False, retry_unscored=False, as_json=True)


@pytest.mark.engine
def test_filter_and_go_on_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert go(tmp_path) == 0
    summary = json.loads(capfd.readouterr().out)
    out = tmp_path / "f/filter"
    scores, dropped = rows(out / "scores.jsonl"), rows(out / "dropped.jsonl")
    kept = read_prompts(out / "kept.jsonl")
    source = {row.id: row for row in read_prompts(ROOT / "rubrics/quickstart/train.jsonl")}
    assert [r["id"] for r in scores] == list(source)[:6]
    assert {r.id for r in kept} == {r["id"] for r in scores if r["kept"]} and summary["kept"] == len(kept)
    assert {r["id"] for r in dropped} == {r["id"] for r in scores if not r["kept"]}
    assert all(r == source[r.id] for r in kept)
    low, high = (summary["bounds"]["all"][end] for end in ("low", "high"))
    for r in scores:
        assert len(r["rewards"]) == 3 and r["score"] == pytest.approx(sum(r["rewards"]) / 3)
        assert r["kept"] == (low <= r["score"] <= high and r["std"] >= 0.01)
    # As a kill -9 leaves it: some lines and a part of one. The rest is asked, and comes out the same.
    whole = (out / "scores.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (out / "scores.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:40])
    assert go(tmp_path) == 0
    assert "2 of 6 prompts are scored already" in capfd.readouterr().err
    again = rows(out / "scores.jsonl")
    assert again[:2] == scores[:2] and [r["id"] for r in again] == [r["id"] for r in scores]
    assert again == scores
    # Other bounds are other decisions about the same scores: nothing is started for them.
    assert go(tmp_path, "filter.low=0", "filter.high=1", "filter.min_std=0") == 0
    told = capfd.readouterr()
    assert "answers to each of" not in told.err and json.loads(told.out)["kept"] == 6


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("filter.samples_per_prompt=1", "filter.samples_per_prompt: a spread needs at least 2"),
        ("filter.low=0.9", "filter.low: needs 0 <= low < high <= 1"),
        ("filter.high=1.1", "filter.low: needs 0 <= low < high <= 1"),
        ("filter.min_std=-1", "filter.min_std: must not be negative"),
        ("filter.limit=0", "filter.limit: must be above 0"),
        ("filter.by=rubric", "filter.by"),
        ("filter.quantile=0.5", "filter.quantile: unknown key"),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused(override: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_train(CONFIG, [override])
    assert said in str(caught.value)


CRITERION = {"id": "plain", "description": "Plain.", "weight": 1.0}


def test_kept_rows_are_the_rows_of_the_file(tmp_path: Path) -> None:
    """Prompt rows keep their line, by-id rubrics included; rubrics that stand in YAML become lines."""
    corpus = tmp_path / "corpus.yaml"
    corpus.write_text("- id: t.shared\n  criteria: [{id: plain, description: Plain.}]\n")
    lines = tmp_path / "prompts.jsonl"
    made = [{"id": f"p{i}", "prompt": f"Say {i}.", "rubric": "t.shared"} for i in range(3)]
    made.append({"id": "p3", "messages": [{"role": "user", "content": "Say 3."}],
                 "rubric": {"id": "t.own", "criteria": [CRITERION]}})  # fmt: skip
    lines.write_text("\n".join(json.dumps(row) for row in made) + "\n")
    found = read_prompts(lines, [corpus])
    _write_rows(tmp_path / "kept.jsonl", lines, found[1:])
    assert read_prompts(tmp_path / "kept.jsonl", [corpus]) == found[1:]
    assert (tmp_path / "kept.jsonl").read_text().splitlines() == lines.read_text().splitlines()[1:]

    instance = tmp_path / "instance.yaml"
    instance.write_text("- id: t.one\n  prompt: Say one.\n  criteria: [{id: plain, description: Plain.}]\n")
    _write_rows(tmp_path / "kept_too.jsonl", instance, read_prompts(instance))
    assert read_prompts(tmp_path / "kept_too.jsonl") == read_prompts(instance)


def test_the_score_file_forgets_what_is_torn_or_stale(tmp_path: Path) -> None:
    path, keys = tmp_path / "scores.jsonl", {"a": "1", "b": "1", "c": "1"}

    def row(name: str, key: str, *rewards: float | None) -> ScoreRow:
        return ScoreRow(id=name, key=key, rubric=name, rubric_hash="h", rewards=rewards)

    first = ScoreFile(path, keys)
    for made in (row("a", "1", 0.5, None), row("b", "1", None, None), row("c", "0", 0.5, 0.5)):
        first.put(made)
    first.close()
    path.write_bytes(path.read_bytes() + b'{"id":"d","key"')
    again = ScoreFile(path, keys)
    assert (sorted(again.rows), again.stale) == (["a", "b"], 1) and again.rows["a"].rewards == (0.5, None)
    again.close()
    retried = ScoreFile(path, keys, forget_unscored=True)
    assert (sorted(retried.rows), retried.stale) == (["a"], 1)
    retried.close()
    path.write_bytes(b'{"id": 7}\n' + path.read_bytes())
    with pytest.raises(BadInput, match="line 1"):
        ScoreFile(path, keys)
