"""The torch_dist format of Megatron's dist_checkpointing, read and written as files, without torch.

    .metadata        which rectangle of which tensor lies in which file, and where
    __N_0.distcp     one torch.save archive (an uncompressed zip) a rectangle, one after the other
    metadata.json    the name of the format

`.metadata`, and a small record in each archive, are pickles. They are read here as data: every name in them is looked
up in a list of the few that the format needs and becomes an inert record; nothing is imported, no code of anyone else's
runs, and any other name is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megarubric.errors import BadInput
from megarubric.megatron.hf_files import ITEM_BYTES, TensorInfo

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' name -> torch's
_NAMES = {name: key for key, name in DTYPES.items()}
STORAGES = {"F32": "FloatStorage", "BF16": "BFloat16Storage", "F16": "HalfStorage"}


@dataclass(frozen=True)
class Block:
    """A stored rectangle: where in the tensor, and where its archive lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A tensor as `.metadata` describes it."""

    shape: tuple[int, ...]
    dtype: str
    blocks: tuple[Block, ...]


class _Record:
    """Stands for any object of a pickle: what it was made from and the state it was given, and nothing it could do."""

    state: Any = None

    def __init__(self, *made_from: Any) -> None:
        self.made_from = made_from

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getattr__(self, name: str) -> Any:
        if isinstance(self.state, dict) and name in self.state:
            return self.state[name]
        raise AttributeError(name)


def _sequence(*items: Any) -> tuple[Any, ...]:
    return tuple(items[0]) if items else ()


# Exact names, no packages: dist_checkpointing's own reader, which does import and call, is only let near files that
# passed this list, and a dotted name under an allowed module could reach anything.
_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.planner": (
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ),
    "torch.serialization": ("_get_layout",),
    "torch._utils": ("_rebuild_tensor_v2",),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath",),
}
_TORCH = {"Size": _sequence, **{name: name for name in ("float32", "bfloat16", "float16", "float64")}}
_TORCH |= {name: name for name in ("int64", "int32", "int16", "int8", "uint8", "bool")}
_TORCH |= {name: name for name in STORAGES.values()}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return _Record
        if module == "torch" and name in _TORCH:
            return _TORCH[name]
        if (module, name) in (("builtins", "set"), ("builtins", "list")):
            return _sequence
        raise pickle.UnpicklingError(f"names {module}.{name}, which no checkpoint needs")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _read_pickle(where: Path, item: str, data: bytes) -> Any:
    try:
        return _Reader(io.BytesIO(data)).load()
    except Exception as error:  # a pickle can fail in any way; none of them may do more than this
        raise BadInput(where, item, f"is refused: {error}") from None


def read_metadata(weights: Path) -> dict[str, Stored]:
    """The tensors of a distributed checkpoint, without anything that is no tensor. Raises BadInput."""
    metadata = _read_pickle(weights, ".metadata", (weights / ".metadata").read_bytes())
    try:
        blocks: dict[str, dict[tuple[int, ...], Any]] = {}
        for index, info in metadata.storage_data.items():
            if getattr(index, "offset", None) is not None:
                blocks.setdefault(index.fqn, {})[tuple(index.offset)] = info
        tensors = {}
        for key, tensor in metadata.state_dict_metadata.items():
            if not isinstance(tensor.state, dict) or "chunks" not in tensor.state:
                continue  # a serialised object
            dtype = tensor.properties.state[0]
            stored = []
            for chunk in tensor.chunks:
                place = blocks[key][tuple(chunk.offsets)]
                if getattr(place, "transform_descriptors", None):
                    raise BadInput(weights, key, "is stored compressed, which cannot be read here")
                name = str(place.relative_path)
                if Path(name).name != name:
                    raise BadInput(weights, key, "lies outside the checkpoint")
                stored.append(Block(tuple(chunk.offsets), tuple(chunk.sizes), name, place.offset, place.length))
            tensors[key] = Stored(tuple(tensor.size), _NAMES.get(dtype, str(dtype)), tuple(stored))
        return tensors
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        raise BadInput(weights, ".metadata", "is not the metadata of a distributed checkpoint") from None


class Archives:
    """Finds the bytes of a rectangle inside its torch.save archive. Files are opened once."""

    def __init__(self, weights: Path) -> None:
        self._weights = weights
        self._files: dict[str, IO[bytes]] = {}

    def __enter__(self) -> Archives:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def rectangles(self, key: str, tensor: Stored, block: Block) -> Iterator[tuple[int, int, TensorInfo]]:
        """The stored block as rectangles of the tensor with all but its last dimension flattened.

        Yields (first row, first column, place). More than one when the block is not a run of whole rows, as a slice
        of a stacked expert is not.
        """
        if tensor.dtype not in ITEM_BYTES:
            raise BadInput(self._weights, key, f"has dtype {tensor.dtype}; only {', '.join(ITEM_BYTES)} can be read")
        offset = self._data_offset(key, tensor, block)
        path = self._weights / block.file
        if len(tensor.shape) == 1:
            yield block.offsets[0], 0, TensorInfo(path, tensor.dtype, block.sizes, offset)
            return
        *lead, rows, columns = block.sizes
        step = rows * columns * ITEM_BYTES[tensor.dtype]
        for number in range(math.prod(lead)):
            row = 0
            rest = number
            for axis in reversed(range(len(lead))):
                row += (block.offsets[axis] + rest % lead[axis]) * math.prod(tensor.shape[axis + 1 : -1])
                rest //= lead[axis]
            first = row + block.offsets[-2]
            yield first, block.offsets[-1], TensorInfo(path, tensor.dtype, (rows, columns), offset + number * step)

    def _data_offset(self, key: str, tensor: Stored, block: Block) -> int:
        path = self._weights / block.file
        try:
            if block.file not in self._files:
                self._files[block.file] = path.open("rb")
            view = _Window(self._files[block.file], block.begin, block.length)
            with zipfile.ZipFile(view) as archive:
                names = {Path(name).name: name for name in archive.namelist() if "/.data/" not in name}
                record = archive.getinfo(names["0"])
                header = view.read_at(record.header_offset, 30)
                data = record.header_offset + 30 + int.from_bytes(header[26:28], "little")
                data += int.from_bytes(header[28:30], "little")
                made = _read_pickle(path, key, archive.read(names["data.pkl"])).made_from
                (kind, storage, number, _, count), start, size, stride, *_ = made
        except OSError as error:
            raise BadInput(path, None, error.strerror or str(error)) from None
        except (zipfile.BadZipFile, AttributeError, KeyError, ValueError, TypeError, IndexError):
            raise BadInput(path, key, "is corrupt: its archive cannot be read") from None
        dense = tuple(math.prod(size[i + 1 :]) for i in range(len(size)))
        plain = kind == "storage" and storage == STORAGES[tensor.dtype] and number == "0" and start == 0
        if not plain or tuple(stride) != dense or count != math.prod(size) or record.compress_type:
            raise BadInput(path, key, "is not stored as a plain run of numbers")
        if math.prod(size) != math.prod(block.sizes) or record.file_size != count * ITEM_BYTES[tensor.dtype]:
            raise BadInput(path, key, "has a size that does not fit its shape")
        return block.begin + data


class _Window(io.RawIOBase):
    """A part of a file as a file, for zipfile."""

    def __init__(self, file: IO[bytes], begin: int, length: int) -> None:
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        size = self._length - self._at if size is None or size < 0 else min(size, self._length - self._at)
        data = self.read_at(self._at, max(size, 0))
        self._at += len(data)
        return data

    def read_at(self, offset: int, size: int) -> bytes:
        self._file.seek(self._begin + offset)
        return self._file.read(size)
