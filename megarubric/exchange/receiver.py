"""The engine's end of a weight exchange: a state machine that never lets a half-arrived version serve.

    READY --begin--> RECEIVING --load*--> RECEIVING --finish--> READY (new version)
                         |                                |
                         +--abort, or anything wrong------+--> READY (old version)     staging "host"
                                                               BROKEN (no version)     staging "direct"

With staging "host" a bucket is checked and copied to memory of the engine's own; the model is touched only in `finish`,
after every expected tensor has arrived with the expected shape and dtype and the checksum of all of them holds. With
"direct" a bucket is checked and loaded at once: no second copy of the model, but once begun the old version is gone, so
a fault leaves the engine without weights until an update succeeds. In either case it serves one whole version or none.

Buckets in device memory are loaded directly, and checked where they lie: every worker hashes its own device's copy.

Nothing here imports torch or vLLM; the workers' part is `megarubric.exchange.vllm_backend`.
"""

from __future__ import annotations

import contextlib
import enum
import json
import mmap
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from megarubric.errors import BadInput, MegarubricError
from megarubric.exchange.buckets import (
    Bucket,
    BucketError,
    DeviceBuffers,
    Segment,
    TensorEntry,
    TensorSpec,
    WeightDigest,
    digest_hashes,
    verify_bucket,
)
from megarubric.exchange.digest import TensorHash

_SAFETENSORS_DTYPES = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "U8": "uint8",
    "I32": "int32",
    "I64": "int64",
}
# What a model kept in a dtype can take without losing bits.
_LOSSLESS = {
    "float32": {"float32", "bfloat16", "float16"},
    "bfloat16": {"bfloat16"},
    "float16": {"float16"},
}


class UpdateRefused(MegarubricError):
    """A weight update that is incomplete, inconsistent or out of turn; the version in service did not change."""


class UpdateFailed(MegarubricError):
    """An update that broke off while the model was being written; no version is in service until one succeeds."""


class State(enum.Enum):
    """What the receiver is doing; the value is what the wire says."""

    READY = "ready"
    RECEIVING = "receiving"
    BROKEN = "broken"


class _Staged:
    """A bucket in memory of this process. An anonymous file: it goes when the process goes, however that ends."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = max(nbytes, 1)
        self._fd = os.memfd_create("megarubric-staging", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, self.nbytes)
        self._mapping = mmap.mmap(self._fd, self.nbytes)

    @property
    def mapping(self) -> str:
        """Path by which this user's processes can map the bucket."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def fill(self, source: memoryview) -> None:
        self._mapping[: len(source)] = source

    def close(self) -> None:
        self._mapping.close()
        os.close(self._fd)


class Receiver:
    """Takes weight versions in for one engine.

    `call_workers(method, args)` runs a method of vLLM's workers on all of them (LLMEngine.collective_rpc). `expected`
    are the tensors of a complete version, from the directory the engine was started with; empty takes any manifest.
    `model_dtype` is the dtype the engine keeps weights in.
    """

    def __init__(
        self,
        call_workers: Callable[[str, tuple[Any, ...]], Any],
        expected: Iterable[TensorSpec],
        model_dtype: str,
        staging: Literal["host", "direct"] = "host",
        version: int = 0,
    ) -> None:
        self._call_workers = call_workers
        self._expected = {t.name: t for t in expected}
        self._model_dtype = model_dtype
        self.staging = staging
        self.state = State.READY
        self.version = version
        self.checksum = ""
        self._next_version = -1
        self._manifest: dict[str, TensorSpec] = {}
        self._digest = WeightDigest()
        self._devices: DeviceBuffers | None = None
        self._pool: list[_Staged] = []
        self._staged: list[tuple[_Staged, Bucket]] = []
        self._started = 0.0

    def begin(self, version: int, manifest: Sequence[TensorSpec], devices: DeviceBuffers | None = None) -> None:
        """Start receiving `version`, from shared memory or the trainer's buffers on the `devices`.

        Raises UpdateRefused when another is under way, the manifest does not fit or the buffers cannot be opened.
        """
        if self.state is State.RECEIVING:
            raise UpdateRefused(f"version {version}: version {self._next_version} is being received, abort it first")
        if version < 0:
            raise UpdateRefused(f"version {version}: versions are counted from 0")
        checked = self._check_manifest(version, manifest)
        if devices is not None:
            if self.staging != "direct":
                raise UpdateRefused(f"version {version}: weights in device memory need an engine with direct staging")
            try:
                self._ask("open_weight_buffers", msgspec.msgpack.encode(devices))
            except BucketError as error:
                raise UpdateRefused(f"version {version}: {error}") from error
        self._manifest, self._devices = checked, devices
        self._digest = WeightDigest("xxh3" if devices is None else "sum128")
        self._next_version = version
        self._started = time.monotonic()
        if self.staging == "direct":
            self.version, self.checksum = -1, ""
            self._write("start_weight_update")
        self.state = State.RECEIVING

    def load(self, version: int, bucket: Bucket) -> None:
        """Take one bucket in; afterwards its segment may be filled again.

        Raises UpdateRefused, and forgets the update, when the bucket is not part of it or does not hold what it says.
        """
        self._check_turn(version)
        try:
            for entry in bucket.entries:
                self._check_entry(entry)
            if self._devices is not None:
                self._digest.update(self._verify_on_devices(bucket))
            else:
                segment = Segment.open(bucket.segment)
                try:
                    self._digest.update(verify_bucket(segment.buffer, bucket))
                    if self.staging == "host":
                        self._stage(segment.buffer[: bucket.nbytes], bucket)
                finally:
                    segment.close()
        except MegarubricError as error:
            self._forget()
            raise UpdateRefused(f"version {version}: {error}") from error
        if self.staging == "direct":
            self._write("update_weights", _update_info(bucket.segment, bucket))

    def check(self, version: int, checksum: str) -> None:
        """Raise UpdateRefused, and forget the update, unless `version` is complete with `checksum`."""
        self._check_turn(version)
        try:
            missing = sorted(self._manifest.keys() - self._digest.names)
            if missing:
                raise UpdateRefused(f"version {version}: {_some(missing)} did not arrive")
            if self._digest.hexdigest() != checksum:
                raise UpdateRefused(
                    f"version {version}: what arrived has checksum {self._digest.hexdigest()}, not {checksum!r}"
                )
        except UpdateRefused:
            self._forget()
            raise

    def finish(self, version: int, checksum: str) -> float:
        """Put `version` in service; returns the seconds since `begin`. The engine must not be in the middle of a step.

        Raises UpdateRefused when it is incomplete, UpdateFailed when the model could not be written.
        """
        self.check(version, checksum)
        if self.staging == "host":
            self._write("start_weight_update")
            for staged, bucket in self._staged:
                self._write("update_weights", _update_info(staged.mapping, bucket))
        self._write("finish_weight_update")
        self.state = State.READY
        self._forget()
        self.version, self.checksum = version, checksum
        return time.monotonic() - self._started

    def abort(self) -> None:
        """Forget the update under way, if there is one."""
        if self.state is State.RECEIVING:
            self._forget()

    def lose_weights(self) -> None:
        """The engine dropped its weights (sleep level 2): none are in service until an update succeeds."""
        self.abort()
        self.state, self.version, self.checksum = State.BROKEN, -1, ""

    def close(self) -> None:
        self._forget()
        for staged in self._pool:
            staged.close()
        self._pool.clear()

    def _write(self, method: str, *args: Any) -> None:
        """Have the workers take a step that changes the model; a failure leaves no version in service."""
        try:
            self._call_workers(method, args)
        except Exception as error:
            self._abandon()
            self.state, self.version, self.checksum = State.BROKEN, -1, ""
            self._forget()
            raise UpdateFailed(f"weights could not be loaded: {type(error).__name__}: {error}") from error

    def _abandon(self) -> None:
        """Have the workers close an update that began to write the model."""
        with contextlib.suppress(Exception):  # the first error is the one to report
            self._call_workers("abandon_weight_update", ())

    def _forget(self) -> None:
        if self.state is State.RECEIVING and self.staging == "direct":
            self._abandon()
        self._pool.extend(staged for staged, _ in self._staged)
        self._staged.clear()
        self._manifest, self._digest, self._next_version = {}, WeightDigest(), -1
        self._devices = None
        if self.state is State.RECEIVING:
            self.state = State.READY if self.version >= 0 else State.BROKEN

    def _stage(self, source: memoryview, bucket: Bucket) -> None:
        fits = [s for s in self._pool if s.nbytes >= len(source)]
        staged = min(fits, key=lambda s: s.nbytes) if fits else _Staged(len(source))
        if fits:
            self._pool.remove(staged)
        staged.fill(source)
        self._staged.append((staged, bucket))

    def _verify_on_devices(self, bucket: Bucket) -> WeightDigest:
        """The digest of a bucket in device memory, when every worker's copy has the sender's. Raises BucketError."""
        digest = WeightDigest("sum128")
        info = _update_info(bucket.segment, bucket)
        for number, hashes in enumerate(self._ask("hash_weight_bucket", info["mapping"], info["entries"])):
            digest = digest_hashes(bucket.entries, hashes)
            if digest.hexdigest() != bucket.checksum:
                raise BucketError(
                    f"bucket in {bucket.segment}: checksum {digest.hexdigest()} on the device of worker {number}, "
                    f"the sender's is {bucket.checksum}"
                )
        return digest

    def _ask(self, method: str, *args: Any) -> list[Any]:
        """What every worker answers to something that leaves the model alone. Raises BucketError for any error."""
        try:
            return list(self._call_workers(method, args))
        except Exception as error:
            words = " ".join(str(error).split())
            raise BucketError(
                words if isinstance(error, MegarubricError) else f"{type(error).__name__}: {words}"
            ) from error

    def _check_turn(self, version: int) -> None:
        if self.state is not State.RECEIVING:
            raise UpdateRefused(f"version {version}: no update has begun")
        if version != self._next_version:
            raise UpdateRefused(f"version {version}: version {self._next_version} is being received")

    def _check_entry(self, entry: TensorEntry) -> None:
        spec = self._manifest.get(entry.name)
        if spec is None:
            raise BucketError(f"tensor {entry.name} is not in the manifest")
        if (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
            raise BucketError(f"tensor {entry.name} arrived as {_kind(entry)}, the manifest says {_kind(spec)}")

    def _check_manifest(self, version: int, manifest: Sequence[TensorSpec]) -> dict[str, TensorSpec]:
        by_name = {t.name: t for t in manifest}
        if len(by_name) != len(manifest) or not by_name:
            raise UpdateRefused(f"version {version}: a manifest names each tensor once, and at least one")
        if self._expected:
            if missing := sorted(self._expected.keys() - by_name.keys()):
                raise UpdateRefused(f"version {version}: manifest lacks {_some(missing)}")
            if unknown := sorted(by_name.keys() - self._expected.keys()):
                raise UpdateRefused(f"version {version}: the model has no {_some(unknown)}")
            for name, spec in by_name.items():
                if spec.shape != self._expected[name].shape:
                    have, want = list(spec.shape), list(self._expected[name].shape)
                    raise UpdateRefused(f"version {version}: tensor {name} has shape {have}, the model's is {want}")
        for spec in manifest:
            if spec.dtype not in _LOSSLESS.get(self._model_dtype, {self._model_dtype}):
                raise UpdateRefused(
                    f"version {version}: tensor {spec.name} is {spec.dtype}, which a {self._model_dtype} engine "
                    "cannot take without loss"
                )
        return by_name


def _update_info(mapping: str, bucket: Bucket) -> dict[str, Any]:
    return {"mapping": mapping, "entries": [msgspec.to_builtins(e) for e in bucket.entries]}


def _kind(tensor: TensorSpec | TensorEntry) -> str:
    return f"{tensor.dtype}{list(tensor.shape)}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"tensor {names[0]}{more}"


# --- what a Hugging Face directory holds ----------------------------------------------------------------------------


def safetensors_files(model_dir: Path) -> list[Path]:
    """The weight files of a Hugging Face directory. Raises BadInput when it has none."""
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise BadInput(model_dir, None, "no *.safetensors file here")
    return files


def safetensors_header(path: Path) -> tuple[Mapping[str, Any], int]:
    """Header of a safetensors file (name -> dtype, shape, data_offsets) and where its data begins, in bytes."""
    try:
        with path.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            if not 2 <= size <= min(100_000_000, path.stat().st_size - 8):
                raise ValueError(f"header of {size} bytes")
            header = json.loads(f.read(size))
    except (OSError, ValueError) as error:
        raise BadInput(path, None, f"not a safetensors file: {error}") from error
    header.pop("__metadata__", None)
    return header, 8 + size


def _spec(path: Path, name: str, info: Mapping[str, Any]) -> TensorSpec:
    if info["dtype"] not in _SAFETENSORS_DTYPES:
        raise BadInput(path, name, f"dtype {info['dtype']} is not exchanged")
    return TensorSpec(name, _SAFETENSORS_DTYPES[info["dtype"]], tuple(info["shape"]))


def manifest_of(model_dir: Path) -> tuple[TensorSpec, ...]:
    """Every tensor in a Hugging Face directory's safetensors files, by their headers alone."""
    return tuple(
        _spec(path, name, info)
        for path in safetensors_files(model_dir)
        for name, info in safetensors_header(path)[0].items()
    )


def checksum_of(model_dir: Path, kind: TensorHash = "xxh3") -> str:
    """`WeightDigest` of a Hugging Face directory's safetensors files: what an update with the same bytes would have."""
    digest = WeightDigest(kind)
    for path in safetensors_files(model_dir):
        header, start = safetensors_header(path)
        with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
            data = memoryview(mapping)
            try:
                for name, info in header.items():
                    first, last = info["data_offsets"]
                    digest.add(_spec(path, name, info), data[start + first : start + last])
            finally:
                data.release()
    return digest.hexdigest()
