"""What a conversion writes: files, and in them units of work that one process does alone and a restart need not repeat.

Towards Megatron a unit is a whole file of archives, hashed as it is written. Towards Hugging Face it is a range of a
safetensors file whose header is already there.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from megarubric.errors import BadInput
from megarubric.megatron import hf_files
from megarubric.megatron.convert.bands import Band, bands
from megarubric.megatron.dist_files import DistTensor, Places
from megarubric.megatron.hf_files import CUT, ITEM_BYTES, TensorInfo

ARCHIVE_BYTES = 256 << 20  # a larger tensor is stored in several rectangles of whole rows: Megatron reads one at a time
FILE_BYTES = 512 << 20  # of archives in one .distcp file
RANGE_BYTES = 256 << 20  # of a safetensors file in one unit


class Cut(msgspec.Struct, frozen=True):
    """huggingface.json: the headers of the safetensors files, byte for byte, and the index."""

    headers: dict[str, str]
    index: str | None


class Piece(NamedTuple):
    """Rows [first, last) of a Hugging Face tensor."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class Archive:
    """A rectangle of a distributed tensor, to be one torch.save archive."""

    key: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Unit:
    """`file` gets either `archives`, one after the other, or from `offset` on the rows of `pieces`."""

    file: str
    nbytes: int
    archives: tuple[Archive, ...] = ()
    offset: int = 0
    pieces: tuple[Piece, ...] = ()


def piece_bands(places: Places, piece: Piece, manifest: dict[str, tuple[int, ...]]) -> list[Band]:
    row = math.prod(manifest[piece.name][1:]) * ITEM_BYTES[places[piece.name][0].info.dtype]
    return bands(places[piece.name], piece.first, piece.last, row)


# --------------------------------------------------------------------------------------------------------- to Megatron


def megatron_units(tensors: dict[str, DistTensor], places: Places, where: Path) -> list[Unit]:
    """Pack the archives of all tensors, in order, into files. Raises BadInput for tensors that cannot be joined."""
    units: list[Unit] = []
    archives: list[Archive] = []

    def close() -> None:
        if archives:
            nbytes = sum(archive.nbytes for archive in archives)
            units.append(Unit(f"__{len(units)}_0.distcp", nbytes, tuple(archives)))
            archives.clear()

    filled = 0
    for key, tensor in tensors.items():
        dtypes = {info.dtype for run in tensor.runs for info in (p.info for p in places[run.name])}
        if len(dtypes) > 1:
            names = ", ".join(sorted({run.name for run in tensor.runs})[:3])
            raise BadInput(
                where, names, f"are one tensor in Megatron, and differ in dtype: {', '.join(sorted(dtypes))}"
            )
        for archive in _cut(key, tensor, dtypes.pop()):
            if filled + archive.nbytes > FILE_BYTES:
                close()
                filled = 0
            archives.append(archive)
            filled += archive.nbytes
    close()
    return units


def _cut(key: str, tensor: DistTensor, dtype: str) -> Iterator[Archive]:
    """One archive an expert, one a tensor otherwise, or more by rows where that would be too large."""
    row_bytes = math.prod(tensor.shape[1:] if len(tensor.shape) < 3 else tensor.shape[2:]) * ITEM_BYTES[dtype]
    experts, rows = (1, tensor.shape[0]) if len(tensor.shape) < 3 else tensor.shape[:2]
    step = max(1, ARCHIVE_BYTES // row_bytes)
    pieces = _Rows(tensor)
    for expert in range(experts):
        for top in range(0, rows, step):
            bottom = min(top + step, rows)
            found = pieces.take(bottom - top)
            if len(tensor.shape) == 3:
                yield Archive(key, dtype, (expert, top, 0), (1, bottom - top, tensor.shape[2]), found)
            else:
                rest = tensor.shape[1:]
                yield Archive(key, dtype, (top, *(0 for _ in rest)), (bottom - top, *rest), found)


class _Rows:
    """Takes rows from the runs of a tensor, top to bottom."""

    def __init__(self, tensor: DistTensor) -> None:
        self._runs = iter(tensor.runs)
        self._name, self._next, self._stop = "", 0, 0

    def take(self, rows: int) -> tuple[Piece, ...]:
        pieces = []
        while rows:
            if self._next == self._stop:
                run = next(self._runs)
                self._name, self._next, self._stop = run.name, run.start, run.stop
            count = min(rows, self._stop - self._next)
            pieces.append(Piece(self._name, self._next, self._next + count))
            self._next += count
            rows -= count
        return tuple(pieces)


def read_cut(directory: Path, places: Places) -> Cut:
    """How the safetensors files of a Hugging Face directory are cut."""
    headers = {}
    for path in sorted({place.info.path for found in places.values() for place in found}):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            text = file.read(length)
        size = path.stat().st_size
        held = sum(info.nbytes for info in hf_files.parse_header(path, text, size).values())
        if 8 + length + held != size:
            raise BadInput(path, None, "has bytes that belong to no tensor, or tensors that share some")
        headers[path.name] = text.decode()
    index = directory / hf_files.INDEX
    return Cut(headers, index.read_text(encoding="utf-8") if index.exists() else None)


# ----------------------------------------------------------------------------------------------------- to Hugging Face


@dataclass(frozen=True)
class HfFile:
    name: str
    beginning: bytes
    nbytes: int


@dataclass(frozen=True)
class HfPlan:
    """The files to make, the index, and where each tensor goes."""

    files: tuple[HfFile, ...]
    index: str | None
    tensors: dict[str, TensorInfo]


def hf_plan(
    manifest: dict[str, tuple[int, ...]], places: Places, cut: Cut | None, max_shard_bytes: int, where: Path
) -> HfPlan:
    """Cut as `cut` says, or anew into files of at most `max_shard_bytes`. Raises BadInput for a cut that cannot be."""
    root = Path()
    if cut is None:
        dtypes = {name: places[name][0].info.dtype for name in manifest}
        plan = hf_files.plan_shards(manifest, dtypes, root, max_shard_bytes)
        files = []
        for path, infos in hf_files.by_file(plan).items():
            beginning = hf_files.header({name: (info.dtype, info.shape) for name, info in infos.items()})
            files.append(HfFile(path.name, beginning, max(i.offset + i.nbytes for i in infos.values())))
        return HfPlan(tuple(files), hf_files.index_text(plan), plan)
    tensors: dict[str, TensorInfo] = {}
    files = []
    for name, text in cut.headers.items():
        if Path(name).name != name:
            raise BadInput(where / CUT, name, "lies outside the directory")
        data = text.encode()
        infos = hf_files.parse_header(root / name, data, 1 << 62)
        end = max([8 + len(data), *(info.offset + info.nbytes for info in infos.values())])
        files.append(HfFile(name, struct.pack("<Q", len(data)) + data, end))
        tensors |= infos
    # The head may be repeated beside tied embeddings, which have none of their own.
    if tensors.keys() - {"lm_head.weight"} != manifest.keys() - {"lm_head.weight"} or manifest.keys() - tensors.keys():
        raise BadInput(where / CUT, None, "does not list the tensors of config.json")
    for name, info in tensors.items():
        if info.shape != manifest.get(name, info.shape) or info.dtype != source_places(places, name)[0].info.dtype:
            raise BadInput(where / CUT, name, "is described there as it is not in the checkpoint")
    return HfPlan(tuple(files), cut.index, tensors)


def source_places(places: Places, name: str) -> Any:
    """Places of a tensor; a repeated head of tied embeddings is the embedding."""
    return places.get(name) or places["model.embed_tokens.weight"]


def hf_units(plan: HfPlan) -> list[Unit]:
    units: list[Unit] = []
    by_file: dict[str, list[tuple[str, TensorInfo]]] = {}
    for name, info in sorted(plan.tensors.items(), key=lambda item: item[1].offset):
        by_file.setdefault(info.path.name, []).append((name, info))
    for file, tensors in by_file.items():
        pieces: list[Piece] = []
        begin = end = 0
        for name, info in tensors:
            rows = info.shape[0]
            step = max(1, RANGE_BYTES // info.row_bytes)
            for top in range(0, rows, step):
                bottom = min(top + step, rows)
                at, size = info.offset + top * info.row_bytes, (bottom - top) * info.row_bytes
                if pieces and (at != end or end - begin + size > RANGE_BYTES):
                    units.append(Unit(file, end - begin, offset=begin, pieces=tuple(pieces)))
                    pieces = []
                if not pieces:
                    begin = at
                pieces.append(Piece(name, top, bottom))
                end = at + size
        if pieces:
            units.append(Unit(file, end - begin, offset=begin, pieces=tuple(pieces)))
    return units


def fitting_config(text: bytes, dtypes: set[str]) -> bytes:
    """config.json for tensors of these dtypes: as it is when it says so already, else with its dtype replaced."""
    config = json.loads(text)
    key = "dtype" if "dtype" in config else "torch_dtype"  # transformers 5 and before
    if len(dtypes) != 1 or config.get(key) == min(dtypes):
        return text
    return (json.dumps({**config, key: min(dtypes)}, indent=2, ensure_ascii=False) + "\n").encode()
