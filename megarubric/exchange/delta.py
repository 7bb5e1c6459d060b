"""A lossless sparse delta: which elements of a piece changed, and what they are now.

A small learning rate moves few bfloat16 weights to another value, so between hosts a version can travel as what changed
since the last. Elements are compared as unsigned integers of their size: NaN payloads and -0.0 are values like others.

An encoded delta of n entries is n gaps followed by n values. A gap is the number of elements skipped since the last
entry, little-endian in 1, 2 or 4 bytes, whichever makes the whole smallest; one that is too large for its bytes is
bridged by entries that repeat an element that did not change.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from megarubric.errors import MegarubricError

Bytes = NDArray[np.uint8]
WIDTHS = (1, 2, 4)


class DeltaError(MegarubricError):
    """A delta that does not fit what it should be applied to."""


class PieceHead(msgspec.Struct, frozen=True, array_like=True):
    """What travels of one rectangle: `nbytes` of payload.

    `counter` numbers what was sent of this rectangle, from 1. `base` is the counter that a delta was made against, 0
    when the payload is the whole. `width` is the bytes of a gap and `entries` their number (of a delta).
    """

    rectangle: int
    nbytes: int
    counter: int
    base: int = 0
    width: int = 0
    entries: int = 0


def encode(new: Bytes, base: Bytes, item_bytes: int) -> tuple[int, int, Bytes] | None:
    """(width, entries, payload) of the delta from `base` to `new`, uint8[n] each; None when the whole is not larger."""
    a, b = _items(new, item_bytes), _items(base, item_bytes)
    changed = a != b
    count = int(np.count_nonzero(changed))
    if count * (WIDTHS[0] + item_bytes) >= new.nbytes > 0:
        return None
    gaps = np.diff(_where(changed, count), prepend=-1) - 1
    costs = {}
    for width in WIDTHS:
        costs[width] = (len(gaps) + int((gaps >> (8 * width)).sum())) * (width + item_bytes)
    width = min(WIDTHS, key=lambda w: costs[w])
    if costs[width] >= new.nbytes > 0:
        return None
    largest = (1 << (8 * width)) - 1
    last = np.cumsum((gaps >> (8 * width)) + 1) - 1  # where each changed element stands, after its bridges
    steps = np.full(int(last[-1]) + 1 if len(last) else 0, largest, dtype=np.int64)
    steps[last] = gaps & largest
    values = a[np.cumsum(steps + 1) - 1]
    return width, len(steps), np.concatenate([steps.astype(f"<u{width}").view(np.uint8), values.view(np.uint8)])


def apply(base: Bytes, width: int, entries: int, payload: Bytes, item_bytes: int) -> None:
    """Turn `base` (uint8[n], writable) into what was encoded. Raises DeltaError, with `base` untouched, for a payload
    that does not fit it."""
    if width not in WIDTHS or entries < 0 or len(payload) != entries * (width + item_bytes):
        raise DeltaError(f"a delta of {len(payload)} bytes does not hold {entries} entries with gaps of {width} bytes")
    steps = payload[: entries * width].view(f"<u{width}").astype(np.int64)
    at = np.cumsum(steps + 1) - 1
    items = _items(base, item_bytes)
    if entries and int(at[-1]) >= len(items):
        raise DeltaError(f"a delta reaches element {int(at[-1])} of {len(items)}")
    items[at] = _items(payload[entries * width :], item_bytes)


class Sent:
    """The sending side's memory: the bytes that last travelled of each rectangle."""

    def __init__(self, item_bytes: int) -> None:
        self._item_bytes = item_bytes
        self._last: dict[int, tuple[int, Bytes]] = {}

    def encode(self, rectangle: int, data: Bytes) -> tuple[PieceHead, Bytes]:
        """What to send so that every receiver of `rectangle` has `data`, and remember it. Nothing in the payload is
        the memory of `data`."""
        counter, base = self._last.get(rectangle, (0, None))
        delta = None if base is None else encode(data, base, self._item_bytes)
        if base is None:
            base = data.copy()
        else:
            np.copyto(base, data)  # what was sent from this memory arrived: a bucket ends before the next begins
        self._last[rectangle] = (counter + 1, base)
        if delta is None:
            return PieceHead(rectangle, len(base), counter + 1), base
        width, entries, payload = delta
        return PieceHead(rectangle, len(payload), counter + 1, counter, width, entries), payload

    def forget(self) -> None:
        """The next of each rectangle travels whole."""
        self._last.clear()


class Kept:
    """The receiving side's memory: the bytes that last arrived of each rectangle."""

    def __init__(self, item_bytes: int) -> None:
        self._item_bytes = item_bytes
        self._last: dict[int, tuple[int, Bytes]] = {}

    def decode(self, head: PieceHead, payload: Bytes, nbytes: int) -> Bytes:
        """The `nbytes` of the rectangle (to be read, and not after its next arrival). Raises DeltaError for a delta
        against something else than what is kept, or a whole of another size."""
        counter, kept = self._last.get(head.rectangle, (0, None))
        if head.base == 0:
            whole(head, payload, nbytes)
            if kept is None:
                kept = payload.copy()
            else:
                np.copyto(kept, payload)
        elif kept is None or counter != head.base or head.counter != head.base + 1:
            raise DeltaError(
                f"rectangle {head.rectangle}: a delta from {head.base} to {head.counter}, here is {counter}"
            )
        else:
            apply(kept, head.width, head.entries, payload, self._item_bytes)
        self._last[head.rectangle] = (head.counter, kept)
        return kept

    def forget(self) -> None:
        self._last.clear()


def whole(head: PieceHead, payload: Bytes, nbytes: int) -> Bytes:
    """`payload`, which must be the whole of a rectangle of `nbytes`. Raises DeltaError when it is not."""
    if head.base != 0 or len(payload) != nbytes:
        kind = "of a delta " if head.base else ""
        raise DeltaError(f"rectangle {head.rectangle}: {len(payload)} bytes {kind}arrived, it has {nbytes}")
    return payload


def _where(flags: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """Indices of the `count` true ones of bool[n]. Of few, eight at a time: numpy looks at every flag by itself."""
    whole_words = len(flags) // 8 * 8
    if count * 10 > len(flags) or whole_words == 0:
        return np.flatnonzero(flags)
    words = np.flatnonzero(flags[:whole_words].view(np.uint64) != 0)
    within = np.flatnonzero(flags[:whole_words].reshape(-1, 8)[words])
    found = words[within >> 3] * 8 + (within & 7)
    return np.concatenate([found, whole_words + np.flatnonzero(flags[whole_words:])])


def _items(data: Bytes, item_bytes: int) -> NDArray[np.unsignedinteger]:
    return data.view(f"u{item_bytes}")
