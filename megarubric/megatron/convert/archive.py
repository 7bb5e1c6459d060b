"""Writes torch.save archives and their `.metadata`, as Megatron's dist_checkpointing does, a buffer at a time."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from megarubric.megatron.torch_dist import DTYPES, STORAGES

_ALIGNMENT = 64  # of the numbers in an archive, as torch writes it


class HashedFile(io.RawIOBase):
    """A file written from front to back, and the xxh3_128 of what was written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._digest = xxhash.xxh3_128()
        self.position = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            done += self._file.write(view[done:]) or 0
        self._digest.update(view)
        self.position += done
        return done

    def hexdigest(self) -> str:
        return self._digest.hexdigest()

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()
        super().close()


def write_archive(file: HashedFile, dtype: str, sizes: tuple[int, ...], data: Iterable[memoryview]) -> tuple[int, int]:
    """Append what ``torch.save(tensor, file)`` would; where it begins in the file and how long it is."""
    begin = file.position
    stream = _Part(file)
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
        archive.writestr(_record("data.pkl"), _tensor_pickle(dtype, sizes))
        archive.writestr(_record(".format_version"), b"1")
        archive.writestr(_record(".storage_alignment"), str(_ALIGNMENT))
        archive.writestr(_record("byteorder"), b"little")
        numbers = _record("data/0")
        header = 30 + len(numbers.filename) + 4
        padding = -(stream.tell() + header) % _ALIGNMENT
        numbers.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        with archive.open(numbers, "w") as out:
            for view in data:
                out.write(view)
        archive.writestr(_record("version"), b"3\n")
    return begin, file.position - begin


def _record(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"archive/{name}")


class _Part:
    """The rest of a file as a stream that cannot seek: zipfile then writes sizes behind the data."""

    def __init__(self, file: HashedFile) -> None:
        self._file, self._begin = file, file.position

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.position - self._begin

    def seekable(self) -> bool:
        return False

    def seek(self, *_: Any) -> int:
        raise io.UnsupportedOperation("seek")

    def flush(self) -> None: ...


def _tensor_pickle(dtype: str, sizes: tuple[int, ...]) -> bytes:
    """The record that tells torch.load to make a contiguous tensor of the archive's one storage (pickle protocol 2)."""
    strides = [1]
    for size in reversed(sizes[1:]):
        strides.insert(0, strides[0] * size)
    count = strides[0] * sizes[0]

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value) if value < 1 << 31 else b"\x8a\x08" + struct.pack("<q", value)

    def numbers(values: Iterable[int]) -> bytes:
        return b"(" + b"".join(number(value) for value in values) + b"t"

    storage = b"(" + text("storage") + b"ctorch\n" + STORAGES[dtype].encode() + b"\n" + text("0") + text("cpu")
    storage += number(count) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    made_from = b"(" + storage + number(0) + numbers(sizes) + numbers(strides) + b"\x89" + hooks + b"t"
    return b"\x80\x02" + b"ctorch._utils\n_rebuild_tensor_v2\n" + made_from + b"R."


def import_torch() -> None:
    """What `write_metadata` needs, and what takes as long as copying some gigabytes."""
    import torch.distributed.checkpoint  # noqa: F401


def write_metadata(
    weights: Path,
    shapes: dict[str, tuple[int, ...]],
    stored: Iterable[tuple[str, str, tuple[int, ...], tuple[int, ...], str, int, int]],
) -> list[Path]:
    """Write `.metadata`, `metadata.json` and the file of the small objects Megatron expects; returns the three.

    `stored` has an item for each archive: key, dtype, offsets, sizes, file, where it begins there, how long it is.
    Megatron also asks for the state of each linear module beyond its weight; it is None, as without FP8.
    """
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    described: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for key, dtype, offsets, sizes, file, begin, length in stored:
        if key not in described:
            properties = TensorProperties(dtype=getattr(torch, DTYPES[dtype]))
            described[key] = TensorStorageMetadata(properties, torch.Size(shapes[key]), [])
        described[key].chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        places[MetadataIndex(key, offsets)] = _StorageInfo(file, begin, length)
    objects = weights / "__objects_0.distcp"
    with objects.open("wb") as out:
        for value, keys in (([None], list(_extra_states(shapes))), ([{}], ["common_state/shard_0_1"])):
            begin = out.tell()
            data = io.BytesIO()
            torch.save(value, data)
            out.write(data.getvalue())
            for key in keys:
                described[key] = BytesStorageMetadata()
                places[MetadataIndex(key)] = _StorageInfo(objects.name, begin, out.tell() - begin)
    metadata = Metadata(described, storage_data=places, storage_meta=StorageMeta(), version="1.0.0")
    (weights / ".metadata").write_bytes(pickle.dumps(metadata, protocol=2))
    (weights / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return [weights / ".metadata", weights / "metadata.json", objects]


def _extra_states(shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    for key, shape in shapes.items():
        module, _, parameter = key.rpartition(".")
        if parameter == "weight" and module.rpartition(".")[2].startswith("linear_"):
            count = shape[0] if len(shape) == 3 else 1
            for number in range(count):
                yield f"{module}._extra_state/shard_{number}_{count}"
