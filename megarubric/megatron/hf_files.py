"""Hugging Face checkpoint directories: where each tensor lies, and where it will lie. Reads headers, imports no torch.

A dtype is its safetensors name ("F32", "BF16", "F16") throughout.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarubric.errors import BadInput
from megarubric.megatron.families import family_of, read_config

ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_WRITTEN_BYTES = ITEM_BYTES | {"F8_E4M3": 1}  # FP8 is written for engines, and not read
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5 << 30
CUT = "huggingface.json"  # in a converted checkpoint: how the Hugging Face files it came from were cut
# What is about one directory and not about the model.
_NOT_CARRIED = ("config.json", "manifest.json", "extra.json", CUT)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, row by row: `offset` counts bytes from the beginning of the file `path`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension."""
        return math.prod(self.shape[1:]) * _WRITTEN_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.row_bytes if self.shape else _WRITTEN_BYTES[self.dtype]


def nbytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * _WRITTEN_BYTES[dtype]


# ----------------------------------------------------------------------------------------------------------- reading


def open_checkpoint(directory: str | Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The config.json of a checkpoint directory and the places of its tensors, checked against each other.

    Raises BadInput naming file and tensor when one is missing, unexpected, of another shape or a dtype that is not a
    plain float, or a file is cut short.
    """
    hf, where = read_config(directory)
    tensors = checkpoint_tensors(directory)
    manifest = family_of(hf, where).manifest(hf)
    for name, shape in manifest.items():
        if name not in tensors:
            raise BadInput(directory, name, "is missing from the checkpoint")
        if tensors[name].shape != shape:
            found = list(tensors[name].shape)
            raise BadInput(tensors[name].path, name, f"has shape {found}, config.json asks for {list(shape)}")
    # Some writers repeat a tied embedding under the head's name; it is the same tensor.
    allowed = {"lm_head.weight"} if hf.get("tie_word_embeddings", False) else set()
    for name in sorted(tensors.keys() - manifest.keys() - allowed):
        raise BadInput(tensors[name].path, name, "is unexpected: the model of config.json has no such tensor")
    return hf, tensors


def checkpoint_tensors(directory: str | Path) -> dict[str, TensorInfo]:
    """Name -> place of every tensor of a checkpoint directory, from the headers alone. Raises BadInput."""
    directory = Path(directory)
    index = directory / INDEX
    if index.exists():
        try:
            weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(index, "weight_map", "cannot be read") from None
        if any(Path(name).name != name for name in names):
            raise BadInput(index, "weight_map", "names a file outside the directory")
    else:
        names, weight_map = [SINGLE], {}
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        tensors |= _read_header(directory / name)
    for tensor, file in weight_map.items():
        if tensor not in tensors or tensors[tensor].path.name != file:
            raise BadInput(index, tensor, f"is not in {file}")
    return tensors


def _read_header(path: Path) -> dict[str, TensorInfo]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise BadInput(path, None, "is cut short: its header is incomplete")
            return parse_header(path, file.read(length), size)
    except OSError as error:
        raise BadInput(path, None, error.strerror or str(error)) from None
    except struct.error:
        raise BadInput(path, None, "is not a safetensors file") from None


def parse_header(path: Path, text: bytes, size: int) -> dict[str, TensorInfo]:
    """The tensors of the header `text` (what follows the 8 bytes of its length) of a file of `size` bytes."""
    try:
        tensors = {}
        for name, entry in json.loads(text).items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            if begin < 0 or 8 + len(text) + end > size:
                raise BadInput(path, name, "is cut short: the file ends before the tensor does")
            if entry["dtype"] not in ITEM_BYTES:
                raise BadInput(path, name, f"has dtype {entry['dtype']}; only {', '.join(ITEM_BYTES)} can be loaded")
            info = TensorInfo(path, entry["dtype"], tuple(entry["shape"]), 8 + len(text) + begin)
            if end - begin != info.nbytes:
                raise BadInput(path, name, "has a size that does not fit its shape")
            tensors[name] = info
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(path, None, "is not a safetensors file") from None


# ----------------------------------------------------------------------------------------------------------- writing


def plan_shards(
    manifest: dict[str, tuple[int, ...]], dtypes: dict[str, str], directory: Path, max_shard_bytes: int
) -> dict[str, TensorInfo]:
    """Place every tensor, in manifest order, into files of at most `max_shard_bytes` of data (or one tensor)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in manifest.items():
        size = nbytes(shape, dtypes[name])
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    plan: dict[str, TensorInfo] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        offset = len(header({name: (dtypes[name], manifest[name]) for name in names}))
        for name in names:
            plan[name] = TensorInfo(directory / file, dtypes[name], manifest[name], offset)
            offset += plan[name].nbytes
    return plan


def header(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The beginning of a safetensors file whose tensors, name -> (dtype, shape), follow one another."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + nbytes(shape, dtype)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    return struct.pack("<Q", len(text)) + text


def by_file(plan: dict[str, TensorInfo]) -> dict[Path, dict[str, TensorInfo]]:
    files: dict[Path, dict[str, TensorInfo]] = {}
    for name, info in plan.items():
        files.setdefault(info.path, {})[name] = info
    return files


def write_headers(plan: dict[str, TensorInfo]) -> None:
    """Make the files of `plan`, at their full size, with their headers."""
    for path, infos in by_file(plan).items():
        end = max(info.offset + info.nbytes for info in infos.values())
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, end)  # a full disk is noticed now, not halfway
            file.write(header({name: (info.dtype, info.shape) for name, info in infos.items()}))


def index_text(plan: dict[str, TensorInfo]) -> str | None:
    """model.safetensors.index.json, or None for a single file, which has none."""
    if len({info.path for info in plan.values()}) == 1:
        return None
    index = {
        "metadata": {"total_size": sum(info.nbytes for info in plan.values())},
        "weight_map": {name: info.path.name for name, info in plan.items()},
    }
    return json.dumps(index, indent=2) + "\n"


def carried_files(source: Path) -> list[Path]:
    """What goes along with the weights as it is: tokenizer, chat template, generation config; not config.json."""
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and path.name not in _NOT_CARRIED
        and not path.name.startswith(".")
        and path.suffix not in _WEIGHTS
        and not path.name.endswith(".index.json")
    ]


def replace_directory(partial: Path, directory: Path) -> None:
    """Give the complete `partial` its name, in the place of an earlier one."""
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
