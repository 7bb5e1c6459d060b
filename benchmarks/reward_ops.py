"""The aggregation op against eager torch and against the time to stream the same bytes.

    python benchmarks/reward_ops.py [--samples 1000000] [--criteria 16] [--pairs 8] [--plain] [--device cpu|cuda]
                                    [--rounds 7] [--json FILE]

One rubric, every criterion saturated (none with --plain), pairs of all kinds, one veto, shaping, 10% of the scores
masked. Three
things are timed in turn, round by round, and the best round of each is reported: the op; a torch implementation that
works on whole [N, K] matrices (no Python loop over samples; in-place where that helps); and reading every input byte
once and writing every output byte once. First it is checked that op and torch agree.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Plain
from typing import Any

import torch
from torch import Tensor

from megarubric.reward import ops
from megarubric.reward.constants import RubricConstants
from megarubric.reward.table import RubricTable, pack_rubrics


def make_table(n_criteria: int, n_pairs: int, saturated: bool = True) -> RubricTable:
    """One rubric with every mechanism in it. Plain objects in the place of `Rubric`: this runs with torch alone."""
    kinds = ("product", "min", "gap")
    criteria = [
        Plain(
            id=f"c{k}",
            weight=-0.25 if k % 8 == 7 else 0.5 + k % 3,
            saturation=Plain(theta=0.3 + 0.05 * (k % 8), beta=1.0 + k % 4) if saturated else None,
            veto=Plain(threshold=0.02, detector=False) if k == 0 else None,
        )
        for k in range(n_criteria)
    ]
    joined = [(j % n_criteria, (3 * j + 1) % n_criteria, j % 3) for j in range(n_pairs)]
    pairs = [
        Plain(a=f"c{a}", b=f"c{b}", kind=kinds[kind], weight=-0.2 if kinds[kind] == "gap" else 0.3)
        for a, b, kind in joined
        if a != b
    ]
    shaping = Plain(kappa=0.6, alpha=1.0, power=2.5)
    rubric: Any = Plain(
        id="bench", criteria=criteria, pairs=pairs, shaping=shaping, on_missing_veto="pass", veto_reward=0.0
    )
    return pack_rubrics([rubric])


class EagerTorch:
    """The same equations for one rubric on [N, K] matrices, as a careful user of torch would write them."""

    def __init__(self, rubric: RubricConstants, device: str) -> None:
        def column(values: list[Any]) -> Tensor:
            return torch.tensor([float(v) for v in values], device=device)

        c, p = rubric.criteria, rubric.pairs
        self.saturated = any(x.saturates for x in c)
        self.theta, self.rate, self.span = (column([getattr(x, n) for x in c]) for n in ("theta", "rate", "span"))
        self.rate *= math.log(2.0)  # the constant is for powers of two
        self.weight, self.weight_ceiling = (
            column([x.weight for x in c]),
            column([max(x.weight * x.ceiling, 0) for x in c]),
        )
        order = sorted(range(len(p)), key=lambda j: p[j].kind)
        self.kinds = {k: [j for j in order if p[j].kind == k] for k in ("product", "min", "gap")}
        self.a = {k: torch.tensor([p[j].a for j in js], device=device) for k, js in self.kinds.items()}
        self.b = {k: torch.tensor([p[j].b for j in js], device=device) for k, js in self.kinds.items()}
        self.pair_weight = {k: column([p[j].weight for j in js]) for k, js in self.kinds.items()}
        self.pair_ceiling = {
            k: column([max(p[j].weight * p[j].ceiling, 0) for j in js]) for k, js in self.kinds.items()
        }
        self.kappa, self.gain, self.power = float(rubric.kappa), float(rubric.gain), float(rubric.power)
        self.veto = [(k, float(x.tau)) for k, x in enumerate(c) if x.veto]
        self.veto_reward = float(rubric.veto_reward)

    def __call__(self, s: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        if self.saturated:
            over = (s - self.theta).clamp_(min=0)
            g = torch.minimum(s, self.theta).sub_(over.mul_(self.rate).neg_().expm1_().mul_(self.span))
        else:
            g = s.clone()
        m = mask.to(torch.float32)
        g.mul_(m)
        numerator, denominator = g @ self.weight, m @ self.weight_ceiling
        for kind, a in self.a.items():
            if len(a) == 0:
                continue
            b = self.b[kind]
            x, y = g.index_select(1, a), g.index_select(1, b)
            both = m.index_select(1, a).mul_(m.index_select(1, b))
            phi = x.mul_(y) if kind == "product" else torch.minimum(x, y) if kind == "min" else x.sub_(y).abs_()
            numerator += phi.mul_(both) @ self.pair_weight[kind]
            denominator += both @ self.pair_ceiling[kind]
        scored = denominator > 0
        only_pitfalls = ~scored & (mask & (self.weight < 0)).any(1)
        pitfall = (1 + (g @ self.weight) / (m @ self.weight.abs())).clamp_(0, 1)
        r0 = torch.where(only_pitfalls, pitfall, (numerator / denominator).clamp_(0, 1))
        t = ((r0 - self.kappa) / (1 - self.kappa)).clamp_(min=0)
        r1 = t.pow_(self.power).mul_(self.gain).add_(r0).div_(1 + self.gain)
        scored |= only_pitfalls
        vetoed = torch.zeros_like(scored)
        first = torch.full(r0.shape, -1, dtype=torch.int32, device=s.device)
        for k, tau in self.veto:
            fails = (s[:, k] < tau) & mask[:, k]
            first = torch.where(fails & ~vetoed, k, first)
            vetoed |= fails
        reward = torch.where(vetoed, self.veto_reward, r1)
        return torch.where(scored | vetoed, reward, torch.nan), scored | vetoed, vetoed, first, r0, r1


class Stream:
    """Reads the bytes of `inputs` and writes those of `outputs`, as fast as torch's own kernels do."""

    def __init__(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self.nbytes = sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        written = sum(t.numel() * t.element_size() for t in outputs)
        device = inputs[0].device
        # A copy of n bytes reads n and writes n; what is read beyond that is summed.
        self.source = torch.zeros(written // 8, dtype=torch.int64, device=device)
        self.target = torch.zeros_like(self.source)
        self.rest = torch.ones((self.nbytes - 2 * written) // 4, dtype=torch.float32, device=device)

    def __call__(self) -> None:
        self.target.copy_(self.source)
        self.rest.sum()


def best_times(work: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Best seconds of each, interleaved so that a busy neighbour hits all alike."""
    best = dict.fromkeys(work, float("inf"))
    for _ in range(rounds):
        for name, run in work.items():
            if device == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - begin)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--criteria", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--plain", action="store_true", help="no criterion saturates")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    torch.manual_seed(0)
    n, k = a.samples, a.criteria
    table = make_table(k, a.pairs, not a.plain)
    scores = torch.rand(n, k, device=a.device)
    mask = torch.rand(n, k, device=a.device) > 0.1
    offsets = torch.arange(0, n * k + 1, k, device=a.device)
    rubric = torch.zeros(n, dtype=torch.int32, device=a.device)
    words = torch.from_numpy(table.words).to(a.device)
    eager = EagerTorch(table.rubrics[0], a.device)

    def op() -> ops.Aggregated:
        return ops.aggregate(scores.view(-1), mask.view(-1), offsets, rubric, words)

    out, want = op(), eager(scores, mask)
    ops.check(out.bad, offsets)
    error = float((out.reward - want[0]).abs().nan_to_num().max())
    assert error < 2e-6 and torch.equal(out.vetoed, want[2]) and torch.equal(out.valid, want[1]), error
    inputs = [scores, mask, offsets, rubric]
    stream = Stream(inputs, [out.reward, out.r0, out.r1, out.veto, out.valid, out.vetoed])
    del want
    seconds = best_times({"op": op, "eager torch": lambda: eager(scores, mask), "stream": stream}, a.rounds, a.device)
    name = torch.cuda.get_device_name() if a.device == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    report = {
        "device": name,
        "threads": torch.get_num_threads(),
        "ops": ops.describe(),
        "samples": n,
        "criteria": k,
        "pairs": len(table.rubrics[0].pairs),
        "saturated": not a.plain,
        "bytes": stream.nbytes,
        "seconds": seconds,
        "gigabytes_per_second": {x: stream.nbytes / s / 1e9 for x, s in seconds.items() if x != "eager torch"},
        "eager_over_op": seconds["eager torch"] / seconds["op"],
        "op_over_stream": seconds["op"] / seconds["stream"],
        "largest_difference_to_torch": error,
    }
    print(f"{name}, {report['threads']} thread(s), {report['ops']}")
    print(f"{n:,} samples x {k} criteria, {report['pairs']} pairs: {stream.nbytes / 1e6:.0f} MB in and out")
    for row, s in seconds.items():
        print(f"  {row:12} {s * 1e3:9.2f} ms {stream.nbytes / s / 1e9:8.1f} GB/s")
    print(f"  eager torch / op {report['eager_over_op']:.1f}, op / stream {report['op_over_stream']:.2f}")
    if a.json:
        a.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
