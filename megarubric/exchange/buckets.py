"""Flat weight buckets in POSIX shared memory: the layout both ends of an exchange agree on.

The trainer plans the buckets once (`plan_buckets`), writes every Hugging Face tensor to its place in one of two
segments (`Segment`), and names the bucket (`Bucket`) to the controller. The engine maps the same segment, takes views
(`tensor_view`), checks the digests (`WeightDigest`) and loads. Torch is imported only where a torch tensor is made.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import xxhash

from megarubric.errors import BadInput, MegarubricError
from megarubric.exchange.digest import TensorHash, tensor_hash

if TYPE_CHECKING:
    import torch

SHM_DIR = Path("/dev/shm")  # where shm_open(3) keeps its names on Linux
DTYPE_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint8": 1,
    "int32": 4,
    "int64": 8,
}
_SEGMENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class BucketError(MegarubricError):
    """A bucket that does not hold what its table says."""


class TensorEntry(msgspec.Struct, frozen=True):
    """One Hugging Face tensor in a bucket: row-major bytes at [offset, offset + nbytes)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Bucket(msgspec.Struct, frozen=True):
    """A filled bucket: `segment` holds `entries` in its first `nbytes` bytes.

    `checksum` is the `WeightDigest` of exactly these entries.
    """

    segment: str
    nbytes: int
    entries: tuple[TensorEntry, ...]
    checksum: str


class DeviceBuffers(msgspec.Struct, frozen=True):
    """A trainer's two buckets in device memory, which stand in for segments: the same on every device with a rank.

    `handles` has, by the device's UUID, the CUDA IPC handles of both, each `nbytes` long. A bucket in them has one of
    `names` for its segment.
    """

    names: tuple[str, str]
    nbytes: int
    handles: dict[str, tuple[bytes, bytes]]


class TensorSpec(msgspec.Struct, frozen=True):
    """Name, dtype name and shape of one Hugging Face tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        n = dtype_bytes(self.dtype)
        for size in self.shape:
            n *= size
        return n


class BucketTable(msgspec.Struct, frozen=True):
    """All buckets of a weight version, in the order in which they are sent (segments and checksums come later)."""

    buckets: tuple[tuple[TensorEntry, ...], ...]

    @property
    def manifest(self) -> tuple[TensorSpec, ...]:
        """Every tensor a receiver must get before it may serve the version."""
        return tuple(TensorSpec(e.name, e.dtype, e.shape) for bucket in self.buckets for e in bucket)

    @property
    def segment_bytes(self) -> int:
        """Bytes one segment needs to hold any of the buckets."""
        return max((bucket_bytes_used(b) for b in self.buckets), default=0)

    @property
    def payload_bytes(self) -> int:
        return sum(e.nbytes for bucket in self.buckets for e in bucket)


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element; raises BucketError for a dtype that is not exchanged."""
    if dtype not in DTYPE_BYTES:
        raise BucketError(f"dtype {dtype!r} is not exchanged; known: {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


def bucket_bytes_used(entries: Sequence[TensorEntry]) -> int:
    return max((e.offset + e.nbytes for e in entries), default=0)


def decoder_layer(name: str) -> int:
    """Decoder layer a Hugging Face tensor name belongs to; -1 for embeddings, final norm and head."""
    match = _LAYER.search(name)
    return int(match.group(1)) if match else -1


def plan_buckets(tensors: Iterable[TensorSpec], bucket_bytes: int, align: int = 256) -> BucketTable:
    """Lay `tensors` out in buckets of at most `bucket_bytes`, each tensor aligned to `align` bytes.

    Tensors outside decoder layers come first, then layer 0, 1, ...; the given order is kept inside a layer. So all of
    a layer arrives before any of the next (an engine that reloads by layer holds at most one unfinished layer). A
    tensor larger than `bucket_bytes` gets a bucket to itself. Raises BucketError on a repeated name.
    """
    if bucket_bytes <= 0 or align <= 0:
        raise BucketError(f"bucket_bytes {bucket_bytes} and align {align} must be above 0")
    buckets: list[tuple[TensorEntry, ...]] = []
    current: list[TensorEntry] = []
    seen: set[str] = set()
    end = 0
    for spec in sorted(tensors, key=lambda t: decoder_layer(t.name)):  # stable: keeps the order inside a layer
        if spec.name in seen:
            raise BucketError(f"tensor {spec.name} appears twice")
        seen.add(spec.name)
        offset = -(-end // align) * align
        if current and offset + spec.nbytes > bucket_bytes:
            buckets.append(tuple(current))
            current, offset = [], 0
        current.append(TensorEntry(spec.name, spec.dtype, tuple(spec.shape), offset, spec.nbytes))
        end = offset + spec.nbytes
    if current:
        buckets.append(tuple(current))
    return BucketTable(tuple(buckets))


class WeightDigest:
    """Checksum of a set of tensors that does not depend on the order in which they arrive.

    xxh3_128 over ``name NUL dtype NUL shape NUL hash(bytes)`` in sorted name order. `kind` says which hash of
    `megarubric.exchange.digest`; a checksum says so too: ``sum128:`` and 32 hex digits, for xxh3 the digits alone. It
    finds transport and conversion faults; it is not a signature.
    """

    def __init__(self, kind: TensorHash = "xxh3") -> None:
        self.kind: TensorHash = kind
        self._parts: dict[str, bytes] = {}

    def add(self, entry: TensorEntry | TensorSpec, data: memoryview | bytes) -> None:
        """Take in one tensor's bytes. Raises BucketError when the size is wrong or the name came before."""
        if len(data) != entry.nbytes:
            raise BucketError(f"tensor {entry.name}: {len(data)} bytes, its entry says {entry.nbytes}")
        if entry.name in self._parts:
            raise BucketError(f"tensor {entry.name} arrived twice")
        self.add_hash(entry, tensor_hash(self.kind, data))

    def add_hash(self, entry: TensorEntry | TensorSpec, hashed: bytes) -> None:
        """Take in one tensor by its hash, of this digest's kind. Raises BucketError when the name came before."""
        if entry.name in self._parts:
            raise BucketError(f"tensor {entry.name} arrived twice")
        head = f"{entry.name}\0{entry.dtype}\0{'x'.join(map(str, entry.shape))}\0".encode()
        self._parts[entry.name] = head + hashed

    def update(self, other: WeightDigest) -> None:
        """Take in all of `other`'s tensors. Raises BucketError when a name came before or the hash is another."""
        if other.kind != self.kind:
            raise BucketError(f"a {other.kind} digest does not go into one of {self.kind}")
        for name, part in other._parts.items():
            if name in self._parts:
                raise BucketError(f"tensor {name} arrived twice")
            self._parts[name] = part

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._parts)

    def hexdigest(self) -> str:
        whole = xxhash.xxh3_128()
        for name in sorted(self._parts):
            whole.update(self._parts[name])
        return whole.hexdigest() if self.kind == "xxh3" else f"{self.kind}:{whole.hexdigest()}"


def digest_entries(buffer: memoryview, entries: Sequence[TensorEntry]) -> WeightDigest:
    """Digest of `entries` as they lie in `buffer` (uint8)."""
    digest = WeightDigest()
    for e in entries:
        check_entry(e, len(buffer))
        digest.add(e, buffer[e.offset : e.offset + e.nbytes])
    return digest


def digest_hashes(entries: Sequence[TensorEntry], hashes: Sequence[bytes]) -> WeightDigest:
    """Digest of `entries` whose ``sum128`` hashes are known."""
    digest = WeightDigest("sum128")
    for entry, hashed in zip(entries, hashes, strict=True):
        digest.add_hash(entry, hashed)
    return digest


def verify_bucket(buffer: memoryview, bucket: Bucket) -> WeightDigest:
    """The digest of `bucket` in `buffer`; raises BucketError when it is not the one the sender computed."""
    digest = digest_entries(buffer, bucket.entries)
    if digest.hexdigest() != bucket.checksum:
        raise BucketError(
            f"bucket in {bucket.segment}: checksum {digest.hexdigest()}, the sender's is {bucket.checksum}"
        )
    return digest


def check_entry(entry: TensorEntry, buffer_bytes: int) -> None:
    """Raises BucketError when `entry` is inconsistent or leaves a buffer of `buffer_bytes`."""
    expected = TensorSpec(entry.name, entry.dtype, entry.shape).nbytes
    if any(n < 0 for n in entry.shape) or entry.nbytes != expected:
        raise BucketError(f"tensor {entry.name}: {entry.nbytes} bytes do not hold {entry.dtype}{list(entry.shape)}")
    if entry.offset < 0 or entry.offset + entry.nbytes > buffer_bytes:
        raise BucketError(f"tensor {entry.name}: bytes {entry.offset}+{entry.nbytes} leave a buffer of {buffer_bytes}")
    if entry.offset % dtype_bytes(entry.dtype):
        raise BucketError(f"tensor {entry.name}: offset {entry.offset} is not aligned for {entry.dtype}")


def tensor_view(buffer: memoryview, entry: TensorEntry) -> torch.Tensor:
    """`entry` as a torch tensor that shares memory with `buffer`; drop it before the segment is closed."""
    import torch

    check_entry(entry, len(buffer))
    dtype = getattr(torch, entry.dtype)
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=dtype)
    count = entry.nbytes // dtype_bytes(entry.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a read-only mapping: the reader only copies out of it
        flat = torch.frombuffer(buffer, dtype=dtype, count=count, offset=entry.offset)
    return flat.view(entry.shape)


def tensor_in(buffer: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    """`entry` as a view of a uint8 tensor on any device."""
    import torch

    check_entry(entry, len(buffer))
    flat = buffer[entry.offset : entry.offset + entry.nbytes]
    return flat.view(getattr(torch, entry.dtype)).view(entry.shape)


class Segment:
    """A named POSIX shared memory segment, mapped.

    Not `multiprocessing.shared_memory`: its resource tracker unlinks a segment when any process that merely opened it
    ends. Here the creator unlinks, and `sweep` removes what a killed creator left.
    """

    def __init__(self, name: str, mapping: mmap.mmap) -> None:
        self.name = name
        self._mapping = mapping
        self.buffer = memoryview(mapping)

    @classmethod
    def create(cls, name: str, nbytes: int) -> Segment:
        """Make and map a new segment, private to this user.

        Raises BadInput when the name is taken or there is no room: pages are allocated now, because a full /dev/shm
        would otherwise kill the writer with SIGBUS in the middle of a bucket.
        """
        path = _segment_path(name)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise BadInput("shared memory", name, error.strerror or str(error)) from error
        try:
            os.posix_fallocate(fd, 0, max(nbytes, 1))
            return cls(name, mmap.mmap(fd, max(nbytes, 1)))
        except OSError as error:
            os.unlink(path)
            hint = " (give the container a larger --shm-size)" if error.errno == errno.ENOSPC else ""
            raise BadInput("shared memory", name, f"{nbytes} bytes: {error.strerror}{hint}") from error
        finally:
            os.close(fd)

    @classmethod
    def open(cls, name: str, writable: bool = False) -> Segment:
        """Map an existing segment. Raises BucketError when it does not exist."""
        try:
            fd = os.open(_segment_path(name), (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise BucketError(f"segment {name}: {error.strerror}") from error
        try:
            return cls(name, mmap.mmap(fd, 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ))
        finally:
            os.close(fd)

    def close(self) -> None:
        """Unmap. Views that are still alive keep the mapping until they are dropped."""
        try:
            self.buffer.release()
            self._mapping.close()
        except BufferError:
            pass  # a view is alive; the mapping goes with it

    def unlink(self) -> None:
        """Remove the name; processes that mapped the segment keep it. Not an error when it is gone."""
        _segment_path(self.name).unlink(missing_ok=True)


def sweep(prefix: str) -> list[str]:
    """Unlink every segment of this user whose name starts with `prefix`; returns their names."""
    _segment_path(prefix)
    removed = []
    for path in sorted(SHM_DIR.glob(f"{prefix}*")):
        if path.stat().st_uid == os.getuid():
            path.unlink(missing_ok=True)
            removed.append(path.name)
    return removed


def _segment_path(name: str) -> Path:
    if not _SEGMENT_NAME.fullmatch(name):
        raise BucketError(f"segment name {name!r}: letters, digits, '_', '.', '-' only")
    return SHM_DIR / name
