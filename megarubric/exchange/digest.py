"""Hashes of a tensor's bytes, 128 bits each: one for memory of the host, one that a GPU computes.

``xxh3`` is xxh3_128: the fastest on a processor, and sequential. ``sum128`` is made of sums, so that any number of
threads may compute it in any order, each over what it happens to read. With w_1 .. w_n the tensor's 64-bit
little-endian words, the last padded with zeros, w_0 its length in bytes and K an odd constant,

    h_i = mix(w_i + i K)        a = sum of h_i        b = sum of (h_i mod 2^32) (h_i div 2^32)        mod 2^64

and the hash is a, b, little-endian. `mix` is a bijection of 64 bits in which every bit of the input flips every bit of
the output about half of the time, so:

- A change within one word changes a, always: `mix` maps the two words to different h, and nothing else in a moves.
- Two words that change places, a row that lands elsewhere, data shifted by a word: every word concerned gets another
  i K, so its h is as good as drawn anew, and a stays the same with probability 2^-64.
- The same holds for any number of changed words; where a should happen to stay, b, which is no function of a, has to
  stay as well, which has about the same odds again.
- Zeros cut off or added at the end change w_0, and zeros elsewhere have an h like any other word.

Both find faults of transport and conversion. Neither is a signature: who may choose the bytes can make two tensors of
one hash.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

TensorHash = Literal["xxh3", "sum128"]
HASH_BYTES = 16
TILE_BYTES = 32768  # what one thread block of the CUDA kernel reads: 8 loads of 16 bytes a thread

_STEP, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_CHUNK_BYTES = 8 << 20  # temporaries of the fallbacks are a few times as large


def tensor_hash(kind: TensorHash, data: memoryview | bytes) -> bytes:
    """Hash of one tensor's bytes in host memory (16 bytes)."""
    if kind == "xxh3":
        return xxhash.xxh3_128(data).digest()
    if "torch" in sys.modules and len(data):  # a process without torch is not made to import it
        import torch

        flat = torch.from_numpy(np.frombuffer(data, np.uint8))
        return sum128_of(flat, [(0, len(data))])[0]
    return sum128(data)


def sum128(data: memoryview | bytes) -> bytes:
    """``sum128`` of `data` by its definition, in numpy: the reference of the compiled ops."""
    flat = np.frombuffer(data, np.uint8)
    sums = _numpy_sums(np.array([len(flat)], np.uint64), 0)
    for start in range(0, len(flat), _CHUNK_BYTES):
        chunk = flat[start : start + _CHUNK_BYTES]
        words = np.zeros(-(-len(chunk) // 8) * 8, np.uint8)
        words[: len(chunk)] = chunk
        sums += _numpy_sums(words.view("<u8"), start // 8 + 1)
    return sums.astype("<u8").tobytes()


def _numpy_sums(words: NDArray[np.uint64], position: int) -> NDArray[np.uint64]:
    """(a, b) of `words`, the first of which is word `position`."""
    u64 = np.uint64
    with np.errstate(over="ignore"):
        x = words + np.arange(position, position + len(words), dtype=u64) * u64(_STEP)
        x = (x ^ (x >> u64(30))) * u64(_MIX_1)
        x = (x ^ (x >> u64(27))) * u64(_MIX_2)
        h = x ^ (x >> u64(31))
        product = (h & u64(0xFFFFFFFF)) * (h >> u64(32))
        return np.array([h.sum(dtype=u64), product.sum(dtype=u64)], u64)


def sum128_of(buffer: torch.Tensor, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """``sum128`` of each span (offset, nbytes) of `buffer`, uint8[n] on any device, where it lies.

    On a GPU 16 bytes a span come back, and the call waits for them. Without the compiled ops torch computes the same,
    an order of magnitude slower. Raises ValueError for a span that leaves the buffer.
    """
    import torch

    from megarubric.reward import ops

    for offset, nbytes in spans:
        if offset < 0 or nbytes < 0 or offset + nbytes > len(buffer):
            raise ValueError(f"bytes {offset}+{nbytes} leave a buffer of {len(buffer)}")
    if ops.available() and (buffer.device.type == "cpu" or ops.cuda_architectures()):
        sums = ops.weight_digest(buffer, *digest_table(spans, TILE_BYTES), TILE_BYTES)
    elif buffer.device.type == "cpu":
        return [sum128(buffer[offset : offset + nbytes].numpy().data) for offset, nbytes in spans]
    else:
        sums = torch.stack([_torch_sums(buffer[offset : offset + nbytes]) for offset, nbytes in spans])
    flat = sums.cpu().numpy().astype("<i8", copy=False).tobytes()
    return [flat[i : i + HASH_BYTES] for i in range(0, len(flat), HASH_BYTES)]


def digest_table(spans: Sequence[tuple[int, int]], tile_bytes: int) -> tuple[torch.Tensor, int]:
    """The op's table, int64[n, 3] on the host (offset, nbytes, first tile), and the number of tiles."""
    import torch

    rows = np.zeros((len(spans), 3), np.int64)
    rows[:, :2] = np.array(spans, np.int64).reshape(-1, 2)
    ends = np.cumsum(-(-rows[:, 1] // tile_bytes))
    rows[1:, 2] = ends[:-1]
    return torch.from_numpy(rows), int(ends[-1]) if len(ends) else 0


def _torch_sums(data: torch.Tensor) -> torch.Tensor:
    """(a, b) of uint8[n] as int64[2], by torch's own operations: integers wrap, a shift right keeps the sign."""
    import torch

    def signed(x: int) -> int:
        return x - (1 << 64) if x >> 63 else x

    def shifted(x: Any, by: int) -> Any:
        return (x >> by) & ((1 << (64 - by)) - 1)

    def add(words: Any, position: int) -> Any:
        at = torch.arange(position, position + len(words), device=words.device)
        x = words + at * signed(_STEP)
        x = (x ^ shifted(x, 30)) * signed(_MIX_1)
        x = (x ^ shifted(x, 27)) * signed(_MIX_2)
        h = x ^ shifted(x, 31)
        return torch.stack([h.sum(), ((h & 0xFFFFFFFF) * shifted(h, 32)).sum()])

    sums: torch.Tensor = add(torch.tensor([len(data)], device=data.device), 0)
    for start in range(0, len(data), _CHUNK_BYTES):
        chunk = data[start : start + _CHUNK_BYTES]
        words = torch.zeros(-(-len(chunk) // 8) * 8, dtype=torch.uint8, device=data.device)
        words[: len(chunk)] = chunk
        sums = sums + add(words.view(torch.int64), start // 8 + 1)
    return sums
