"""Bands: consecutive rows of a tensor, read from wherever their columns lie. All the bytes of a conversion go this way.

A band of a Hugging Face file is one run of bytes. A band of a checkpoint that tensor-parallel ranks wrote may have its
columns in several files; they are woven together in the buffer.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megarubric.errors import BadInput
from megarubric.megatron.dist_files import Place
from megarubric.megatron.hf_files import ITEM_BYTES

BUFFER_BYTES = 8 << 20


class Part(NamedTuple):
    """Some columns of a band: rows of `width` bytes, one after the other from `offset` on; `column` in bytes."""

    path: Path
    offset: int
    width: int
    column: int


class Band(NamedTuple):
    rows: int
    row_bytes: int
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


def bands(places: Sequence[Place], first: int, last: int, row_bytes: int) -> list[Band]:
    """Rows [first, last) of a tensor that lies in `places`, top to bottom. Raises ValueError when a part is missing."""
    touching = [p for p in places if p.row < last and first < p.row + p.info.shape[0]]
    edges = {first, last}
    for place in touching:
        edges |= {e for e in (place.row, place.row + place.info.shape[0]) if first < e < last}
    ordered = sorted(edges)
    result = []
    for top, bottom in itertools.pairwise(ordered):
        parts = []
        for place in touching:
            if place.row <= top and bottom <= place.row + place.info.shape[0]:
                info = place.info
                offset = info.offset + (top - place.row) * info.row_bytes
                parts.append(Part(info.path, offset, info.row_bytes, place.column * ITEM_BYTES[info.dtype]))
        if sum(part.width for part in parts) != row_bytes:
            raise ValueError(f"rows {top} to {bottom} are not all there")
        result.append(Band(bottom - top, row_bytes, tuple(parts)))
    return result


class Sources:
    """The files that bands are read from, opened once, and the one buffer they are read into."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._scratch: memoryview | None = None

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, band: Band) -> Iterator[memoryview]:
        """The bytes of the band in order, in views that are valid until the next. Raises BadInput."""
        if len(band.parts) == 1:
            part = band.parts[0]
            for done in range(0, band.nbytes, BUFFER_BYTES):
                view = self._buffer[: min(BUFFER_BYTES, band.nbytes - done)]
                self._fill(part, part.offset + done, view)
                yield view
            return
        step = BUFFER_BYTES // band.row_bytes
        if not step:
            raise ValueError(f"a row of {band.row_bytes} bytes is more than the buffer holds")
        scratch = self._scratch = self._scratch or memoryview(bytearray(BUFFER_BYTES))
        for top in range(0, band.rows, step):
            rows = min(step, band.rows - top)
            view = self._buffer[: rows * band.row_bytes]
            woven = np.frombuffer(view, np.uint8).reshape(rows, band.row_bytes)
            for part in band.parts:
                columns = scratch[: rows * part.width]
                self._fill(part, part.offset + top * part.width, columns)
                woven[:, part.column : part.column + part.width] = np.frombuffer(columns, np.uint8).reshape(rows, -1)
            yield view

    def _fill(self, part: Part, offset: int, view: memoryview) -> None:
        descriptor = self._files.get(part.path)
        if descriptor is None:
            descriptor = self._files[part.path] = os.open(part.path, os.O_RDONLY)
        if len(view) == BUFFER_BYTES:  # the disk reads ahead while this is written
            os.posix_fadvise(descriptor, offset + BUFFER_BYTES, 2 * BUFFER_BYTES, os.POSIX_FADV_WILLNEED)
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if not count:
                raise BadInput(part.path, None, "ended while it was read")
            done += count
