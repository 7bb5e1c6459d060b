"""`megarubric convert` both ways on a synthetic Qwen3-MoE checkpoint, against `cp` of the same files in the same run.

The checkpoint has Qwen3-30B-A3B's shapes (but for the smallest sizes) and as many layers as the size asks for; its
bytes are random, written a tensor at a time. Every command reads files that are not in the page cache. Memory is the
largest sum over all processes of a conversion of their resident sizes, sampled while it runs: pages that processes
share count once for each, so it is an upper bound.

    python benchmarks/convert.py                 # 12 GB; needs four times that on the disk of --directory
    python benchmarks/convert.py --gb 1
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from megarubric.megatron import hf_files
from megarubric.megatron.families import family_of


def config(gigabytes: float) -> dict[str, Any]:
    """A Qwen3-MoE of at least `gigabytes` (10**9) in bf16."""
    hf: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 151936 if gigabytes >= 4 else 16000,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128 if gigabytes >= 4 else 32,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    while size_of(hf) < gigabytes * 1e9:
        hf["num_hidden_layers"] += 1
    return hf


def size_of(hf: dict[str, Any]) -> int:
    return sum(hf_files.nbytes(shape, "BF16") for shape in family_of(hf, "config.json").manifest(hf).values())


def write_checkpoint(directory: Path, hf: dict[str, Any], shard_bytes: int) -> None:
    """A checkpoint of random bytes that depend on each tensor's name, without ever holding more than one tensor."""
    directory.mkdir(parents=True)
    manifest = family_of(hf, "config.json").manifest(hf)
    plan = hf_files.plan_shards(manifest, dict.fromkeys(manifest, "BF16"), directory, shard_bytes)
    hf_files.write_headers(plan)
    index = hf_files.index_text(plan)
    if index is not None:
        (directory / hf_files.INDEX).write_text(index)
    (directory / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    (directory / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.95}\n')
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 40960}\n')
    for path, infos in hf_files.by_file(plan).items():
        with path.open("r+b") as file:
            for name, info in infos.items():
                file.seek(info.offset)
                seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
                file.write(np.random.default_rng(seed).bytes(info.nbytes))


def forget(directory: Path) -> None:
    """Write back the files of a directory and drop them from the page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed(command: list[str]) -> tuple[float, int]:
    """Wall seconds of a command and its memory in bytes (see above)."""
    peak, stop = 0, threading.Event()

    def watch(pid: int) -> None:
        nonlocal peak
        while not stop.wait(0.02):
            peak = max(peak, sum(resident(p) for p in family(pid)))

    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    watcher = threading.Thread(target=watch, args=(process.pid,))
    watcher.start()
    status = process.wait()
    seconds = time.monotonic() - began
    stop.set()
    watcher.join()
    if status:
        sys.exit(f"{' '.join(command)} ended with status {status}")
    return seconds, peak


def family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(p for child in children for p in family(int(child)))]


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def copied(source: Path, target: Path) -> tuple[float, float]:
    """Seconds of ``cp -r``, and of writing its files back to the disk after it."""
    forget(source)
    seconds, _ = timed(["cp", "-r", str(source), str(target)])
    began = time.monotonic()
    for path in target.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    synced = time.monotonic() - began
    shutil.rmtree(target)
    return seconds, synced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=12.0, help="size of the checkpoint, in 10**9 bytes")
    parser.add_argument("--directory", type=Path, help="where to work (default: the system's temporary directory)")
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--verify", action="store_true", help="also time --verify of both results")
    a = parser.parse_args()
    hf = config(a.gb)
    size = size_of(hf)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; Qwen3-MoE of {size / 1e9:.2f} GB, bf16"
    )
    with tempfile.TemporaryDirectory(dir=a.directory, prefix="convert-") as name:
        root = Path(name)
        free = shutil.disk_usage(root).free
        if free < 4 * size:
            sys.exit(f"{free / 1e9:.0f} GB free, {4 * size / 1e9:.0f} needed")
        source, middle, back = root / "hf", root / "megatron", root / "back"
        write_checkpoint(source, hf, min(5 * 10**9, size // 3))
        megarubric = [sys.executable, "-m", "megarubric", "convert", "--processes", str(a.processes)]
        worst = 0
        for what, start, end in (
            ("Hugging Face -> Megatron", source, middle),
            ("Megatron -> Hugging Face", middle, back),
        ):
            cp, synced = copied(start, root / "copy")
            forget(start)
            seconds, peak = timed([*megarubric, str(start), str(end)])
            worst = max(worst, peak)
            print(
                f"{what}: {seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s on disk; cp {cp:.1f} s"
                f" (and {synced:.1f} s to reach the disk); throughput {cp / seconds:.2f} of cp,"
                f" {(cp + synced) / seconds:.2f} of cp on disk; peak memory {peak / 2**20:.0f} MiB"
            )
            if a.verify:
                forget(start)
                forget(end)
                seconds, peak = timed([*megarubric, "--verify", str(start), str(end)])
                print(f"  --verify: {seconds:.1f} s, peak memory {peak / 2**20:.0f} MiB")
        names = sorted(path.name for path in source.iterdir())
        if names != sorted(path.name for path in back.iterdir()):
            sys.exit("the files that came back have other names")
        differ = filecmp.cmpfiles(source, back, names, shallow=False)[1:]
        print(f"there and back: {len(names)} files, byte-identical: {'no' if any(differ) else 'yes'}")
        print(f"peak memory {worst / 2**20:.0f} MiB (limit of the issue: 2048)")
        if any(differ):
            sys.exit(1)


if __name__ == "__main__":
    main()
