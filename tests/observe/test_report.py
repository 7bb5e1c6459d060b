"""The report of runs that ended, go on, or are broken: read, drawn, escaped, bounded."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megarubric.cli import main
from megarubric.errors import BadInput
from megarubric.observe.report.model import build, fold
from megarubric.observe.report.page import page
from megarubric.observe.report.samples import ANSWERS, STEPS, opening, scan, spread
from megarubric.observe.report.signals import signals, sudden_rises
from megarubric.observe.report.source import Series, read_run
from megarubric.observe.report.svg import POINTS, Line, bars, lines, number, stacked, thin, ticks

VOID = {"meta", "br", "link", "img", "input", "hr"}
HOSTILE = '</div><script>alert(1)</script> & "x" \x00\x1b <img src=http://example.org/a onerror=alert(1)>'


class Checked(HTMLParser):
    """Every element closed where it was opened; no script, nothing from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        names = {name for name, _ in attrs}
        assert not any(n.startswith("on") for n in names), attrs
        for name, value in attrs:
            if name in ("src", "href", "action", "data"):
                assert (value or "").startswith("#"), (tag, name, value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(html: str) -> Checked:
    found = Checked()
    found.feed(html)
    found.close()
    assert found.open == []
    assert "script" not in found.seen and "img" not in found.seen
    for drawing in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(drawing)
    return found


def record(step: int, sample: int, reward: float | None, **more: object) -> dict[str, object]:
    row: dict[str, object] = {
        "step": step, "prompt_id": f"p{sample % 3}", "group": sample % 3, "sample": sample, "seed": 1, "rubric": "r",
        "rubric_hash": "h", "weight_version": step - 1, "finish_reason": "stop", "prompt": "Say something short.",
        "response": f"Here is what I say number {sample}.", "reward": reward, "valid": reward is not None,
        "vetoed": False, "veto": None, "r0": reward, "r1": reward, "advantage": 0.1,
        "judgements": {"good": {"value": reward, "score": reward, "source": "judge", "entropy": 0.25}},
        "attribution": {"good": reward or 0.0}, "prompt_ids": [1], "token_ids": [1], "logprobs": [0.0],
    }  # fmt: skip
    return row | more


def write(run: Path, steps: int, per_step: int = 6, **more: object) -> None:
    (run / "rollouts").mkdir(parents=True)
    (run / "config.yaml").write_text("name: tried\nseed: 7\ntrain: {steps: 9, lr: 0.1}\n")
    with (run / "metrics.jsonl").open("w") as f:
        for step in range(1, steps + 1):
            row = {"step": step, "reward/mean": step / steps, "reward/std": 0.1, "veto/rate": 0.2, "veto/good": 0.2}
            row |= {"criterion/good/mean": 0.5, "train/kl": 0.0, "perf/rollout_s": 1.0, "perf/judge_s": 2.0}
            f.write(json.dumps(row) + "\n")
    for step in range(1, steps + 1):
        rows = [record(step, i, i / per_step, **more) for i in range(per_step)]
        (run / "rollouts" / f"step_{step}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def html_of(run: Path) -> str:
    source = read_run(run)
    return page(build(source, scan(source.rollout_files)))


def test_the_verb_writes_one_whole_page_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "run", 4)
    out = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "run"), "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["name"] == "tried" and said["out"] == str(out)
    assert [s["name"] for s in said["signals"]] and all(
        s["state"] in ("seen", "clear", "unknown") for s in said["signals"]
    )
    html = out.read_text()
    checked(html)
    for wanted in ("tried", "Step time, seconds", "Most changed", "good", "step 4", "4 of 9", "+0.833"):
        assert wanted in html, wanted
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").exists()


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    judged = {f"c{HOSTILE}": {"value": 0.5, "score": 0.5, "source": "judge", "reason": HOSTILE}}
    write(tmp_path / "run", 2, response=HOSTILE, prompt=HOSTILE, prompt_id=HOSTILE, judgements=judged,
          attribution={f"c{HOSTILE}": 0.4}, vetoed=True, veto=HOSTILE)  # fmt: skip
    with (tmp_path / "run" / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"step": 3, f"criterion/{HOSTILE}/mean": 0.5, f"veto/{HOSTILE}": 0.5}) + "\n")
    (tmp_path / "run" / "config.yaml").write_text(json.dumps({"name": HOSTILE, "model": {"path": HOSTILE}}))
    html = html_of(tmp_path / "run")
    checked(html)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "<script" not in html


def test_a_run_under_way_has_a_torn_last_line(tmp_path: Path) -> None:
    write(tmp_path / "run", 3)
    for name in ("metrics.jsonl", "rollouts/step_3.jsonl"):
        file = tmp_path / "run" / name
        file.write_text(file.read_text()[:-20])
    source = read_run(tmp_path / "run")
    assert source.metrics["reward/mean"].steps.tolist() == [1.0, 2.0]
    samples = scan(source.rollout_files)
    assert samples.answers == 17
    report = build(source, samples)
    assert any("metrics.jsonl: 1 line" in n for n in report.notes) and any(
        "step_3.jsonl: 1 line" in n for n in report.notes
    )
    checked(page(report))


@pytest.mark.parametrize("gone", ["config.yaml", "metrics.jsonl", "rollouts"])
def test_a_missing_piece_is_named_and_the_rest_is_there(tmp_path: Path, gone: str) -> None:
    write(tmp_path / "run", 3)
    (tmp_path / "run" / gone).rename(tmp_path / "elsewhere")
    html = html_of(tmp_path / "run")
    checked(html)
    assert gone in html.partition("What is missing")[2].partition("</section>")[0]


def test_evaluations_and_a_supervised_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run, 2)
    summary = {"answers": 6, "reward": 0.625, "valid_fraction": 1.0, "veto_rate": 0.5, "unread_fraction": 0, "words": 9}
    (run / "eval-late.json").write_text(json.dumps(summary | {"criteria": {}}))
    (run / "eval.json").write_text("[]")
    other = {"answers": 6, "reward": 0.5, "valid_fraction": 1.0, "veto_rate": 0.0, "unread_fraction": 0.0, "words": 9.0}
    both = {"before": other | {"criteria": {}}, "after": summary | {"criteria": {}}}
    (run / "heldout.json").write_text(json.dumps(both))
    html = html_of(run)
    checked(html)
    assert "eval-late.json" in html and "eval.json is not an evaluation" in html and "+0.125" in html
    plain = tmp_path / "sft"
    plain.mkdir()
    (plain / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5}\n{"step": 2, "train/loss": 1.5}\n')
    html = html_of(plain)
    checked(html)
    assert "Supervised cold start" in html and "1.500" in html and "rollouts/ has no step" not in html


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such run directory"):
        read_run(tmp_path / "none")
    with pytest.raises(BadInput, match="is no run directory"):
        read_run(tmp_path)
    write(tmp_path / "run", 1)
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path)]) == 2


def test_lines_of_other_kinds_are_left_out(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    rows = [
        "[]",
        "null",
        "{}",
        '{"step": "x"}',
        '{"step": 1, "a": null, "b": true, "c": "t", "d": 1e999, "e": 2}',
        "\xff",
    ]
    rows += ['{"step": 1, "e": 3}', '{"step": 0, "e": 1}']
    (run / "metrics.jsonl").write_text("\n".join(rows), encoding="latin-1")
    source = read_run(run)
    assert list(source.metrics) == ["e"]
    assert source.metrics["e"].steps.tolist() == [0, 1] and source.metrics["e"].values.tolist() == [1, 3]
    (run / "heldout.json").write_text("{")
    (run / "config.yaml").write_text("a: [")
    checked(html_of(run))


def test_long_runs_are_sampled_and_thinned(tmp_path: Path) -> None:
    steps = np.arange(1.0, 10_001.0)
    xs, means, least, most = thin(Series(steps, np.sin(steps)))
    assert len(xs) == POINTS and (least <= means).all() and (means <= most).all()
    assert xs[0] < xs[-1] and abs(float(means.mean())) < 0.01
    drawing = lines("long", [Line("x", Series(steps, np.sin(steps)))])
    assert len(drawing) < 20_000 and "band" in drawing
    assert spread(list(range(10_000)), STEPS)[0] == 0 and spread(list(range(10_000)), STEPS)[-1] == 9_999
    assert len(set(spread(list(range(10_000)), STEPS))) == STEPS
    write(tmp_path / "run", STEPS + 20, 2)
    rows = [record(1, i, 0.5) for i in range(ANSWERS + 9)]
    (tmp_path / "run/rollouts/step_1.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    samples = scan(read_run(tmp_path / "run").rollout_files)
    assert len(samples.counts) == STEPS and samples.counts[0].answers == ANSWERS


def test_huge_answers_are_folded_and_cut(tmp_path: Path) -> None:
    write(tmp_path / "run", 2, 3, response="word " * 200_000)
    html = html_of(tmp_path / "run")
    checked(html)
    assert len(html) < 1_000_000 and "more characters" in html
    assert fold("short") == ("short", "")
    shown, rest = fold("a b" * 2000)
    assert shown + rest == "a b" * 2000 and len(shown) <= 900


def test_best_worst_vetoed_and_changed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run, 1)
    one = [record(1, 0, 0.1, prompt_id="a"), record(1, 1, 0.9, prompt_id="b"), record(1, 2, None, prompt_id="u")]
    one.append(record(1, 3, 0.0, prompt_id="v", vetoed=True, veto="good", r1=0.8))
    two = [record(2, 0, 0.8, prompt_id="a"), record(2, 1, 0.85, prompt_id="b")]
    for step, rows in ((1, one), (2, two)):
        (run / f"rollouts/step_{step}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = scan(read_run(run).rollout_files)
    assert [r.prompt_id for r in found.best] == ["b", "a"] and found.worst[0].reward == 0.1
    assert [r.prompt_id for r in found.vetoed] == ["v"]
    assert [(c.early.prompt_id, round(c.after - c.before, 2)) for c in found.changed] == [("a", 0.7), ("b", -0.05)]
    assert "u" not in {r.prompt_id for r in found.best + found.worst}  # not judged is not zero


def test_signals_see_what_was_planted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run, 10)
    for step in range(1, 11):
        rows = []
        for i in range(40):
            hack = step > 6 and i % 4 == 0
            text = "What a great question! " + "more words " * i if hack else "word " * (40 - i if step < 4 else i + 1)
            rows.append(record(step, i, (i + 1 + 40 * hack) / 100, group=0, response=text))
        (run / f"rollouts/step_{step}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = read_run(run)
    found = {s.name: s for s in signals(source.metrics, scan(source.rollout_files))}
    assert found["The best answers trip detectors"].state == "seen"
    assert found["Reward follows length"].state == "seen"
    assert (
        found["The best answers begin alike"].state == "seen"
        and "what a great question" in found["The best answers begin alike"].text
    )
    assert found["One criterion rises alone"].state == "unknown"


def test_a_single_criterion_that_jumps_is_named_and_noise_is_not() -> None:
    steps = np.arange(40.0)
    flat = Series(steps, np.full(40, 0.5))
    jump = Series(steps, np.where(steps < 20, 0.2, 0.9))
    noise = Series(steps, np.random.default_rng(0).random(40))
    assert [r[0] for r in sudden_rises({"flat": flat, "jump": jump, "other": flat})] == ["jump"]
    assert sudden_rises({"flat": flat, "noise": noise, "other": flat}) == []
    long = {n: Series(np.arange(4000.0), np.repeat(c.values, 100)) for n, c in {"jump": jump, "flat": flat}.items()}
    assert [r[0] for r in sudden_rises(long)] == ["jump"]
    assert sudden_rises({"a": jump, "b": jump}) == []  # all rise: it learns


def test_charts() -> None:
    s = Series(np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 4.0]))
    tree = ElementTree.fromstring(lines("t", [Line("a", s)], y=(0.0, 4.0)))
    points = next(e for e in tree.iter() if e.tag.endswith("polyline")).attrib["points"].split()
    assert [float(p.split(",")[0]) for p in points] == pytest.approx([44, 198, 352])
    assert [float(p.split(",")[1]) for p in points] == pytest.approx([150, 114.5, 8])
    areas = [
        e
        for e in ElementTree.fromstring(stacked("t", [Line("a", s), Line("b", s)])).iter()
        if "area" in e.get("class", "")
    ]
    assert len(areas) == 2
    drawn = ElementTree.fromstring(bars("t", [("plus", 0.4), ("minus", -0.2)]))
    widths = [float(e.attrib["width"]) for e in drawn.iter() if e.tag.endswith("rect")]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.2)
    assert (
        lines("none", []) == ""
        and bars("none", []) == ""
        and stacked("one", [Line("a", Series(s.steps[:1], s.values[:1]))]) == ""
    )
    ElementTree.fromstring(lines("point", [Line("a", Series(s.steps[:1], s.values[:1]))]))


def test_numbers_and_ticks_and_openings() -> None:
    assert [number(x) for x in (0, 0.25, 1234567, 5e-7, float("nan"))] == ["0", "0.25", "1.2e6", "5e-7", "–"]
    assert ticks(0, 1) == pytest.approx([0, 0.5, 1]) and ticks(3, 3) == [3]
    assert opening("Dear Leo, the paper desk arrived.") == "dear leo the paper" and opening("") == ""
    assert opening("这是一个很长的句子没有空格在里面") == "这是一个很长的句子没有空"
