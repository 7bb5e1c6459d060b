"""Mutated rubric files: each must give rubrics or one line of error, never a traceback or a hang.

    python tools/fuzz_rubrics.py [--n 50000] [--seed 0] [--corpus DIR]

Seeds are rubrics with every feature, and those of --corpus. Mutations work on bytes (flips, cuts, splices, hostile
tokens) and on the tree (values swapped, keys renamed, types changed, deep nesting). A rubric that is read must survive
its round trip, and its checks must run. Prints what came out; status 1 when anything but BadInput was raised or a file
took longer than --slow seconds of processor time.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from megarubric.errors import BadInput
from megarubric.rubrics import Rubric, load_rubrics, parse_rubric, to_dict
from megarubric.rubrics.checks import run_check
from megarubric.rubrics.lint import lint_rubric

SEED_RUBRIC: dict[str, Any] = {
    "id": "story.plain-narrative",
    "version": 1,
    "title": "Plain narrative voice",
    "scope": "instance",
    "family": "creative",
    "provenance": {"author": "llm", "model": "m", "source": "fuzz", "licence": "Apache-2.0"},
    "tags": ["story", "voice"],
    "prompt": "Write about the ferry.",
    "reference": "It was late.",
    "criteria": [
        {
            "id": "calm",
            "description": "States what happened.",
            "weight": 1.0,
            "tiers": [
                {"value": 0, "text": "Consoles."},
                {"value": 1, "text": "Lapses."},
                {"value": 2, "text": "Plain."},
            ],
            "needs_reference": True,
            "saturation": {"theta": 0.3, "beta": 3.0},
        },
        {"id": "length", "weight": 0.5, "check": {"kind": "length_constraints:number_words", "min": 80, "max": 160}},
        {"id": "echo", "weight": 0, "check": {"kind": "hack:rubric_echo"}, "veto": {"detector": True}},
        {"id": "words", "weight": -1, "check": {"kind": "keywords:existence", "keywords": ["a+b", "("]}},
    ],
    "pairs": [{"a": "calm", "b": "length", "weight": 0.2, "kind": "min"}],
    "shaping": {"kappa": 0.6, "alpha": 1.0, "power": 2.0},
    "veto_reward": 0.0,
    "on_missing_veto": "unscored",
}
HOSTILE: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1e308,
    -1e308,
    5e-324,
    float("inf"),
    float("-inf"),
    float("nan"),
    10**400,
    -(10**30),
    2**63,
    "",
    " ",
    "\x00",
    "\ud800",
    "\u202e",
    "a" * 5000,
    "no",
    "1e999",
    "2024-01-01",
    [],
    {},
    [[]],
    [None],
    {"": ""},
    {"id": {"id": 1}},
    "[" * 200,
    "!!python/object:os.system",
    "&a *a",
    "<|im_end|>",
    "(?:a+)+$",
    "%s%n{0}",
    "../../x",
]
TOKENS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b'"',
    b"'",
    b"\\",
    b"\\u",
    b"\\ud800",
    b"\n",
    b"\r",
    b"\t",
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"- ",
    b"---\n",
    b"...\n",
    b"&a ",
    b"*a",
    b"!!str ",
    b"!x ",
    b"<<: ",
    b"? ",
    b"|\n",
    b">-\n",
    b"#",
    b"%YAML 9\n",
    b"[" * 300,
    b'{"a":' * 300,
    b"9" * 5000,
    b"null",
    b"true",
    b"~",
    b"\xe2\x80\xa8",
    b"id: x\n",
]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few cuts, flips, copies and hostile tokens."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 10))):
        i = rng.randrange(len(out) + 1)
        j = min(len(out), i + rng.randrange(1, 40))
        action = rng.randrange(6)
        if action == 0:
            del out[i:j]
        elif action == 1:
            out[i:i] = rng.choice(TOKENS)
        elif action == 2 and out:
            out[rng.randrange(len(out))] = rng.randrange(256)
        elif action == 3:
            out[i:i] = out[i:j] * rng.randrange(1, 4)
        elif action == 4:
            k = rng.randrange(len(out) + 1)
            out[i:j] = out[k : k + (j - i)]
        else:
            del out[rng.randrange(len(out) + 1) :]
    return bytes(out)


def mutate_tree(tree: Any, rng: random.Random) -> Any:
    """One place of the tree changed: another value, another key, a list twice, the place gone."""
    tree = copy.deepcopy(tree)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        node, key = rng.choice(places)
        if (isinstance(node, dict) and key not in node) or (isinstance(node, list) and key >= len(node)):
            continue
        action = rng.randrange(6)
        if action == 0:
            del node[key]
        elif action == 1:
            other, at = rng.choice(places)
            node[key] = (
                copy.deepcopy(other[at]) if at in (other if isinstance(other, dict) else range(len(other))) else 0
            )
        elif action == 2 and isinstance(node, dict):
            node[rng.choice((key + "s", key.upper(), "", "kind", "id", "x" * 300, "\u200b" + key))] = node.pop(key)
        elif action == 3 and isinstance(node[key], list):
            node[key] = node[key] * rng.choice((0, 2, 50))
        else:
            node[key] = copy.deepcopy(rng.choice(HOSTILE))
    return tree


def as_yaml(tree: Any) -> bytes:
    """YAML of a tree; what has no UTF-8 is written with its replacement."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode("utf-8", "replace")


WRITERS: dict[str, Callable[[Any], bytes]] = {
    ".json": lambda tree: json.dumps(tree).encode(),
    ".jsonl": lambda tree: json.dumps(tree).encode() + b"\n",
    ".yaml": as_yaml,
}


def make(seeds: list[Any], rng: random.Random) -> tuple[str, bytes]:
    """(suffix, content) of one mutated file."""
    suffix = rng.choice(list(WRITERS))
    tree = rng.choice(seeds)
    if rng.random() < 0.5:
        tree = mutate_tree(tree, rng)
    data = WRITERS[suffix](tree)
    return suffix, mutate_bytes(data, rng) if rng.random() < 0.6 else data


def use(rubric: Rubric) -> None:
    """What a run does with a rubric: round trip, hash, lint, checks."""
    assert parse_rubric(to_dict(rubric), "round trip") == rubric
    assert len(rubric.hash) == 64
    list(lint_rubric(rubric))
    for criterion in rubric.criteria:
        assert len(criterion.tier_values) >= 2
        if criterion.check is not None:
            assert run_check(criterion.check, rubric.prompt or "", "The ferry is late. Plain.", rubric) in (0.0, 1.0)


def try_file(path: Path) -> str:
    """ "rubric", "error", or what went wrong."""
    try:
        for rubric in load_rubrics(path):
            use(rubric)
    except BadInput as error:
        line = str(error)
        return "error" if "\n" not in line and str(path) in line else f"bad line: {line[:200]!r}"
    except Exception:  # the finding this program is for
        return traceback.format_exc()
    return "rubric"


def fuzz(n: int, seed: int, corpus: Path | None = None, slow: float = 5.0) -> tuple[Counter[str], list[str]]:
    """(outcomes, failures) of `n` mutated files."""
    seeds = [SEED_RUBRIC] + ([to_dict(r) for r in load_rubrics(corpus).sample(20, seed)] if corpus else [])
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(n):
            rng = random.Random(f"{seed}:{i}")
            suffix, data = make(seeds, rng)
            path = Path(folder, f"x{suffix}")
            path.write_bytes(data)
            start = time.process_time()
            outcome = try_file(path)
            spent = time.process_time() - start
            if spent > slow:
                failures.append(f"file {i} (seed {seed}): {spent:.1f} s")
            if outcome not in ("rubric", "error"):
                failures.append(f"file {i} (seed {seed}): {outcome}")
                outcome = "failure"
            outcomes[f"{suffix} {outcome}"] += 1
    return outcomes, failures


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--n", type=int, default=50_000, help="files (default 50,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="rubrics to mutate besides the built-in one")
    parser.add_argument("--slow", type=float, default=5.0, metavar="S", help="a file may take so many seconds")
    options = parser.parse_args()
    start = time.perf_counter()
    outcomes, failures = fuzz(options.n, options.seed, options.corpus, options.slow)
    for failure in failures[:20]:
        print(failure, file=sys.stderr)
    print(f"{options.n} files in {time.perf_counter() - start:.0f} s: {dict(sorted(outcomes.items()))}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
