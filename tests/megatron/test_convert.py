"""Conversion: there and back is byte for byte, whatever is killed, cut short, cut anew or does not fit."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file

from megarubric.cli import main
from megarubric.errors import BadInput
from megarubric.megatron import hf_files, manifest
from megarubric.megatron.convert import Options, convert, plan, verify
from megarubric.megatron.convert.bands import Sources, bands
from megarubric.megatron.convert.verb import Lines, Terminal, parse_size
from megarubric.megatron.dist_files import Place, dist_tensors
from megarubric.megatron.families import family_of

COMMON: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
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
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": COMMON | {"model_type": "qwen3_moe", "mlp_only_layers": [1]},
    "qwen3": COMMON | {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen2_moe": COMMON | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 80},
}


def write_hf(directory: Path, hf: dict[str, Any], dtype: torch.dtype = torch.bfloat16, shards: int = 3) -> Path:
    """A checkpoint as another program would write it: its own order of tensors, its own spacing of JSON.

    One shard is a file without an index.
    """
    generator = torch.Generator().manual_seed(3)
    shapes = family_of(hf, "config.json").manifest(hf)
    names = sorted(shapes)
    directory.mkdir(parents=True)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors" if shards > 1 else hf_files.SINGLE
        mine = names[number::shards]
        weight_map |= dict.fromkeys(mine, file)
        tensors = {name: torch.randn(shapes[name], generator=generator).to(dtype) for name in mine}
        save_file(tensors, directory / file, metadata={"format": "pt", "by": "a test"})
    if shards > 1:
        (directory / hf_files.INDEX).write_text(json.dumps({"weight_map": weight_map, "metadata": {}}))
    (directory / "config.json").write_text(json.dumps(hf, indent=4))
    (directory / "generation_config.json").write_text('{"top_k":  20}')
    (directory / "tokenizer.json").write_text('{"stands": "for a tokenizer"}')
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def quick(source: Path, target: Path, **options: Any) -> Any:
    return convert(source, target, Options(**({"processes": 1} | options)), Lines())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face checkpoint and its conversion."""
    root = tmp_path_factory.mktemp("pair")
    source = write_hf(root / "hf", MODELS["qwen3_moe"])
    quick(source, root / "megatron")
    return source, root / "megatron"


# ------------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("name,shards", [("qwen3_moe", 3), ("qwen3", 1), ("qwen2_moe", 2)])
def test_there_and_back_is_byte_for_byte(name: str, shards: int, tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", MODELS[name], shards=shards)
    there = quick(source, tmp_path / "megatron")
    back = quick(tmp_path / "megatron", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)
    size = sum(t.numel() * 2 for path in source.glob("*.safetensors") for t in load_file(path).values())
    assert there.nbytes == back.nbytes == size and there.resumed == 0
    assert (there.direction, back.direction) == ("Hugging Face to Megatron", "Megatron to Hugging Face")
    for a, b in ((source, tmp_path / "megatron"), (tmp_path / "megatron", tmp_path / "back")):
        assert verify(a, b, Options(processes=1), Lines()) == there.tensors
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_format_is_torchs(pair: tuple[Path, Path]) -> None:
    """torch's own reader finds every global tensor, as the rows of the Hugging Face tensors it is made of."""
    import torch.distributed.checkpoint as dcp

    source, converted = pair
    hf = MODELS["qwen3_moe"]
    theirs: dict[str, torch.Tensor] = {}
    for path in source.glob("*.safetensors"):
        theirs |= load_file(path)
    tensors = dist_tensors(family_of(hf, "config.json"), hf)
    state = {key: torch.zeros(tensor.shape, dtype=torch.bfloat16) for key, tensor in tensors.items()}
    dcp.load(state, checkpoint_id=converted / "weights", no_dist=True)
    for key, tensor in tensors.items():
        rows = torch.cat([theirs[run.name][run.start : run.stop] for run in tensor.runs])
        assert state[key].equal(rows.reshape(tensor.shape)), key
    # And each archive is one that any zip program finds whole.
    raw = (converted / "weights" / "__0_0.distcp").read_bytes()
    begin = raw.index(b"PK\x05\x06")  # end of the first archive
    with (converted / "first.zip").open("wb") as out:
        out.write(raw[: begin + 22])
    with zipfile.ZipFile(converted / "first.zip") as archive:
        assert archive.testzip() is None and "archive/data/0" in archive.namelist()
    (converted / "first.zip").unlink()


def test_large_tensors_are_cut_and_files_filled(pair: tuple[Path, Path], monkeypatch: Any, tmp_path: Path) -> None:
    source, _ = pair
    monkeypatch.setattr(plan, "ARCHIVE_BYTES", 3_000)
    monkeypatch.setattr(plan, "FILE_BYTES", 40_000)
    monkeypatch.setattr(plan, "RANGE_BYTES", 7_000)
    quick(source, tmp_path / "megatron")
    files = list((tmp_path / "megatron" / "weights").glob("__[0-9]*.distcp"))
    assert len(files) > 10 and max(f.stat().st_size for f in files) < 120_000
    quick(tmp_path / "megatron", tmp_path / "back", processes=2)
    assert contents(tmp_path / "back") == contents(source)


def test_weights_alone_and_a_config_from_elsewhere(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, converted = pair
    quick(converted / "weights", tmp_path / "out", config=source)
    assert verify(converted / "weights", tmp_path / "out", Options(processes=1, config=source), Lines())
    assert verify(converted, tmp_path / "out", Options(processes=1, max_shard_bytes=1 << 30), Lines())
    assert [p.name for p in hf_files.carried_files(converted)] == ["generation_config.json", "tokenizer.json"]
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "tokenizer.json", hf_files.SINGLE}


def test_cut_anew(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, converted = pair
    quick(converted, tmp_path / "back", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "back" / hf_files.INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[-1] == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    theirs: dict[str, torch.Tensor] = {}
    for path in source.glob("*.safetensors"):
        theirs |= load_file(path)
    seen = 0
    for file in files:
        tensors = load_file(tmp_path / "back" / file)
        nbytes = sum(t.nbytes for t in tensors.values())
        assert nbytes <= 100_000
        seen += nbytes
        for name, tensor in tensors.items():
            assert index["weight_map"][name] == file and tensor.equal(theirs.pop(name))
    assert not theirs and index["metadata"]["total_size"] == seen
    assert verify(converted, tmp_path / "back", Options(max_shard_bytes=100_000), Lines())


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 12), data=st.data())
def test_bands_weave_any_tiling(tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, data: Any) -> None:
    """A tensor stored in tiles, each in a file of its own, is read back whole and from any row to any other."""
    whole = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    directory = tmp_path_factory.mktemp("tiles")
    edges = [0, *sorted(data.draw(st.sets(st.integers(1, rows), max_size=4)) | {rows})]
    places = []
    for top, bottom in itertools.pairwise(edges):
        cuts = [0, *sorted(data.draw(st.sets(st.integers(1, columns), max_size=3)) | {columns})]
        for left, right in itertools.pairwise(cuts):
            path = directory / f"{top}-{left}"
            path.write_bytes(b"skip" + whole[top:bottom, left:right].tobytes())
            places.append(Place(top, left, hf_files.TensorInfo(path, "F32", (bottom - top, right - left), 4)))
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    with Sources() as sources:
        found = b"".join(bytes(v) for band in bands(places, first, last, columns * 4) for v in sources.read(band))
    assert found == whole[first:last].tobytes()


# ---------------------------------------------------------------------------------------------------------- refusals


def refused(*arguments: object) -> str:
    """The one line `megarubric convert` ends with, status 2."""
    command = [sys.executable, "-m", "megarubric", "convert", *(str(a) for a in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not done.stdout, done
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("megarubric convert: ")]
    return line.removeprefix("megarubric convert: ")


def change_config(directory: Path, **fields: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


def test_config_that_does_not_fit_the_tensors(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", MODELS["qwen3_moe"])
    quick(source, tmp_path / "megatron")
    target = tmp_path / "out"
    change_config(source, num_hidden_layers=4)
    assert refused(source, target) == f"{source}: model.layers.3.input_layernorm.weight: is missing from the checkpoint"
    converted = change_config(tmp_path / "megatron", num_experts=16)
    weights = converted / "weights"
    shape = "has shape [8, 64], config.json asks for [16, 64]"
    assert refused(converted, target) == f"{weights}: decoder.layers.0.mlp.router.weight: {shape}"
    change_config(converted, num_experts=8, num_hidden_layers=2)
    assert refused(converted, target).endswith("is unexpected: the model of config.json has no such tensor")
    change_config(converted, num_hidden_layers=4)
    assert refused(converted, target).endswith("is missing: config.json does not describe this checkpoint")
    (converted / "config.json").unlink()
    assert refused(converted, target) == f"{converted / 'config.json'}: No such file or directory"
    assert not target.exists() and [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_verify_names_what_differs(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = pair
    bad = tmp_path / "megatron"

    def said(change: Callable[[], object]) -> str:
        quick(source, bad)
        change()
        with pytest.raises(BadInput) as caught:
            verify(source, bad, Options(processes=1), Lines())
        subprocess.run(["rm", "-r", str(bad)], check=True)
        return str(caught.value)

    assert said(lambda: flip(bad / "weights" / "__0_0.distcp")).endswith(": differs from the source")
    assert "huggingface.json" in said(lambda: (bad / "huggingface.json").write_text('{"headers":{},"index":null}'))
    assert said(lambda: flip(bad / "tokenizer.json")) == f"{bad}: tokenizer.json: is not the source's"
    assert "rope_theta: is 5, the source has" in said(lambda: change_config(bad, rope_theta=5))
    listed = said(lambda: flip(bad / "weights" / "metadata.json"))  # a file that only Megatron itself reads
    assert listed == f"{bad}: weights/metadata.json: is corrupt: its hash is not the manifest's"


def test_refusals(pair: tuple[Path, Path], monkeypatch: Any, tmp_path: Path) -> None:
    source, converted = pair
    assert refused(source, converted) == f"{converted}: exists already; --verify would compare it with the source"
    assert refused(converted, tmp_path / "x", "--max-shard-size", "many").startswith("command line: --max-shard-size: ")
    only_back = "is for the way from Megatron to Hugging Face"
    assert refused(source, tmp_path / "x", "--max-shard-size", "5GB") == f"command line: --max-shard-size: {only_back}"
    assert refused(tmp_path, tmp_path / "x") == f"{tmp_path / 'config.json'}: No such file or directory"

    class Full:
        free = 1 << 20

    monkeypatch.setattr("megarubric.megatron.convert.conversion.shutil.disk_usage", lambda path: Full)
    with pytest.raises(BadInput, match=r"no room: \d+ MiB needed, 1 MiB free"):
        quick(source, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_head_repeated_beside_tied_embeddings(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", MODELS["qwen3"], shards=1)
    weights = source / hf_files.SINGLE
    tensors = load_file(weights)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, weights)
    quick(source, tmp_path / "megatron")
    quick(tmp_path / "megatron", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)
    assert verify(tmp_path / "megatron", tmp_path / "back", Options(processes=1), Lines()) == len(tensors) + 1
    head[3, 3] += 1
    save_file(tensors | {"lm_head.weight": head}, weights)
    quick(source, tmp_path / "other")
    with pytest.raises(BadInput, match=r"lm_head\.weight: differs from the source"):
        verify(source, tmp_path / "other", Options(processes=1), Lines())


def test_what_would_not_come_back_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Bytes that no tensor has; a converted directory that is not whole; a recorded cut of other tensors."""
    source = write_hf(tmp_path / "hf", MODELS["qwen3_moe"], shards=1)
    weights = source / hf_files.SINGLE
    weights.write_bytes(weights.read_bytes() + b"more")
    with pytest.raises(BadInput, match=r"model\.safetensors: has bytes that belong to no tensor"):
        quick(source, tmp_path / "out")
    bad = tmp_path / "bad"
    for spoil, reason in (
        (lambda: (bad / "manifest.json").unlink(), "manifest.json: is missing: the checkpoint is incomplete"),
        (lambda: os.truncate(bad / "weights" / "__0_0.distcp", 9), "__0_0.distcp: has 9 bytes, the manifest says"),
        (lambda: (bad / "huggingface.json").write_text('{"headers": {}}'), "huggingface.json: cannot be read"),
        (lambda: (bad / "huggingface.json").write_text('{"headers": {}, "index": null}'), "does not list the tensors"),
    ):
        subprocess.run(["cp", "-r", str(pair[1]), str(bad)], check=True)
        spoil()
        with pytest.raises(BadInput, match=reason):
            quick(bad, tmp_path / "out")
        subprocess.run(["rm", "-r", str(bad)], check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_tensors_that_cannot_be_joined(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", MODELS["qwen3_moe"], shards=1)
    weights = next(source.glob("*.safetensors"))
    tensors = load_file(weights)
    name = "model.layers.0.self_attn.k_proj.weight"
    save_file(tensors | {name: tensors[name].float()}, weights)
    with pytest.raises(BadInput, match="are one tensor in Megatron, and differ in dtype: BF16, F32"):
        quick(source, tmp_path / "out")


def test_foreign_objects_are_refused_and_nothing_runs(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, converted = pair
    ran = tmp_path / "ran"

    class Command:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {ran}",)

    bad = tmp_path / "bad"
    subprocess.run(["cp", "-r", str(converted), str(bad)], check=True)
    metadata = bad / "weights" / ".metadata"
    good = metadata.read_bytes()
    for content, reason in (
        (pickle.dumps(Command()), "is refused: names posix.system, which no checkpoint needs"),
        # A dotted name under an allowed module would reach anything that module imports.
        (b"\x80\x04\x8c\x29torch.distributed.checkpoint.filesystem\x8c\tos.system\x93.", "is refused: "),
        (good[: len(good) // 2], "is refused: "),
        (pickle.dumps({"no": "metadata"}), "is not the metadata of a distributed checkpoint"),
        (b"", "is refused: "),
    ):
        metadata.write_bytes(content)
        with pytest.raises(BadInput) as caught:
            quick(bad / "weights", tmp_path / "out", config=bad)
        assert str(caught.value).startswith(f"{bad / 'weights'}: .metadata: {reason}")
    assert not ran.exists()


# ------------------------------------------------------------------------------------------------------ command line


def test_the_verb(tmp_path: Path, capsys: Any) -> None:
    source = write_hf(tmp_path / "hf", MODELS["qwen3"], torch.float32, shards=1)
    there, back = tmp_path / "megatron", tmp_path / "back"
    assert main(["convert", str(source), str(there), "--verify", "--processes", "1"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0].startswith("Hugging Face to Megatron: 35 tensors, ")
    assert said.out.splitlines()[1].startswith("verified: 35 tensors equal bit for bit")
    assert said.err.splitlines()[0].startswith("writing distributed checkpoint: ")
    assert main(["convert", str(there), str(back), "--json", "--processes", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 35
    assert main(["convert", str(there), str(back), "--verify", "--json"]) == 0  # it is there: only compared
    assert json.loads(capsys.readouterr().out) == {"source": str(there), "target": str(back), "verified": 35}
    listed = manifest.check(there)
    assert listed.dtype == "float32" and listed.world_size == 0 and "tokenizer.json" in listed.files


def test_the_tool_is_the_verb() -> None:
    tool = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
    done = subprocess.run([sys.executable, str(tool), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "SRC DST" in done.stdout and "--verify" in done.stdout


def test_engines_say_that_they_do_not_read_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from megarubric.config import load_train
    from megarubric.launch.plan import engine_config

    _, converted = pair
    (tmp_path / "run.yaml").write_text(f"name: t\nmodel: {{path: {converted}}}\ndata: {{train: d.jsonl}}\n")
    with pytest.raises(BadInput, match="holds a Megatron checkpoint, which engines do not read"):
        engine_config(load_train(tmp_path / "run.yaml"), "policy")


def test_progress(monkeypatch: Any, capsys: Any) -> None:
    """A line when five seconds have passed, with speed and time left of this start alone; a bar without a thread."""
    now = 100.0
    monkeypatch.setattr("megarubric.megatron.convert.verb.time.monotonic", lambda: now)
    lines = Lines()
    lines.start("copying", 1_000_000_000, 400_000_000)
    for now, done in ((103.0, 500), (106.0, 460), (107.0, 480), (112.0, 700)):  # noqa: B007
        lines.advance(done * 1_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "copying: 1.00 GB, 400 MB done",
        "copying: 460 MB of 1.00 GB, 10 MB/s, 54 s left",
        "copying: 700 MB of 1.00 GB, 25 MB/s, 12 s left",
    ]
    out = io.StringIO()
    threads = threading.active_count()
    bar = Terminal(Console(file=out, force_terminal=True, width=100, color_system=None))
    bar.start("copying", 1_000_000, 0)
    assert threading.active_count() == threads
    bar.advance(500_000)
    bar.end()
    assert "copying" in out.getvalue() and "0.5/1.0 MB" in out.getvalue()


def test_sizes() -> None:
    assert [parse_size(t) for t in ("5GB", "500 MB", "2GiB", "1.5kb", "7")] == [
        5 * 10**9,
        500 * 10**6,
        2 << 30,
        1500,
        7,
    ]
    for text in ("", "GB", "0", "-1", "5 parsecs"):
        with pytest.raises(BadInput):
            parse_size(text)
