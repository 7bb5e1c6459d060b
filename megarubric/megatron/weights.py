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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarubric.config.layout import ParallelLayout
from megarubric.errors import BadInput
from megarubric.megatron import hf_files
from megarubric.megatron.dist_files import open_places
from megarubric.megatron.families import family_of
from megarubric.megatron.hf_files import MAX_SHARD_BYTES, TensorInfo, plan_shards
from megarubric.megatron.pieces import Piece, model_pieces

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BUFFER_BYTES = 64 << 20


# ------------------------------------------------------------------------------------------------------------ import


def load_hf(models: Sequence[torch.nn.Module], directory: str | Path, layout: ParallelLayout) -> dict[str, Any]:
    """Fill the parameters of `models` from a checkpoint directory; returns its config.json.

    The directory is a Hugging Face checkpoint or what `megarubric convert` made of one. Any of fp32, bf16 and fp16 is
    converted to the parameters' dtype on the way. Raises BadInput naming file and tensor when one is missing,
    unexpected, of another shape or a dtype that is not a plain float, or a file is cut short.
    """
    hf, places = open_places(directory)
    with Files() as files, torch.no_grad():
        for piece in model_pieces(models, hf, layout):
            for place in places[piece.hf_name]:
                overlap = place.overlap(piece.hf_index)
                if overlap is not None:
                    stored, wanted = overlap
                    read_rectangle(files.open(place.info.path, os.O_RDONLY), place.info, stored, piece.place[wanted])
    return hf


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
                piece.place.copy_(drawn[piece.hf_index])


# ------------------------------------------------------------------------------------------------------------ export


def export_hf(
    models: Sequence[torch.nn.Module],
    directory: str | Path,
    hf_config: dict[str, Any],
    layout: ParallelLayout,
    *,
    dtype: torch.dtype | None = None,
    carry_from: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
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
    manifest = family.manifest(hf_config)
    plan = plan_shards(manifest, dict.fromkeys(manifest, _DTYPE_NAMES[dtype]), partial, max_shard_bytes)
    with _everywhere(directory, partial if first else None):
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            hf_files.write_headers(plan)
            _write_side_files(partial, plan, hf_config, dtype, Path(carry_from) if carry_from else None)
    with _everywhere(directory, partial if first else None), Files(sync=True) as files:
        for piece in pieces:
            if piece.owned:
                info = plan[piece.hf_name]
                write_rectangle(files.open(info.path, os.O_WRONLY), info, piece.hf_index, piece.local)
    with _everywhere(directory, partial if first else None):
        if first:
            hf_files.replace_directory(partial, directory)


def _write_side_files(
    partial: Path, plan: dict[str, TensorInfo], hf: dict[str, Any], dtype: torch.dtype, source: Path | None
) -> None:
    index = hf_files.index_text(plan)
    if index is not None:
        (partial / hf_files.INDEX).write_text(index)
    key = "dtype" if "dtype" in hf else "torch_dtype"  # transformers 5 and before
    config = {**hf, key: str(dtype).removeprefix("torch.")}
    (partial / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    for path in hf_files.carried_files(source) if source else ():
        shutil.copyfile(path, partial / path.name)


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


class Files:
    """Descriptors opened once and closed together, with fsync when `sync`."""

    def __init__(self, *, sync: bool = False) -> None:
        self._open: dict[Path, int] = {}
        self._sync = sync

    def open(self, path: Path, flags: int) -> int:
        if path not in self._open:
            self._open[path] = os.open(path, flags)
        return self._open[path]

    def __enter__(self) -> Files:
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
    row_bytes = info.row_bytes
    rows = index[0].stop - index[0].start
    step = max(1, _BUFFER_BYTES // row_bytes)
    for low in range(0, rows, step):
        high = min(low + step, rows)
        yield slice(low, high), info.offset + (index[0].start + low) * row_bytes, row_bytes


def read_rectangle(descriptor: int, info: TensorInfo, index: tuple[slice, ...], into: Tensor) -> None:
    """Read the rectangle `index` of a tensor. Whole rows are read, and the columns taken from them."""
    for rows, offset, _ in _blocks(info, index):
        block = torch.empty((rows.stop - rows.start, *info.shape[1:]), dtype=DTYPES[info.dtype])
        buffer = memoryview(block.view(torch.uint8).numpy().reshape(-1))
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise BadInput(info.path, None, "ended while it was read")
            done += count
        into[rows].copy_(block[(slice(None), *index[1:])])


def write_rectangle(descriptor: int, info: TensorInfo, index: tuple[slice, ...], values: Tensor) -> None:
    """Write the rectangle `index` of a tensor: whole rows at once, a part of the columns row by row."""
    for rows, offset, row_bytes in _blocks(info, index):
        block = values[rows].to(device="cpu", dtype=DTYPES[info.dtype]).contiguous()
        data = memoryview(block.view(torch.uint8).numpy().reshape(-1))
        if len(data) == block.shape[0] * row_bytes:
            _write_all(descriptor, data, offset)
            continue
        width = len(data) // block.shape[0]
        left = index[1].start * hf_files.ITEM_BYTES[info.dtype]
        for row in range(block.shape[0]):
            _write_all(descriptor, data[row * width : (row + 1) * width], offset + row * row_bytes + left)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
