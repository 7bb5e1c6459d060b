"""Log-probability and entropy at Qwen3's vocabulary: time and peak memory against log_softmax, forward and backward.

    python benchmarks/logprob.py [--positions 1024] [--dtype bfloat16] [--repeats 5]

Each way runs in a process of its own, alternating; a ratio is the median over pairs. Peak memory is what the process
had at most above what it had with the logits made (VmHWM of Linux), and includes the gradient of the logits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

VOCABULARY = 151_936


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) << 10


def measure(way: str, positions: int, dtype: str, threads: int) -> dict[str, float]:
    """One run of one way in this process."""
    import torch

    from megarubric.megatron.logprob import token_logprobs

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    logits = torch.randn(positions, VOCABULARY, dtype=getattr(torch, dtype)).mul_(2).requires_grad_()
    targets = torch.randint(VOCABULARY, (positions,))
    token_logprobs(logits[:2].detach(), targets[:2], vocab_size=VOCABULARY)  # first-call costs of either way
    torch.log_softmax(logits[:2].detach().float(), -1)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    began = time.perf_counter()
    if way == "log_softmax":
        everything = torch.log_softmax(logits.float(), -1)
        logprobs = everything.gather(1, targets[:, None])[:, 0]
        entropy = -(everything.exp() * everything).sum(-1)
    else:
        logprobs, entropy = token_logprobs(logits, targets, vocab_size=VOCABULARY, reuse_logits=way == "in place")
    forward = time.perf_counter() - began
    (logprobs.sum() + 0.01 * entropy.sum()).backward()
    seconds = time.perf_counter() - began
    peak = resident("VmHWM") - before
    return {"forward": forward, "seconds": seconds, "bytes": peak, "value": float(logprobs.detach().double().mean())}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--positions", type=int, default=1024)
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--one", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one:
        print(json.dumps(measure(a.one, a.positions, a.dtype, a.threads)))
        return
    ways = ("log_softmax", "chunked", "in place")
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(a.repeats):
        for way in ways:
            command = [sys.executable, __file__, "--one", way, "--positions", str(a.positions), "--dtype", a.dtype]
            out = subprocess.run([*command, "--threads", str(a.threads)], check=True, capture_output=True, text=True)
            found[way].append(json.loads(out.stdout))
    print(f"{a.positions} positions x {VOCABULARY:,} tokens, {a.dtype}, {a.threads} thread(s), {a.repeats} pairs")
    size = 2 if a.dtype == "bfloat16" else 4
    print(f"the logits themselves: {a.positions * VOCABULARY * size / 2**20:,.0f} MiB")
    for way in ways:
        runs, base = found[way], found["log_softmax"]
        time_ratio = median(b["seconds"] / r["seconds"] for r, b in zip(runs, base))
        memory_ratio = median(b["bytes"] / r["bytes"] for r, b in zip(runs, base))
        print(
            f"{way:<12} forward {median(r['forward'] for r in runs):6.2f} s, with backward"
            f" {median(r['seconds'] for r in runs):6.2f} s ({time_ratio:.2f}x as fast as log_softmax),"
            f" peak {median(r['bytes'] for r in runs) / 2**20:8,.0f} MiB (1/{memory_ratio:.1f} of log_softmax),"
            f" mean log-probability {runs[0]['value']:.6f}"
        )


if __name__ == "__main__":
    main()
