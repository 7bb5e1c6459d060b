"""A conversion that was killed, or ran out of disk, goes on; and takes nothing that is not its own."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megarubric.megatron import hf_files
from megarubric.megatron.convert import Options, convert, verify
from megarubric.megatron.convert.verb import Lines
from megarubric.megatron.families import family_of

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 131,
    "hidden_size": 64,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def write_hf(directory: Path) -> Path:
    """A checkpoint of random bytes in four files."""
    directory.mkdir()
    manifest = family_of(CONFIG, "config.json").manifest(CONFIG)
    plan = hf_files.plan_shards(manifest, dict.fromkeys(manifest, "BF16"), directory, 260_000)
    hf_files.write_headers(plan)
    (directory / hf_files.INDEX).write_text(hf_files.index_text(plan) or "")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_text('{"stands": "for a tokenizer"}')
    generator = np.random.default_rng(3)
    for path, infos in hf_files.by_file(plan).items():
        with path.open("r+b") as file:
            file.seek(min(info.offset for info in infos.values()))
            file.write(generator.bytes(sum(info.nbytes for info in infos.values())))
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def quick(source: Path, target: Path) -> Any:
    return convert(source, target, Options(processes=1), Lines())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face checkpoint and its conversion."""
    root = tmp_path_factory.mktemp("pair")
    source = write_hf(root / "hf")
    quick(source, root / "megatron")
    return source, root / "megatron"


_KILLED = """
import os, signal, sys
from megarubric import cli
from megarubric.megatron.convert import plan, pool
plan.FILE_BYTES = plan.RANGE_BYTES = 60_000
who, at = sys.argv.pop(1), 3
counts = {"worker": 0, "asker": 0}
def seen(what):
    counts[what] += 1
    if what == who and counts[what] == at:
        os.kill(os.getpid(), signal.SIGKILL)
def watched(function):
    def call(descriptor):
        seen("worker")  # a unit is written, and not yet known to be
        return function(descriptor)
    return call
os.fsync, os.fdatasync, run = watched(os.fsync), watched(os.fdatasync), pool.run
def watched_run(*arguments, finished, **options):
    def call(*result):
        finished(*result)
        seen("asker")
    run(*arguments, finished=call, **options)
pool.run = watched_run
sys.exit(cli.main(sys.argv[1:]))
"""


def run_killed(who: str, *arguments: object, file_limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """`megarubric convert` where a process gets SIGKILL: one that writes, or the one that asked, or "nobody".

    `file_limit` stands in for a disk that fills up: no file gets more bytes.
    """
    command = [sys.executable, "-c", _KILLED, who, "convert", *(str(a) for a in arguments)]
    limit = None if file_limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    return subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=limit)


def writers(target: Path) -> list[str]:
    """Processes that are converting to `target`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(target).encode() in words:
            found.append(entry.parent.name)
    return found


@pytest.mark.parametrize("processes,who", [(1, "worker"), (2, "worker"), (2, "asker")])
def test_a_killed_conversion_goes_on(pair: tuple[Path, Path], processes: int, who: str, tmp_path: Path) -> None:
    source, converted = pair
    start, end = (source, tmp_path / "out") if who == "worker" and processes == 2 else (converted, tmp_path / "out")
    first = run_killed(who, start, end, "--processes", processes)
    if (processes, who) == (2, "worker"):  # said in one line, state kept
        assert first.returncode == 3 and "run the same command again" in first.stderr.splitlines()[-1]
    else:
        assert first.returncode == -signal.SIGKILL
    assert not end.exists()
    again = run_killed("nobody", start, end, "--processes", processes, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["bytes_of_an_earlier_start"] > 0
    if start == source:
        assert verify(source, end, Options(processes=1), Lines())
    else:
        assert contents(end) == contents(source)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert writers(end) == []


def full_disk(source: Path, target: Path, processes: int, limit: int) -> None:
    full = run_killed("nobody", source, target, "--processes", processes, file_limit=limit)
    assert full.returncode == 2 and not target.exists(), full
    last = full.stderr.splitlines()[-1]
    assert last.startswith("megarubric convert: ") and "File too large" in last and "Traceback" not in full.stderr


def test_a_disk_that_fills_up(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, converted = pair
    full_disk(source, tmp_path / "of-two", 2, 65_000)
    full_disk(converted, tmp_path / "back", 1, 200_000)
    full_disk(source, tmp_path / "out", 1, 65_000)
    again = run_killed("nobody", source, tmp_path / "out", "--processes", 1, "--json")  # with room
    assert again.returncode == 0, again
    assert json.loads(again.stdout)["bytes_of_an_earlier_start"] > 0  # the first file was small enough
    assert verify(source, tmp_path / "out", Options(processes=1), Lines())


def test_a_start_on_other_files_takes_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    assert run_killed("worker", source, tmp_path / "out", "--processes", 1).returncode == -signal.SIGKILL
    assert quick(source, tmp_path / "out").resumed == 0  # it cuts its files otherwise: nothing fits
    subprocess.run(["rm", "-r", str(tmp_path / "out")], check=True)
    assert run_killed("worker", source, tmp_path / "out", "--processes", 1).returncode == -signal.SIGKILL
    weights = next(source.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    again = run_killed("nobody", source, tmp_path / "out", "--processes", 1, "--json")
    assert json.loads(again.stdout)["bytes_of_an_earlier_start"] == 0
    assert verify(source, tmp_path / "out", Options(), Lines())
