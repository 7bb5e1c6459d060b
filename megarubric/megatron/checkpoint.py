"""Checkpoints: Megatron's dist_checkpointing inside a directory that is there whole or not at all.

    PATH/
      weights/        model, distributed optimizer and random states (dist_checkpointing, torch_dist format)
      extra.json      what the caller gave: its data position, step, random states
      manifest.json   written last: format, layout, steps, and size and xxh3_128 of every file

A save goes to a sibling directory and is renamed; `check` accepts a directory only when every file of the manifest is
there with its size and hash. Ranks write and hash in parallel; the directory must be visible to all of them.
"""

from __future__ import annotations

import json
import queue
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megarubric.errors import BadInput
from megarubric.megatron import cpu
from megarubric.megatron.manifest import FORMAT, File, Manifest, check, hash_file, model_hash, sync
from megarubric.megatron.manifest import write as write_manifest
from megarubric.megatron.torch_dist import read_metadata

cpu.ensure()  # before the megatron imports below

from megatron.core import dist_checkpointing, tensor_parallel  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402

if TYPE_CHECKING:
    from megarubric.megatron.trainer import Trainer


def save(trainer: Trainer, path: Path, extra: str) -> int:
    """Write `path`; its size in bytes. Collective.

    Raises BadInput, on all ranks, when `path` exists, `extra` is not JSON or the disk is full; an earlier checkpoint is
    never touched, and what was written is removed.
    """
    partial = path.with_name(f".{path.name}.partial")
    first = trainer.rank == 0

    def prepare() -> None:
        json.loads(extra)
        if path.exists():
            raise FileExistsError(17, "exists already")
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "weights").mkdir(parents=True)
        needed, free = _estimate(trainer), shutil.disk_usage(partial).free
        if free < needed:
            raise OSError(28, f"no room: about {needed >> 20} MiB needed, {free >> 20} MiB free")

    def write() -> None:
        # Megatron passes the writer's results through a queue in a manager process of its own, which would outlive a
        # killed rank. We write in this process, where a plain queue does.
        filesystem_async._results_queue = queue.Queue()
        dist_checkpointing.save(_state(trainer, loading=False), str(partial / "weights"))

    def finish() -> None:
        (partial / "extra.json").write_text(extra)
        for file in _files(partial):
            sync(file)

    def commit(files: dict[str, File]) -> None:
        manifest = Manifest(
            FORMAT,
            trainer.steps,
            trainer.world_size,
            msgspec.structs.asdict(trainer.layout),
            trainer.config.dtype,
            model_hash(trainer.manifest),
            files,
        )
        write_manifest(partial, manifest)
        partial.rename(path)
        sync(path.parent)

    try:
        with _together(trainer, path):
            if first:
                prepare()
        with _together(trainer, path):
            write()
        with _together(trainer, path):
            if first:
                finish()
        files: dict[str, File] = {}
        with _together(trainer, path):
            files = _hash_files(trainer, partial, [str(f.relative_to(partial)) for f in _files(partial)])
        with _together(trainer, path):
            if first:
                commit(files)
    except BadInput:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return sum(f.nbytes for f in files.values())


def load(trainer: Trainer, path: Path) -> str:
    """Restore model, optimizer, random states and step count from `path`; returns the saver's `extra`. Collective.

    Any layout loads what any other saved: the same layout bit for bit, another one the same numbers in other places
    (ranks then start with fresh random states, which training does not draw from). Raises BadInput naming what is
    wrong, before anything is changed, when the checkpoint is partial, corrupt or of another model or dtype.
    """
    with _together(trainer, path, "read"):
        manifest = check(path, hashes=False)
        for name, found, wanted in (
            ("model", manifest.model, model_hash(trainer.manifest)),
            ("dtype", manifest.dtype, trainer.config.dtype),
        ):
            if found != wanted:
                reason = f"is {found}, this run's is {wanted}"
                raise BadInput(path, name, "was saved from another config.json" if name == "model" else reason)
    with _together(trainer, path, "read"):
        found_files = _hash_files(trainer, path, sorted(manifest.files))
        for name, file in manifest.files.items():
            if found_files[name] != file:
                raise BadInput(path, name, "is corrupt: its hash is not the manifest's")
        _refuse_foreign_objects(path / "weights")
    with torch.no_grad():  # the optimizer's float32 shards are views of parameters
        same = (manifest.world_size, manifest.layout) == (trainer.world_size, msgspec.structs.asdict(trainer.layout))
        loaded = dist_checkpointing.load(_state(trainer, loading=True, random=same), str(path / "weights"))
        for number, chunk in enumerate(trainer.model.chunks):
            chunk.module.load_state_dict(loaded[f"model{number}"], strict=True)
        trainer.model.load_optimizer(loaded["optimizer"], manifest.steps)
    if same:  # other ranks than those that were saved keep the random states of their seeds
        _set_random_state(loaded["random"])
    trainer.steps = manifest.steps
    return (path / "extra.json").read_text()


# ------------------------------------------------------------------------------------------------------------- state


def _state(trainer: Trainer, *, loading: bool, random: bool = True) -> dict[str, Any]:
    model: dict[str, Any] = {}
    for number, chunk in enumerate(trainer.model.chunks):
        model[f"model{number}"] = chunk.module.sharded_state_dict()
    optimizer = trainer.model.sharded_state(model, loading=loading)
    state = {**model, "optimizer": optimizer}
    if random:
        shape, place = (trainer.world_size,), (trainer.rank,)
        state["random"] = ShardedObject("random", _random_state(), shape, place, replica_id=0)
    return state


def _random_state() -> dict[str, Any]:
    """Tensors and numbers only, so that it loads with torch's weights_only reader."""
    version, keys, gauss = random.getstate()
    _, np_keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
        "numpy": [torch.from_numpy(np_keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "python": [version, list(keys), gauss],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, python_keys, gauss = state["python"]
    random.setstate((version, tuple(python_keys), gauss))


def _estimate(trainer: Trainer) -> int:
    """Bytes of a checkpoint: the weights, and master, first and second moment in float32."""
    return trainer.n_parameters * (trainer.dtype.itemsize + 12)


# ------------------------------------------------------------------------------------------------------------- files


def _files(directory: Path) -> list[Path]:
    return sorted(f for f in directory.rglob("*") if f.is_file() and f.name != "manifest.json")


def _hash_files(trainer: Trainer, directory: Path, names: list[str]) -> dict[str, File]:
    """Size and hash of each file, the work divided over the ranks; the whole on every rank."""
    mine = names[trainer.rank :: trainer.world_size]
    hashed = {name: File((directory / name).stat().st_size, hash_file(directory / name)) for name in mine}
    parts = _gather_bytes(trainer, msgspec.msgpack.encode(hashed))
    return {n: f for part in parts for n, f in msgspec.msgpack.decode(part, type=dict[str, File]).items()}


def _refuse_foreign_objects(weights: Path) -> None:
    """dist_checkpointing unpickles `.metadata`; see first that it names nothing but what checkpoint metadata is."""
    try:
        read_metadata(weights)
    except BadInput as error:
        raise BadInput(weights.parent, "weights/.metadata", error.reason) from None


# -------------------------------------------------------------------------------------------------------- collectives


def _gather_bytes(trainer: Trainer, data: bytes) -> list[bytes]:
    sizes = torch.zeros(trainer.world_size, dtype=torch.int64)
    sizes[trainer.rank] = len(data)
    dist.all_reduce(sizes, group=trainer.control)
    out = [torch.empty(int(n), dtype=torch.uint8) for n in sizes]
    for rank, buffer in enumerate(out):
        if not buffer.numel():  # every rank knows the sizes
            continue
        if rank == trainer.rank:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(buffer, src=rank, group=trainer.control)
    return [bytes(buffer.numpy()) for buffer in out]


@contextmanager
def _together(trainer: Trainer, path: Path, verb: str = "written") -> Iterator[None]:
    """A step all ranks leave alike: an error on one becomes the same BadInput on all."""
    message = b""
    try:
        yield
    except BadInput as error:
        message = msgspec.json.encode([error.item, error.reason])
    except (OSError, ValueError, dist_checkpointing.core.CheckpointingException) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        message = msgspec.json.encode(["", f"cannot be {verb}: {reason}"])
    except CheckpointException:  # raised on every rank when one could not write; its own text is a list of tracebacks
        message = msgspec.json.encode(["", f"cannot be {verb}: a rank could not write its weights; is the disk full?"])
    failed = [m for m in _gather_bytes(trainer, message) if m]
    if failed:
        item, reason = msgspec.json.decode(failed[0], type=tuple[str, str])
        raise BadInput(path, item or None, reason)
