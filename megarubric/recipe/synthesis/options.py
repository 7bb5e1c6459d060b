"""The options of `rubrics synthesize`. Imports nothing heavy: `--help` of every verb reads this file."""

from __future__ import annotations

import argparse
from pathlib import Path

from megarubric.arguments import seconds

# As in `rubrics.schema` and `rubrics.synthesis.model`, which take a tenth of a second to import.
FAMILIES = ("instruction", "creative", "social", "humanities", "reasoning", "safety", "defence", "style")
WAYS = ("seeded", "critique", "stronger", "hybrid")


def synthesize_arguments(p: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    p.add_argument("prompts", type=Path, metavar="PROMPTS", help="JSONL: id, prompt; may have reference, answers, ...")
    p.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="JSONL corpus file; report and journal beside"
    )
    p.add_argument("--model", required=True, metavar="DIR|URL", help="who drafts (URL#name: that model of the server)")
    p.add_argument("--way", required=True, choices=WAYS, help="where criteria come from (docs/synthesis.md)")
    p.add_argument("--policy", metavar="DIR|URL", help="who answers, and criticises itself (default: --model)")
    p.add_argument("--judge", metavar="DIR|URL", help="who judges answers to validate criteria (default: --model)")
    p.add_argument("--seeds", type=Path, metavar="PATH", help="rubrics of people to start from or to mix with")
    p.add_argument("--brief", type=Path, metavar="FILE", help="what experts want, in prose; for --way seeded")
    p.add_argument("--limit", type=_positive, metavar="N", help="only the first N prompts")
    p.add_argument("--dry-run", action="store_true", help="print the plan and one prompt; ask and write nothing")
    p.add_argument("--fresh", action="store_true", help="forget the journal of an earlier run")
    p.add_argument("--json", action="store_true", help="print the counts and the cost as JSON")

    g = p.add_argument_group("drafting")
    g.add_argument("--criteria", type=_range, metavar="A-B", default=(3, 10), help="criteria a rubric (default 3-10)")
    g.add_argument(
        "--retries", type=int, default=2, metavar="N", help="more tries when a reply is no draft (default 2)"
    )
    g.add_argument("--reviews", type=int, default=1, metavar="N", help="times the model reviews a draft (default 1)")
    g.add_argument("--seeds-per-prompt", type=int, default=2, metavar="N", help="the N most fitting (default 2)")
    g.add_argument("--temperature", type=float, default=0.7, metavar="T", help="of drafts (default 0.7)")
    g.add_argument("--max-tokens", type=int, default=3072, metavar="N", help="of a draft (default 3072)")
    g.add_argument("--templates", type=Path, metavar="DIR", help="prompt templates that stand in for the shipped ones")
    g.add_argument("--against", type=Path, action="append", default=[], metavar="PATH", help="drop what repeats these")
    g.add_argument("--prefix", default="synthetic", metavar="NAME", help="what ids begin with (default synthetic)")
    g.add_argument("--family", choices=FAMILIES, help="of prompts and drafts that name none")
    g.add_argument("--licence", default="", metavar="TEXT", help="of the rubrics (default: the seeds', or not stated)")

    g = p.add_argument_group("validation")
    g.add_argument(
        "--answers", type=int, default=4, metavar="N", help="answers a prompt (default 4; 0: given ones only)"
    )
    g.add_argument("--answer-tokens", type=int, default=1024, metavar="N", help="of an answer (default 1024)")
    g.add_argument("--answer-temperature", type=float, default=1.0, metavar="T", help="of answers (default 1)")
    g.add_argument(
        "--judge-template", action="append", default=[], metavar="NAME", help="a reading in each order; repeatable"
    )
    g.add_argument("--judge-orders", choices=("both", "lowest"), default="both", help="of the tiers (default both)")
    g.add_argument("--min-variance", type=float, default=0.01, metavar="X", help="between answers (default 0.01)")
    g.add_argument("--max-disagreement", type=float, default=0.25, metavar="X", help="of readings (default 0.25)")
    g.add_argument("--min-reliability", type=float, default=0.0, metavar="X", help="ICC of readings (default 0)")

    g = p.add_argument_group("cost")
    g.add_argument(
        "--price",
        action="append",
        default=[],
        metavar="[ROLE=]IN/OUT",
        help="per million tokens read/written; repeatable",
    )
    g.add_argument("--currency", default="USD", metavar="NAME", help="of the prices (default USD)")
    g.add_argument("--max-requests", type=int, default=0, metavar="N", help="budget of each URL; 0: none")
    g.add_argument("--max-total-tokens", type=int, default=0, metavar="N", help="budget of each URL; 0: none")
    g.add_argument("--at-once", type=_positive, default=8, metavar="N", help="prompts under way (default 8)")
    g.add_argument("--concurrency", type=_positive, default=16, metavar="N", help="requests under way at a URL")
    g.add_argument("--timeout", type=seconds, default=300.0, metavar="SECONDS", help="of one request (default 300)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _range(text: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    if not (low.isdecimal() and high.isdecimal() and dash):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 3-10")
    return int(low), int(high)
