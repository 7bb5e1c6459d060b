"""manifest.json: what makes a directory of Megatron weights a whole checkpoint. Written last; imports no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from megarubric.errors import BadInput

FORMAT = 2
NAME = "manifest.json"


class File(msgspec.Struct, frozen=True):
    nbytes: int
    xxh3_128: str


class Manifest(msgspec.Struct, frozen=True):
    """`model` is what of config.json decides shapes: name -> shape hashed. Converted weights have no run behind them:
    steps and world_size 0, and an empty layout.
    """

    format: int
    steps: int
    world_size: int
    layout: dict[str, int | None]
    dtype: str
    model: str
    files: dict[str, File]


def write(directory: Path, manifest: Manifest) -> None:
    """Write and sync the manifest of a directory whose files are all there."""
    path = directory / NAME
    path.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    sync(path)


def check(path: Path, *, hashes: bool = True, under: str = "") -> Manifest:
    """The manifest of a complete checkpoint. Raises BadInput naming the first file that is missing, short or corrupt.

    Looks at the files whose names begin with `under`; at their hashes too, unless told not to.
    Not collective, and needs no process group: the controller uses it to choose the checkpoint to resume from.
    """
    path = Path(path)
    if not path.is_dir():
        raise BadInput(path, None, "is not a checkpoint directory")
    try:
        manifest = msgspec.json.decode((path / NAME).read_bytes(), type=Manifest)
    except OSError:
        raise BadInput(path, NAME, "is missing: the checkpoint is incomplete") from None
    except msgspec.DecodeError as error:
        raise BadInput(path, NAME, f"cannot be read: {error}") from None
    if manifest.format != FORMAT:
        raise BadInput(path, NAME, f"has format {manifest.format}, this version reads {FORMAT}")
    for name, file in manifest.files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BadInput(path, name, "lies outside the checkpoint")
        if not name.startswith(under):
            continue
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size is None:
            raise BadInput(path, name, "is missing")
        if size != file.nbytes:
            raise BadInput(path, name, f"has {size} bytes, the manifest says {file.nbytes}")
        if hashes and hash_file(path / name) != file.xxh3_128:
            raise BadInput(path, name, "is corrupt: its hash is not the manifest's")
    return manifest


def hash_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as f:
        while block := f.read(16 << 20):
            digest.update(block)
    return digest.hexdigest()


def model_hash(shapes: dict[str, tuple[int, ...]]) -> str:
    """Identifies a model by the names and shapes of its Hugging Face tensors."""
    lists: dict[str, Any] = {name: list(shape) for name, shape in shapes.items()}
    return xxhash.xxh3_128(json.dumps(lists, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
