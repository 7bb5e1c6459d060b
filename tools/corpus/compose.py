"""Composes the instance rubrics of rubrics/instance/ from the kits in tools/corpus/kits/FAMILY/*.yaml.

python tools/corpus/compose.py                      write the shards
python tools/corpus/compose.py --check              status 1 when the shards are not what the kits give
python tools/corpus/compose.py --kit FILE --show 2  one kit: findings, numbers, two of its rubrics; writes nothing
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
from kit import compose, read_kit

from megarubric.errors import BadInput
from megarubric.rubrics.lint.near import grams, jaccard, rubric_text
from megarubric.rubrics.lint.run import lint_rubric
from megarubric.rubrics.schema import FAMILIES, Rubric, dumps
from megarubric.rubrics.show import print_rubric
from megarubric.rubrics.stats import corpus_stats

ROOT = Path(__file__).parents[2]
KITS = ROOT / "tools/corpus/kits"
SHARDS = ROOT / "rubrics/instance"
SHARD_BYTES = 1_900_000
PROVENANCE = {"author": "hybrid", "source": "megarubric", "licence": "Apache-2.0", "model": "claude"}


def shards(kits: Path = KITS) -> Iterator[tuple[str, bytes]]:
    """(file name, bytes) of every shard, in order: one series a family, no shard above SHARD_BYTES."""
    for family in FAMILIES:
        lines: list[bytes] = []
        size, number = 0, 1
        for path in sorted((kits / family).glob("*.yaml")):
            for rubric in compose(read_kit(path), path, PROVENANCE):
                line = dumps(rubric).encode() + b"\n"
                if size + len(line) > SHARD_BYTES:
                    yield f"{family}-{number:02d}.jsonl", b"".join(lines)
                    lines, size, number = [], 0, number + 1
                lines.append(line)
                size += len(line)
        if lines:
            yield f"{family}-{number:02d}.jsonl", b"".join(lines)


def write(out: Path = SHARDS) -> int:
    """Replace the shards; old ones go when all new ones are there."""
    out.mkdir(parents=True, exist_ok=True)
    made = []
    for name, data in shards():
        aside = out / f".{name}.part"
        aside.write_bytes(data)
        made.append((aside, out / name))
        print(f"{name}: {data.count(b'\n'):,} rubrics, {len(data):,} bytes")
    for aside, final in made:
        os.replace(aside, final)
    for old in set(out.glob("*.jsonl")) - {final for _, final in made}:
        old.unlink()
    return 0


def check(out: Path = SHARDS) -> int:
    """Compare the shards with the kits."""
    wanted = dict(shards())
    have = {p.name: p.read_bytes() for p in out.glob("*.jsonl")}
    wrong = sorted(name for name in wanted.keys() | have.keys() if wanted.get(name) != have.get(name))
    for name in wrong:
        print(f"{out / name}: not what the kits give", file=sys.stderr)
    return 1 if wrong else 0


def look(paths: Sequence[Path], show: int, seed: int) -> int:
    """What lint and the numbers say of some kits, and a few of their rubrics."""
    console = Console(width=120, highlight=False)
    status = 0
    for path in paths:
        try:
            rubrics = list(compose(read_kit(path), path, PROVENANCE))
        except BadInput as error:
            console.print(str(error), markup=False, soft_wrap=True)
            status = 1
            continue
        findings = [f for r in rubrics for f in lint_rubric(r, path.name)]
        seen: set[tuple[str | None, str]] = set()
        for f in findings:
            if (f.criterion, f.message) not in seen:
                console.print(f"{f.rubric}/{f.criterion}  {f.rule}  {f.message}", markup=False, soft_wrap=True)
            seen.add((f.criterion, f.message))
        n = corpus_stats(rubrics)
        console.print(
            f"{path.stem}: {len(rubrics)} rubrics, {n['criteria_per_rubric']:.1f} criteria, mixed {n['mixed']:.0%}, "
            f"absence or correctness {n['absence_weight']:.0%}, most alike {_most_alike(rubrics):.2f}, "
            f"findings {len(findings)}",
            markup=False,
        )
        status |= bool(findings)
        for rubric in random.Random(seed).sample(rubrics, min(show, len(rubrics))):
            print_rubric(rubric, console)
    return status


def _most_alike(rubrics: Sequence[Rubric]) -> float:
    sets = grams(map(rubric_text, rubrics))
    return max((jaccard(a, b) for i, a in enumerate(sets) for b in sets[:i]), default=0.0)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="compare the shards with the kits")
    p.add_argument("--kit", type=Path, nargs="+", metavar="FILE", help="look at these kits only")
    p.add_argument("--show", type=int, default=0, metavar="N", help="with --kit: print N rubrics of each")
    p.add_argument("--seed", type=int, default=0, help="which ones")
    a = p.parse_args()
    try:
        if a.kit:
            return look(a.kit, a.show, a.seed)
        return check() if a.check else write()
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
