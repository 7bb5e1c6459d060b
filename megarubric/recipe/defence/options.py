"""The options of `defend`. Imports nothing heavy: `--help` of every verb reads this file."""

from __future__ import annotations

import argparse
import math
from pathlib import Path


def defend_arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    p.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run directory with rollouts/step_N.jsonl")
    p.add_argument("--out", type=Path, metavar="DIR", help="where report and rubric go (default RUN_DIR/defence)")
    p.add_argument("--judge", default="none", metavar="none|DIR|URL", help="judges caught answers without the exploit")
    p.add_argument(
        "--clean", type=Path, metavar="FILE", help="JSONL {prompt, response}: honest answers, for false vetoes"
    )
    p.add_argument("--rubrics", type=Path, metavar="PATH", help="the run's prompts (default: data.train of its config)")
    p.add_argument("--id", metavar="ID", help="of the proposed rubric (default defence.mined.RUN)")
    p.add_argument(
        "--promote",
        type=Path,
        metavar="PATH",
        help="show the change and add the rubric to this rubric file or directory",
    )
    p.add_argument(
        "--max-false-veto",
        type=_share,
        default=0.01,
        metavar="P",
        help="upper 95%% bound of a veto's rate on honest answers (default 0.01)",
    )
    p.add_argument("--alpha", type=_share, default=0.01, metavar="P", help="chance of any false find (default 0.01)")
    p.add_argument("--z", type=_positive, default=3.0, metavar="Z", help="robust deviations that flag (default 3)")
    p.add_argument(
        "--top", type=_share, default=0.95, metavar="Q", help="quantile of a step from which answers are flagged (0.95)"
    )
    p.add_argument("--min-gain", type=_positive, default=0.05, metavar="R", help="least gain in reward (default 0.05)")
    p.add_argument("--json", action="store_true", help="print what was found as JSON")


def _share(text: str) -> float:
    value = _number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _positive(text: str) -> float:
    value = _number(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number") from None
