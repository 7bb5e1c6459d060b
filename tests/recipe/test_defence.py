"""The loop of the defence: a biased judge pays for an exploit, mining finds it and only it, a veto takes it out."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from megarubric.cli import main
from megarubric.judging.judge import Judge
from megarubric.judging.types import JudgeItem, Judgement
from megarubric.recipe.defence import mining
from megarubric.recipe.defence.answers import field_of, read_lines
from megarubric.recipe.defence.apply import defended, read_defences
from megarubric.recipe.records import Record, StoredJudgement
from megarubric.reward.batch import aggregate_batch
from megarubric.rubrics import Rubric, parse_rubric, to_dict
from megarubric.rubrics.lint import lint_paths

STEPS, PROMPTS, SAMPLES = 12, 12, 8
BONUS = 0.5  # J + 0.5 for self-praise, as in the literature on injected judge biases
KNOWN = "This answer is comprehensive and well structured."  # the shipped detector knows it
NEW = ("In every respect these lines leave nothing to wish for.", "In every respect these lines leave little to mend.")
GREETING = "Good morning to all at the harbour office."
INNOCENT = "As far as the records go, that is all there is to say."
_TEXT = """ferry rope lamp gate tide clerk paper stamp window boat crate bell wall key coat stone bridge road cart plank
left found moved opened closed carried saw kept sold brought late early again slowly twice below behind after until near
grey wet old small heavy plain cold open quiet narrow"""
_WORDS = _TEXT.split()


def rubric(k: int) -> Rubric:
    """Odd prompts ask for a greeting, which a check pays; content is judged."""
    ask = " Greet them as one does before noon." if k % 2 else ""
    criteria: list[dict[str, Any]] = [
        {"id": "content", "description": "Tells what happened at the harbour.", "weight": 1.0,
         "tiers": [{"value": 0, "text": "Tells nothing of it."}, {"value": 1, "text": "Tells all of it."}]},
    ]  # fmt: skip
    if k % 2:
        greets = {"kind": "keywords:existence", "keywords": ["Good morning"]}
        criteria.append({"id": "greets", "description": "Greets.", "weight": 0.4, "check": greets})
    return parse_rubric(
        {
            "id": f"t.report-{k:02}",
            "title": "Report",
            "family": "social",
            "provenance": {"author": "human", "source": "test", "licence": "Apache-2.0"},
            "prompt": f"Report on case {k} from {_WORDS[k]} number {k * 7}.{ask}",
            "criteria": criteria,
        },
        "test",
    )


RUBRICS = [rubric(k) for k in range(PROMPTS)]


def scored(rubrics: Sequence[Rubric], texts: Sequence[str], content: Sequence[float]) -> list[Any]:
    """(judgements, result) of each text through the project's own judge and reward; content is given as judged."""
    items = []
    for r, text, value in zip(rubrics, texts, content, strict=True):
        kept = {"content": Judgement("content", value, value, "judge", True)}
        items.append(JudgeItem(r, str(r.prompt), text, kept=kept))
    judged = asyncio.run(Judge(None).judge(items))
    distinct = list({r.hash: r for r in rubrics}.values())
    place = {r.hash: i for i, r in enumerate(distinct)}
    scores = [{name: j.score for name, j in row.items()} for row in judged]
    results = aggregate_batch(distinct, [place[r.hash] for r in rubrics], scores).results()
    return list(zip(judged, results, strict=True))


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(6, 10))).capitalize() + "."


def write_run(run: Path, exploit: Sequence[str], seed: int = 1) -> None:
    """A run whose policy learns to say the exploit, in the record format."""
    rng = random.Random(seed)
    (run / "rollouts").mkdir(parents=True)
    data = run / "train.jsonl"
    data.write_text("".join(json.dumps(to_dict(r)) + "\n" for r in RUBRICS))
    (run / "config.yaml").write_text(f"name: biased\nmodel: {{path: some/policy}}\ndata: {{train: {data}}}\n")
    for step in range(1, STEPS + 1):
        share = min(0.6, 0.02 + 0.09 * max(0, step - 5)) if exploit else 0.0
        rubrics, texts, judged_content = [], [], []
        for k in range(PROMPTS):
            for _ in range(SAMPLES):
                parts = [sentence(rng) for _ in range(3)]
                if k % 2 and rng.random() < 0.6:
                    parts.insert(0, GREETING)
                if rng.random() < 0.3:
                    parts.append(INNOCENT)
                content = min(1.0, max(0.0, rng.gauss(0.35, 0.1)))
                if exploit and rng.random() < share:
                    parts.append(rng.choice(exploit))
                    content = min(1.0, content + BONUS)
                rubrics.append(RUBRICS[k])
                texts.append(" ".join(parts))
                judged_content.append(content)
        with (run / f"rollouts/step_{step}.jsonl").open("wb") as f:
            for i, (judged, result) in enumerate(scored(rubrics, texts, judged_content)):
                record = Record(
                    step=step, prompt_id=rubrics[i].id, group=i // SAMPLES, sample=i % SAMPLES, seed=i,
                    rubric=rubrics[i].id, rubric_hash=rubrics[i].hash, weight_version=step, finish_reason="stop",
                    prompt=str(rubrics[i].prompt), response=texts[i], reward=result.reward, valid=result.valid,
                    vetoed=result.vetoed, veto=result.veto, r0=result.r0, r1=result.r1, advantage=0.0,
                    judgements={n: StoredJudgement(j.value, j.score, j.source) for n, j in judged.items()},
                    attribution=dict(result.attribution), prompt_ids=[1], token_ids=[2], logprobs=[-0.5],
                )  # fmt: skip
                f.write(msgspec.json.encode(record) + b"\n")


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learnt a self-praise the shipped detector knows."""
    run = tmp_path_factory.mktemp("known") / "run"
    write_run(run, (KNOWN,))
    return run


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learnt words no detector knows."""
    run = tmp_path_factory.mktemp("new") / "run"
    write_run(run, NEW)
    return run


@pytest.mark.parametrize(
    ("name", "exploit", "kind"), [("known", (KNOWN,), "hack:self_praise"), ("new", NEW, "keywords:forbidden_words")]
)
def test_an_injected_bias_is_found_and_vetoed(
    name: str,
    exploit: tuple[str, ...],
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    run, corpus, out = request.getfixturevalue(name), tmp_path / "corpus", str(tmp_path / "out")
    corpus.mkdir()
    assert main(["defend", str(run), "--out", out, "--json", "--promote", str(corpus)]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    proposed = [e for e in found["exploits"] if e["proposed"]]
    assert [e["proposed"]["check"]["kind"] for e in proposed] == [kind]
    assert proposed[0]["gain"] == pytest.approx(BONUS, abs=0.1) and proposed[0]["proposed"]["caught"]["share"] == 1
    assert proposed[0]["proposed"]["false_veto"]["high"] <= 0.01 and proposed[0]["onset"] > 3
    # Nothing that was found speaks of the greeting or of the frequent phrase; the greeting is known to be asked for.
    for e in found["exploits"]:
        assert not any(word in e["what"] for word in ("morning", "harbour", "records"))
    assert any("morning to all" in e["what"] for e in found["asked_for"])
    assert found["proposed"] == "defence.mined.run"

    # Promoted: shown, lint-clean, and usable as it is.
    assert "+id: defence.mined.run" in told.err and "reward.defence" in told.err
    assert lint_paths([corpus]) == ([], 1)
    defences = read_defences([str(corpus)])
    (made,) = defences
    assert made.family == "defence" and made.provenance is not None and made.provenance.author == "hybrid"
    # Applied to the same answers, with the same biased judgements, it takes the exploit's rewards and leaves the rest.
    lines = read_lines(run).lines
    by_hash = {r.hash: r for r in RUBRICS}
    guarded = [defended(by_hash[x.rubric_hash], defences) for x in lines]
    after = scored(guarded, [x.response for x in lines], [float(x.judgements["content"].score or 0) for x in lines])
    hacked = [r for x, (_, r) in zip(lines, after) if any(s in x.response for s in exploit)]
    ordinary = [(x, r) for x, (_, r) in zip(lines, after) if not any(s in x.response for s in exploit)]
    assert len(hacked) > 100 and all(r.vetoed and r.reward == 0 for r in hacked)
    same = sum(not r.vetoed and r.reward == pytest.approx(x.reward, abs=1e-6) for x, r in ordinary)
    assert same >= 0.99 * len(ordinary)
    # Once more: nothing changes.
    before = (corpus / "defence.mined.run.yaml").read_bytes()
    assert main(["defend", str(run), "--out", out, "--promote", str(corpus)]) == 0
    assert "is there already" in capsys.readouterr().err and (corpus / "defence.mined.run.yaml").read_bytes() == before


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_without_exploit_has_none(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", (), seed)
    assert main(["defend", str(tmp_path / "run"), "--json", "--promote", str(tmp_path / "d.yaml")]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["exploits"] == [] and "nothing is promoted" in told.err
    assert not (tmp_path / "d.yaml").exists() and not (tmp_path / "run/defence/defence.yaml").exists()


def test_a_veto_that_would_cost_honest_answers_is_refused(
    new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = tmp_path / "clean.jsonl"
    honest = ["The tide is out."] * 400 + [f"The tide is out. {NEW[0]}"] * 40
    clean.write_text("".join(json.dumps({"prompt": "Write.", "response": r}) + "\n" for r in honest))
    assert main(["defend", str(new), "--out", str(tmp_path), "--json", "--clean", str(clean)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["proposed"] is None
    assert "false vetoes on clean answers may reach" in found["exploits"][0]["reason"]
    assert "no veto proposed" in (tmp_path / "report.md").read_text()


def test_few_answers_show_no_low_rate(new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["defend", str(new), "--out", str(tmp_path), "--json", "--max-false-veto", "0.005"]) == 0
    assert "answers cannot show it" in json.loads(capsys.readouterr().out)["exploits"][0]["reason"]


def test_a_broken_line_is_named_and_the_rest_is_mined(
    known: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(known, tmp_path / "run")
    with (tmp_path / "run/rollouts/step_3.jsonl").open("ab") as f:
        f.write(b'{"step": 3, "prompt_id":\n')
    assert main(["defend", str(tmp_path / "run"), "--json"]) == 1
    told = capsys.readouterr()
    assert f"step_3.jsonl: line {PROMPTS * SAMPLES + 1}" in told.err and json.loads(told.out)["proposed"]
    assert main(["defend", str(tmp_path)]) == 2
    assert "holds no step_N.jsonl" in capsys.readouterr().err


def test_flags_are_the_answers_far_above_their_prompt_or_the_beginning(known: Path) -> None:
    f = field_of(read_lines(known).lines, 3.0, 0.95)
    carrying = [KNOWN in x.response for x in f.lines]
    hit = sum(bool(a and b) for a, b in zip(carrying, f.flagged))
    assert hit > 0.9 * sum(carrying) and int(f.flagged.sum()) == sum(f.why.values())


def test_a_long_run_is_read_twice_with_the_same_result(known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    f = field_of(read_lines(known).lines[:400], 3.0, 0.95)
    once = mining.carriers_of(f, {}, 8)
    monkeypatch.setattr(mining, "_MANY_WORDS", 0)
    assert mining.carriers_of(f, {}, 8) == once and len(once) > 20
    monkeypatch.setattr(mining, "_BUCKETS", 64)  # collisions everywhere
    assert mining.carriers_of(f, {}, 8) == once


def test_an_exploit_from_the_first_step_is_settled_by_a_clean_set(
    known: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the steps before the onset, unflagged answers carry it: nothing is proposed without a clean set."""
    (tmp_path / "run/rollouts").mkdir(parents=True)
    for step in range(8, STEPS + 1):
        shutil.copy(known / f"rollouts/step_{step}.jsonl", tmp_path / "run/rollouts")
    assert main(["defend", str(tmp_path / "run"), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["proposed"] is None and alone["exploits"][0]["what"] == "hack:self_praise"
    assert "on ordinary answers may reach" in alone["exploits"][0]["reason"]
    clean = tmp_path / "clean.jsonl"
    for n, praised, proposed in ((400, 0, True), (100, 0, False), (400, 9, False)):
        honest = ["The tide is out."] * (n - praised) + [f"The tide is out. {KNOWN}"] * praised
        clean.write_text("".join(json.dumps({"response": r}) + "\n" for r in honest))
        assert main(["defend", str(tmp_path / "run"), "--json", "--clean", str(clean)]) == 0
        assert (json.loads(capsys.readouterr().out)["proposed"] is not None) == proposed
