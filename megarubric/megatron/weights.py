"""Weights in and out in Hugging Face's layout (config.json, safetensors, tokenizer files), on any parallel layout.

Every rank reads from, and writes to, the byte ranges of its own pieces; no tensor is gathered and no file is mapped
into memory, so a rank's footprint is its share of the model plus one buffer. The directory must be visible to all
ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarubric.errors import BadInput
from megarubric.megatron.families import family_of, read_config
from megarubric.megatron.layout import ParallelLayout
from megarubric.megatron.pieces import Piece, model_pieces

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BUFFER_BYTES = 64 << 20
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `offset` counts bytes from the beginning of the file `path`."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


# ------------------------------------------------------------------------------------------------------------ import


def load_hf(models: Sequence[torch.nn.Module], directory: str | Path, layout: ParallelLayout) -> dict[str, Any]:
    """Fill the parameters of `models` from a checkpoint directory; returns its config.json.

    Any of fp32, bf16 and fp16 is converted to the parameters' dtype on the way. Raises BadInput naming file and tensor
    when one is missing, unexpected, of another shape or a dtype that is not a plain float, or a file is cut short.
    """
    hf, tensors = open_checkpoint(directory)
    with _Files() as files, torch.no_grad():
        for piece in model_pieces(models, hf, layout):
            info = tensors[piece.hf_name]
            _read(files.open(info.path, os.O_RDONLY), info, piece.hf_index, piece.local)
    return hf


def open_checkpoint(directory: str | Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The config.json of a checkpoint directory and the places of its tensors, checked against each other.

    Reads headers only. Raises BadInput as `load_hf` does.
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
    index = directory / _INDEX
    if index.exists():
        try:
            weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(index, "weight_map", "cannot be read") from None
        if any(Path(name).name != name for name in names):
            raise BadInput(index, "weight_map", "names a file outside the directory")
    else:
        names, weight_map = [_SINGLE], {}
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
            header = json.loads(file.read(length))
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            if begin < 0 or 8 + length + end > size:
                raise BadInput(path, name, "is cut short: the file ends before the tensor does")
            if entry["dtype"] not in _DTYPES:
                raise BadInput(path, name, f"has dtype {entry['dtype']}; only {', '.join(_DTYPES)} can be loaded")
            info = TensorInfo(path, _DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + begin)
            if end - begin != _nbytes(info.shape, info.dtype):
                raise BadInput(path, name, "has a size that does not fit its shape")
            tensors[name] = info
        return tensors
    except OSError as error:
        raise BadInput(path, None, error.strerror or str(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        raise BadInput(path, None, "is not a safetensors file") from None


def init_weights(
    models: Sequence[torch.nn.Module], hf_config: dict[str, Any], layout: ParallelLayout, seed: int
) -> None:
    """Draw fresh weights: normal with `initializer_range` (0.02), norms 1.

    A tensor's values depend on `seed` and its Hugging Face name alone, so every layout starts from the same model.
    """
    std = float(hf_config.get("initializer_range", 0.02))
    by_name: dict[str, list[Piece]] = {}
    for piece in model_pieces(models, hf_config, layout):
        by_name.setdefault(piece.hf_name, []).append(piece)
    with torch.no_grad():
        for name, pieces in by_name.items():
            shape = pieces[0].hf_shape
            if len(shape) == 1:
                drawn = torch.ones(shape)
            else:
                digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
                drawn = torch.empty(shape).normal_(std=std, generator=generator)
            for piece in pieces:
                piece.local.copy_(drawn[piece.hf_index])


# ------------------------------------------------------------------------------------------------------------ export


def export_hf(
    models: Sequence[torch.nn.Module],
    directory: str | Path,
    hf_config: dict[str, Any],
    layout: ParallelLayout,
    *,
    dtype: torch.dtype | None = None,
    carry_from: str | Path | None = None,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Write `directory` as a Hugging Face checkpoint; every rank calls it and writes its owned pieces in place.

    `dtype` defaults to the parameters'. Tokenizer, chat template and generation config are copied from `carry_from`.
    The directory appears whole or not at all: it is written beside and renamed, replacing one that was there. Raises
    BadInput, on every rank, when a rank could not write (disk full, no permission).
    """
    directory = Path(directory)
    family = family_of(hf_config, "config.json")
    pieces = model_pieces(models, hf_config, layout)
    dtype = dtype or pieces[0].param.dtype
    partial = directory.with_name(f".{directory.name}.partial")
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    plan = plan_shards(family.manifest(hf_config), dtype, partial, max_shard_bytes)
    with _everywhere(directory, partial if first else None):
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write_headers(plan)
            _write_side_files(partial, plan, hf_config, dtype, Path(carry_from) if carry_from else None)
    with _everywhere(directory, partial if first else None), _Files(sync=True) as files:
        for piece in pieces:
            if piece.owned:
                info = plan[piece.hf_name]
                _write(files.open(info.path, os.O_WRONLY), info, piece.hf_index, piece.local)
    with _everywhere(directory, partial if first else None):
        if first:
            _replace(partial, directory)


def plan_shards(
    manifest: dict[str, tuple[int, ...]], dtype: torch.dtype, directory: Path, max_shard_bytes: int
) -> dict[str, TensorInfo]:
    """Place every tensor, in manifest order, into files of at most `max_shard_bytes` (or one tensor)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in manifest.items():
        nbytes = _nbytes(shape, dtype)
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    plan: dict[str, TensorInfo] = {}
    for number, names in enumerate(shards, 1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        offset = len(_header({name: manifest[name] for name in names}, dtype))
        for name in names:
            plan[name] = TensorInfo(directory / file, dtype, manifest[name], offset)
            offset += _nbytes(manifest[name], dtype)
    return plan


def _header(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        nbytes = _nbytes(shape, dtype)
        entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    return struct.pack("<Q", len(text)) + text


def _write_headers(plan: dict[str, TensorInfo]) -> None:
    by_file: dict[Path, dict[str, TensorInfo]] = {}
    for name, info in plan.items():
        by_file.setdefault(info.path, {})[name] = info
    for path, infos in by_file.items():
        dtype = next(iter(infos.values())).dtype
        end = max(info.offset + _nbytes(info.shape, dtype) for info in infos.values())
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, end)  # a full disk is noticed now, not halfway
            file.write(_header({name: info.shape for name, info in infos.items()}, dtype))


def _write_side_files(
    partial: Path, plan: dict[str, TensorInfo], hf: dict[str, Any], dtype: torch.dtype, source: Path | None
) -> None:
    if len({info.path for info in plan.values()}) > 1:
        index = {
            "metadata": {"total_size": sum(_nbytes(info.shape, dtype) for info in plan.values())},
            "weight_map": {name: info.path.name for name, info in plan.items()},
        }
        (partial / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    key = "dtype" if "dtype" in hf else "torch_dtype"  # transformers 5 and before
    config = {**hf, key: str(dtype).removeprefix("torch.")}
    (partial / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
    for path in sorted(source.iterdir()) if source else ():
        made_here = path.name in ("config.json", _INDEX) or path.name.startswith(".")
        is_weights = path.suffix in weights or path.name.endswith(".index.json")
        if path.is_file() and not made_here and not is_weights:
            shutil.copyfile(path, partial / path.name)


def _replace(partial: Path, directory: Path) -> None:
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


class _everywhere:
    """A step all ranks leave together: an OSError on one becomes BadInput on all, and the partial directory goes."""

    def __init__(self, directory: Path, partial: Path | None) -> None:
        self.directory, self.partial = directory, partial

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None and not isinstance(error, OSError):
            return  # a bug, or an interrupt: the collective's time limit ends the other ranks
        failed = error is not None
        if torch.distributed.is_initialized():
            device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            flag = torch.tensor([int(failed)], device=device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            failed = bool(flag.item())
        if failed:
            if self.partial is not None:
                shutil.rmtree(self.partial, ignore_errors=True)
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error or "a rank could not write")
            raise BadInput(self.directory, None, f"the export failed: {reason}") from None


# --------------------------------------------------------------------------------------------------------- rectangles


def _nbytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count


class _Files:
    """Descriptors opened once and closed together, with fsync when `sync`."""

    def __init__(self, *, sync: bool = False) -> None:
        self._open: dict[Path, int] = {}
        self._sync = sync

    def open(self, path: Path, flags: int) -> int:
        if path not in self._open:
            self._open[path] = os.open(path, flags)
        return self._open[path]

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            for descriptor in self._open.values():
                if self._sync and error is None:
                    os.fsync(descriptor)
        finally:
            for descriptor in self._open.values():
                os.close(descriptor)


def _blocks(info: TensorInfo, index: tuple[slice, ...]) -> Iterator[tuple[slice, int, int]]:
    """Cut a rectangle into blocks of whole rows, within the buffer size.

    Yields (rows of the rectangle, where the first begins in the file, bytes of a whole row).
    """
    row_bytes = _nbytes(info.shape[1:], info.dtype)
    rows = index[0].stop - index[0].start
    step = max(1, _BUFFER_BYTES // row_bytes)
    for low in range(0, rows, step):
        high = min(low + step, rows)
        yield slice(low, high), info.offset + (index[0].start + low) * row_bytes, row_bytes


def _read(descriptor: int, info: TensorInfo, index: tuple[slice, ...], into: Tensor) -> None:
    """Read the rectangle `index` of a tensor. Whole rows are read, and the columns taken from them."""
    for rows, offset, _ in _blocks(info, index):
        block = torch.empty((rows.stop - rows.start, *info.shape[1:]), dtype=info.dtype)
        buffer = memoryview(block.view(torch.uint8).numpy().reshape(-1))
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise BadInput(info.path, None, "ended while it was read")
            done += count
        into[rows].copy_(block[(slice(None), *index[1:])])


def _write(descriptor: int, info: TensorInfo, index: tuple[slice, ...], values: Tensor) -> None:
    """Write the rectangle `index` of a tensor: whole rows at once, a part of the columns row by row."""
    for rows, offset, row_bytes in _blocks(info, index):
        block = values[rows].to(device="cpu", dtype=info.dtype).contiguous()
        data = memoryview(block.view(torch.uint8).numpy().reshape(-1))
        if len(data) == block.shape[0] * row_bytes:
            _write_all(descriptor, data, offset)
            continue
        width = len(data) // block.shape[0]
        left = index[1].start * info.dtype.itemsize
        for row in range(block.shape[0]):
            _write_all(descriptor, data[row * width : (row + 1) * width], offset + row * row_bytes + left)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
