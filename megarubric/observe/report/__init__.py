"""`megarubric report`: a run directory as one self-contained HTML page. Data -> model -> HTML, no step but the last
writes."""

from __future__ import annotations

import json
from pathlib import Path

from megarubric.errors import BadInput
from megarubric.observe.files import whole_file
from megarubric.observe.report.model import build
from megarubric.observe.report.page import page
from megarubric.observe.report.samples import scan
from megarubric.observe.report.source import read_run
from megarubric.observe.terminal import say


def run_report(run_dir: Path, out: Path | None, *, as_json: bool) -> int:
    """The verb. Raises BadInput when `run_dir` holds no run or `out` is a directory."""
    source = read_run(run_dir)
    out = out or run_dir / "report.html"
    if out.is_dir():
        raise BadInput(out, None, "is a directory; --out names the file to write")
    report = build(source, scan(source.rollout_files))
    with whole_file(out) as f:
        f.write(page(report))
    if as_json:
        print(
            json.dumps(
                {
                    "out": str(out),
                    "name": report.name,
                    "headline": {what: value for what, value, _ in report.headline},
                    "signals": [{"name": s.name, "state": s.state, "text": s.text} for s in report.signals],
                    "notes": report.notes,
                },
                indent=1,
            )
        )
        return 0
    for what, value, _ in report.headline:
        say(f"{what}: {value}")
    for signal in report.signals:
        if signal.state == "seen":
            say(f"signal: {signal.name}. {signal.text}")
    say(f"written to {out}")
    return 0
