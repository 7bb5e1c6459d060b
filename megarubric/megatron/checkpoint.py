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
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import (  # noqa: E402
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest  # noqa: E402

if TYPE_CHECKING:
    from megarubric.megatron.trainer import Trainer

_EXTRA = "_extra_state"


@dataclass
class Save:
    """A checkpoint being written: what each rank writes by itself goes on in a thread, the rest waits for `finish`."""

    path: Path
    partial: Path
    extra: str
    steps: int
    request: AsyncRequest
    thread: threading.Thread | None = None
    error: BaseException | None = None

    def run(self) -> None:
        try:
            assert self.request.async_fn is not None
            self.request.async_fn(*self.request.async_fn_args, **self.request.async_fn_kwargs)
        except BaseException as error:  # told to all ranks by `finish`
            self.error = error


def save(trainer: Trainer, path: Path, extra: str) -> int:
    """Write `path`; its size in bytes. Collective.

    Raises BadInput, on all ranks, when `path` exists, `extra` is not JSON or the disk is full; an earlier checkpoint is
    never touched, and what was written is removed.
    """
    done = finish(trainer, begin(trainer, path, extra, copy=False), wait=True)
    assert done is not None
    return done


def begin(trainer: Trainer, path: Path, extra: str, *, copy: bool = True) -> Save:
    """Start writing `path` and return when the state as it is now cannot change any more. Collective; raises as `save`.

    With `copy` weights in host memory are copied first (those on a device always are), so training may go on. There is
    no checkpoint before `finish`.
    """
    partial = path.with_name(f".{path.name}.partial")

    def prepare() -> None:
        json.loads(extra)
        if path.exists():
            raise FileExistsError(17, "exists already")
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "weights").mkdir(parents=True)
        needed, free = _estimate(trainer), shutil.disk_usage(partial).free
        if free < needed:
            raise OSError(28, f"no room: about {needed >> 20} MiB needed, {free >> 20} MiB free")

    with _or_nothing(trainer, partial):
        with _together(trainer, path):
            if trainer.rank == 0:
                prepare()
        with _together(trainer, path):
            # Megatron passes the writers' results through a queue in a manager process of its own, which would outlive
            # a killed rank. We write in this process, where a plain queue does.
            filesystem_async._results_queue = queue.Queue()
            state = _state(trainer, loading=False, copy=copy and trainer.device.type == "cpu")
            request = dist_checkpointing.save(
                state, str(partial / "weights"), async_sharded_save=True, async_strategy="mcore"
            )
            arguments = list(request.async_fn_args)
            if request.preload_fn is not None:
                arguments[1] = request.preload_fn()
            started = Save(path, partial, extra, trainer.steps, request._replace(async_fn_args=tuple(arguments)))
    if request.async_fn is not None:
        started.thread = threading.Thread(target=started.run, name=f"save {path.name}", daemon=True)
        started.thread.start()
    return started


def finish(trainer: Trainer, started: Save, *, wait: bool) -> int | None:
    """Make the checkpoint of what `begin` started; its size in bytes. Without `wait`, None while a rank still writes.

    Collective; raises as `save`.
    """
    path, partial, first = started.path, started.partial, trainer.rank == 0
    writing = started.thread is not None and started.thread.is_alive()
    if not wait and any(_gather_bytes(trainer, b"1" if writing else b"")):
        return None

    def commit(files: dict[str, File]) -> None:
        manifest = Manifest(
            FORMAT,
            started.steps,
            trainer.world_size,
            msgspec.structs.asdict(trainer.layout),
            trainer.config.dtype,
            model_hash(trainer.manifest),
            files,
        )
        write_manifest(partial, manifest)
        partial.rename(path)
        sync(path.parent)

    with _or_nothing(trainer, partial), trainer.residence.connected():  # Megatron ends a save on the device
        with _together(trainer, path):
            if started.thread is not None:
                started.thread.join()
            if started.error is not None:
                raise started.error
        with _together(trainer, path):
            for function in started.request.finalize_fns:
                function()
        with _together(trainer, path):
            if first:
                (partial / "extra.json").write_text(started.extra)
                for file in _files(partial):
                    sync(file)
        files: dict[str, File] = {}
        with _together(trainer, path):
            files = _hash_files(trainer, partial, [str(f.relative_to(partial)) for f in _files(partial)])
        with _together(trainer, path):
            if first:
                commit(files)
    return sum(f.nbytes for f in files.values())


@contextmanager
def _or_nothing(trainer: Trainer, partial: Path) -> Iterator[None]:
    try:
        yield
    except BadInput:
        if trainer.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


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
            keys = chunk.module.load_state_dict(loaded[f"model{number}"], strict=False)
            if wrong := [key for key in (*keys.missing_keys, *keys.unexpected_keys) if _EXTRA not in key]:
                raise ValueError(f"{path}: {wrong[0]} is missing or not the model's")  # its config.json is the model's
        trainer.model.load_optimizer(loaded["optimizer"], manifest.steps)
        if trainer.dtype == torch.bfloat16 and not trainer.config.optimizer_offload:
            trainer.model.weights_from_masters()  # those saved may have been FP8, or this run's are
    if same:  # other ranks than those that were saved keep the random states of their seeds
        _set_random_state(loaded["random"])
    trainer.steps = manifest.steps
    return (path / "extra.json").read_text()


# ------------------------------------------------------------------------------------------------------------- state


def _state(trainer: Trainer, *, loading: bool, random: bool = True, copy: bool = False) -> dict[str, Any]:
    model: dict[str, Any] = {}
    for number, chunk in enumerate(trainer.model.chunks):
        held = chunk.module.sharded_state_dict()
        # Of Transformer Engine's own entries only delayed scaling's say anything, the scales it has. Without the others
        # either kind of modules loads what the other saved, and nothing pickled is read.
        delayed = trainer.config.fp8 == "delayed"
        model[f"model{number}"] = {key: value for key, value in held.items() if delayed or _EXTRA not in key}
    optimizer = trainer.model.sharded_state(model, loading=loading)
    if copy:  # the optimizer's are copies already
        for tensor in nested_values(model):
            if isinstance(tensor, ShardedTensor | ShardedTensorFactory):
                tensor.data = tensor.data.detach().clone()
    state = {**model, "optimizer": optimizer}
    if random:
        shape, place = (trainer.world_size,), (trainer.rank,)
        state["random"] = ShardedObject("random", _random_state(), shape, place, replica_id=0)
    return state


def _random_state() -> dict[str, Any]:
    """Tensors and numbers only, so that it loads with torch's weights_only reader."""
    version, keys, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)  # numpy types it as a dictionary too
    _, np_keys, position, has_gauss, cached = legacy
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
