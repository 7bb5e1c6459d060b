#!/usr/bin/env python
"""Block-scaled FP8 for vLLM: quantize_fp8.py SRC DST makes a checkpoint with FP8 linears from one without."""

import argparse
import sys
from pathlib import Path

from rich.progress import Progress

from megarubric.errors import MegarubricError
from megarubric.megatron.fp8_export import export_fp8


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("source", type=Path, metavar="SRC", help="Hugging Face directory in fp32, bf16 or fp16")
    p.add_argument("target", type=Path, metavar="DST", help="the directory to make")
    p.add_argument("--max-shard-gb", type=float, default=5.0, help="largest weight file (default 5)")
    a = p.parse_args()
    try:
        with Progress(disable=not sys.stderr.isatty()) as bar:
            task = bar.add_task("tensors")
            n = export_fp8(
                a.source,
                a.target,
                max_shard_bytes=int(a.max_shard_gb * 1e9),
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except MegarubricError as error:
        print(f"quantize_fp8: {error}", file=sys.stderr)
        return error.exit_status
    print(f"{a.target}: {n / 1e9:.2f} GB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
