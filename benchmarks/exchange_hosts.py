"""What it costs to publish a weight version on two hosts instead of one, whole and as deltas.

Two ranks stand for two hosts on this machine (loopback, encrypted as between real hosts) and hold half of a bfloat16
model each, as pipeline stages do, so half of it goes each way. Before every round each rank takes one real AdamW step
(float32 masters, learning rate as given) on random gradients. Printed: medians of seconds from `begin` to `end` on rank
0 for one host, two hosts whole, two hosts with deltas, in turn in each round; bytes; and the share of changed elements.

    python benchmarks/exchange_hosts.py [--mb 300] [--rounds 7] [--lr 1e-6] [--bucket-mb 64] [--threads 1]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megarubric.exchange.rpc import CurveKeys
from megarubric.exchange.sender import Sender
from megarubric.launch.supervisor import free_port
from megarubric.megatron.pieces import Piece

ROWS, COLUMNS = 768, 2048  # an expert matrix of Qwen3-30B-A3B: 3 MiB
WORLD = 2


def build(mb: int, rank: int) -> tuple[dict[str, tuple[int, ...]], list[Piece]]:
    """The manifest, and this rank's half of it: matrices and, for each four, a vector."""
    manifest: dict[str, tuple[int, ...]] = {}
    for number in range((mb << 20) // (2 * ROWS * COLUMNS)):
        manifest[f"model.layers.{number // 12}.mlp.experts.{number % 12}.weight"] = (ROWS, COLUMNS)
        if number % 4 == 0:
            manifest[f"model.layers.{number // 12}.norm.{number % 12}.weight"] = (COLUMNS,)
    names = list(manifest)
    half = names[: len(names) // 2] if rank == 0 else names[len(names) // 2 :]
    torch.manual_seed(rank)
    pieces = []
    for name in half:
        index = tuple(slice(0, n) for n in manifest[name])
        param = torch.empty(manifest[name]).normal_(0, 0.02).bfloat16()
        pieces.append(Piece(name, manifest[name], index, param, index, True))
    return manifest, pieces


def publish(sender: Sender, version: int, group: dist.ProcessGroup) -> tuple[float, str]:
    dist.barrier(group=group)
    began = time.perf_counter()
    sender.begin(version)
    for index in range(len(sender.table.buckets)):
        sender.fill(version, index)
    checksum = sender.end(version)
    return time.perf_counter() - began, checksum


def work(args: argparse.Namespace) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    group = dist.group.WORLD
    assert group is not None
    manifest, pieces = build(args.mb, rank)
    masters = [p.param.float() for p in pieces]
    adam = torch.optim.AdamW(masters, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    keys = CurveKeys.load(Path(args.keys))
    modes = {"one host": (1, False), "two hosts, whole": (2, False), "two hosts, delta": (2, True)}
    senders = {
        name: Sender(
            manifest,
            torch.bfloat16,
            pieces,
            group=group,
            shm_prefix=f"mrbench-{args.port}-{number}",
            bucket_bytes=args.bucket_mb << 20,
            hosts=hosts,
            keys=keys,
            delta=delta,
        )
        for number, (name, (hosts, delta)) in enumerate(modes.items())
    }
    seconds: dict[str, list[float]] = {name: [] for name in modes}
    sent: dict[str, list[int]] = {name: [] for name in modes}
    shares = []
    for version in range(args.rounds + 1):  # the first connects, makes the segments, and is not counted
        changed = total = 0
        for master in masters:
            master.grad = torch.randn_like(master)
        adam.step()
        for piece, master in zip(pieces, masters):
            new = master.bfloat16()
            changed += int((new.view(torch.int16) != piece.param.view(torch.int16)).sum())
            total += new.numel()
            piece.param.copy_(new)
        checksums = set()
        for name, sender in senders.items():
            took, checksum = publish(sender, version, group)
            checksums.add(checksum)
            if version:
                seconds[name].append(took)
                sent[name].append(sender.network_bytes)
        assert len(checksums) == 1, "the ways of publishing differ"
        if version:
            shares.append(changed / total)
    for sender in senders.values():
        sender.close()
    dist.barrier(group=group)
    if rank == 0:
        table = next(iter(senders.values())).table
        print(
            f"{table.payload_bytes / 1e6:.0f} MB in {len(table.manifest)} tensors, {len(table.buckets)} buckets; ",
            end="",
        )
        print(f"one AdamW step of {args.lr:g} changes {100 * statistics.median(shares):.2f}% of elements")
        for name in modes:
            low, middle, high = min(seconds[name]), statistics.median(seconds[name]), max(seconds[name])
            mb = statistics.median(sent[name]) / 1e6
            print(f"{name:17} {middle:6.3f} s ({low:.3f} to {high:.3f}), {mb:7.2f} MB between hosts")
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=300, help="bytes of the model, in MiB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--bucket-mb", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a rank")
    parser.add_argument("--keys", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.keys:
        work(args)
        return 0
    with tempfile.TemporaryDirectory() as directory:
        keys, port = Path(directory, "keys"), free_port(None)
        CurveKeys.generate().save(keys)
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--keys", str(keys), "--port", str(port)],
                env=os.environ
                | {"RANK": str(r), "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            )
            for r in range(WORLD)
        ]
        return max(abs(rank.wait()) for rank in ranks)


if __name__ == "__main__":
    sys.exit(main())
