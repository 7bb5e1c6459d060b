"""Weights through device memory, on a machine without a GPU: the stand-in runtime is the device, gloo is NCCL."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from megarubric.exchange.buckets import (
    Bucket,
    BucketError,
    BucketTable,
    DeviceBuffers,
    TensorEntry,
    TensorSpec,
    tensor_in,
)
from megarubric.exchange.cuda_memory import CudaError
from megarubric.exchange.device_receiver import OpenBuffers
from megarubric.exchange.receiver import Receiver, State, UpdateRefused, checksum_of

SHAPES = {
    "model.embed_tokens.weight": (13, 8),
    "model.layers.0.attn.weight": (12, 8),
    "model.layers.0.mlp.weight": (8, 24),
    "model.layers.1.attn.weight": (12, 8),
    "model.norm.weight": (7,),
}
DEVICE = torch.device("cpu")


def value(name: str, version: int) -> torch.Tensor:
    seed = sum(map(ord, name)) + 1000 * version
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def pieces_of(rank: int, world: int, version: int) -> list[Any]:
    """Rows, columns or all of a tensor, owned by exactly one rank; rank 1 also has copies that it does not own."""
    from megarubric.megatron.pieces import Piece

    found = []
    for number, name in enumerate(SHAPES):
        whole, shape = value(name, version), SHAPES[name]
        if name.endswith("mlp.weight"):  # a column slice of every row
            width = shape[1] // world
            index = (slice(0, shape[0]), slice(rank * width, (rank + 1) * width))
        elif name.endswith("attn.weight"):
            rows = shape[0] // world
            index = (slice(rank * rows, (rank + 1) * rows), slice(0, shape[1]))
        else:
            index = tuple(slice(0, n) for n in shape)
        owned = (len(shape) == 2 and "attn" in name) or "mlp" in name or number % world == rank
        if owned or rank == 1:
            here = tuple(slice(0, s.stop - s.start) for s in index)
            values = whole[index].clone() if owned else whole[index] + 1  # a copy gone astray must not be sent
            found.append(Piece(name, shape, index, values, here, owned))
    return found


def publish(cudart: str) -> dict[str, Any]:
    """Two versions through device buffers and through shared memory: equal bytes on every rank, equal tables."""
    import torch.distributed as dist

    from megarubric.exchange.device_sender import DeviceSender
    from megarubric.exchange.sender import Sender

    dist.init_process_group("gloo")
    group, rank, world = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    os.environ.update(MEGARUBRIC_CUDART=cudart, STANDIN_DEVICES=str(world - rank))
    prefix = f"mrdevice-{os.getppid()}"
    # Copies that nobody owns are astray on purpose (`pieces_of`), so shared memory gets the owned ones alone.
    pieces = pieces_of(rank, world, 0)
    owned = [p for p in pieces if p.owned]
    device = DeviceSender(SHAPES, torch.bfloat16, pieces, group=group, device=DEVICE, name=prefix, bucket_bytes=600)
    host = Sender(SHAPES, torch.bfloat16, owned, group=group, shm_prefix=prefix, bucket_bytes=600)
    equal, checksums, handles = [], [], []
    for version in (1, 2):
        for old, new in zip(pieces, pieces_of(rank, world, version)):
            old.param.copy_(new.param)
        host.begin(version)
        device.begin(version)
        assert device.devices is not None and host.table == device.table
        handles.append({k: [h.hex() for h in v] for k, v in device.devices.handles.items()})
        for index, entries in enumerate(device.table.buckets):
            filled, other = device.fill(version, index), host.fill(version, index)
            ours, theirs = device._buffers[index % 2].tensor, host._mapped[index % 2].buffer
            for e in entries:
                wanted = bytes(theirs[e.offset : e.offset + e.nbytes])
                equal.append(ours[e.offset : e.offset + e.nbytes].numpy().tobytes() == wanted)
            assert (filled is None) == (other is None) == (rank != 0)
            if filled is not None:
                assert (filled.entries, filled.nbytes) == (other.entries, other.nbytes)
                assert filled.segment == f"{prefix}-device-{index % 2}"
        checksums.append(device.end(version))
        host.end(version)
        again = device.checksum()
        assert rank != 0 or again == checksums[-1]
    host.close()
    return {"equal": equal, "checksums": checksums, "handles": handles, "buckets": len(device.table.buckets)}


@pytest.mark.engine
def test_the_sum_over_ranks_is_what_shared_memory_has(ranks, cudart, tmp_path) -> None:
    results = ranks(4, publish, cudart=str(cudart))
    for result in results:
        assert result["equal"] == [True] * (2 * len(SHAPES)) and result["buckets"] > 2
        assert result["handles"][0] == result["handles"][1] == results[0]["handles"][0]  # sent once
        assert len(result["handles"][0]) == 4
    write_safetensors(tmp_path / "model.safetensors", {name: value(name, 2) for name in SHAPES})
    first, second = results[0]["checksums"]
    assert second == checksum_of(tmp_path, "sum128") != first
    assert second.removeprefix("sum128:") != checksum_of(tmp_path)


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    header, blob = {}, b""
    for name, tensor in tensors.items():
        data = tensor.view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [len(blob), len(blob) + len(data)],
        }
        blob += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + blob)


def no_room(cudart: str) -> str:
    """Only rank 1's device is full: all ranks raise, in step, and a second attempt with room goes well."""
    import torch.distributed as dist

    from megarubric.errors import MegarubricError
    from megarubric.exchange.device_sender import DeviceSender

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    os.environ.update(MEGARUBRIC_CUDART=cudart, STANDIN_DEVICES=str(rank))
    os.environ["STANDIN_BYTES"] = str((3 if rank == 1 else 64) << 20)
    pieces = pieces_of(rank, 2, 1)
    sender = DeviceSender(
        SHAPES, torch.bfloat16, pieces, group=dist.group.WORLD, device=DEVICE, name="mr", bucket_bytes=600
    )
    try:
        sender.begin(1)
        return "no error"
    except MegarubricError as error:
        told = f"{type(error).__name__}: {error}"
    os.environ["STANDIN_BYTES"] = str(64 << 20)
    sender.begin(1)
    for index in range(len(sender.table.buckets)):
        sender.fill(1, index)
    sender.end(1)
    return told


@pytest.mark.engine
def test_a_full_device_is_one_line_on_every_rank(ranks, cudart) -> None:
    other, full = ranks(2, no_room, cudart=str(cudart))
    assert full == ("CudaError: a weight buffer of 2097152 bytes on cpu: cudaMalloc: out of memory (CUDA error 2)")
    assert other == f"PublishError: trainer rank 1: {full.removeprefix('CudaError: ')}"


# --- the engine's end, against a trainer in another process ----------------------------------------------------------


SERVER = """
import os, sys, msgspec, torch
import torch.distributed as dist
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import importlib.util
spec = importlib.util.spec_from_file_location("device_exchange", sys.argv[1])
here = importlib.util.module_from_spec(spec)
spec.loader.exec_module(here)
from megarubric.exchange.device_sender import DeviceSender
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=0, world_size=1)
pieces = here.pieces_of(0, 1, 1)
sender = DeviceSender(here.SHAPES, torch.bfloat16, pieces, group=dist.group.WORLD, device=here.DEVICE, name="mr",
                      bucket_bytes=600)
def answer(body):
    print(msgspec.json.encode(body).decode(), flush=True)
for line in sys.stdin:
    word, *numbers = line.split()
    if word == "begin":
        version = int(numbers[0])
        for old, new in zip(pieces, here.pieces_of(0, 1, version)):
            old.param.copy_(new.param)
        sender.begin(version)
        answer((sender.table, sender.devices))
    elif word == "fill":
        answer(sender.fill(version, int(numbers[0])))
    elif word == "end":
        answer(sender.end(version))
    elif word == "poke":
        sender._buffers[int(numbers[0])].tensor[int(numbers[1])] ^= 1
        answer(None)
"""


class Trainer:
    """A trainer of one rank, in a process of its own, on the physical device 7."""

    def __init__(self, cudart: Path, directory: Path) -> None:
        env = {**os.environ, "MEGARUBRIC_CUDART": str(cudart), "STANDIN_DEVICES": "7"}
        env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        command = [sys.executable, "-c", SERVER, __file__, str(directory / "rendezvous")]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)

    def ask(self, line: str, answer: Any) -> Any:
        print(line, file=self.process.stdin, flush=True)
        return msgspec.json.decode(self.process.stdout.readline(), type=answer)

    def close(self) -> None:
        self.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def trainer_process(cudart, tmp_path_factory) -> Iterator[Trainer]:
    made = Trainer(cudart, tmp_path_factory.mktemp("trainer"))
    yield made
    made.close()


@pytest.fixture
def trainer(trainer_process, cudart, monkeypatch) -> Trainer:
    """The trainer; this process sees its device as number 1 of two."""
    monkeypatch.setenv("MEGARUBRIC_CUDART", str(cudart))
    monkeypatch.setenv("STANDIN_DEVICES", "3,7")
    return trainer_process


class Workers:
    """One of vLLM's workers as far as a receiver calls it, with the real buffers."""

    def __init__(self, device: torch.device) -> None:
        self.buffers = OpenBuffers(device)
        self.model: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.broken = ""

    def __call__(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        self.calls.append(method)
        if method == self.broken:
            raise RuntimeError("a kernel\nfailed")
        if method == "open_weight_buffers":
            return [self.buffers.open(msgspec.msgpack.decode(args[0], type=DeviceBuffers))]
        if method == "hash_weight_bucket":
            entries = [msgspec.convert(e, TensorEntry) for e in args[1]]
            return [self.buffers.hashes(args[0], entries)]
        if method == "update_weights":
            (info,) = args
            assert info["mapping"] in self.buffers
            for e in (msgspec.convert(e, TensorEntry) for e in info["entries"]):
                view = tensor_in(self.buffers[info["mapping"]].tensor, e)
                assert (view.dtype, tuple(view.shape)) == (torch.bfloat16, e.shape)
                self.model[e.name] = view.reshape(-1).view(torch.uint8).numpy().tobytes()
        return [None]

    def close(self) -> None:
        self.buffers.close()


def expected() -> list[TensorSpec]:
    return [TensorSpec(name, "bfloat16", shape) for name, shape in SHAPES.items()]


def send(trainer: Trainer, receiver: Receiver, version: int) -> str:
    table, devices = trainer.ask(f"begin {version}", tuple[BucketTable, DeviceBuffers])
    receiver.begin(version, table.manifest, devices)
    for index in range(len(table.buckets)):
        receiver.load(version, trainer.ask(f"fill {index}", Bucket))
    return trainer.ask("end", str)


def test_versions_go_through_buffers_that_are_opened_once(trainer, tmp_path) -> None:
    workers = Workers(torch.device("cpu", 1))
    receiver = Receiver(workers, expected(), "bfloat16", "direct")
    opened = set()
    for version in (1, 2, 3):
        checksum = send(trainer, receiver, version)
        receiver.finish(version, checksum)
        assert (receiver.state, receiver.version, receiver.checksum) == (State.READY, version, checksum)
        opened |= {buffer.address for buffer in workers.buffers._open.values()}
        for name in SHAPES:
            assert workers.model[name] == value(name, version).view(torch.uint8).numpy().tobytes(), name
        write_safetensors(tmp_path / "model.safetensors", {name: value(name, version) for name in SHAPES})
        assert checksum == checksum_of(tmp_path, "sum128")
    assert len(opened) == 2
    workers.close()


def test_a_byte_that_changes_on_the_device_is_found(trainer) -> None:
    workers = Workers(torch.device("cpu", 1))
    receiver = Receiver(workers, expected(), "bfloat16", "direct")
    table, devices = trainer.ask("begin 1", tuple[BucketTable, DeviceBuffers])
    receiver.begin(1, table.manifest, devices)
    bucket = trainer.ask("fill 0", Bucket)
    trainer.ask("poke 0 5", None)
    with pytest.raises(UpdateRefused, match=r"checksum sum128:\w+ on the device of worker 0, the sender's is sum128:"):
        receiver.load(1, bucket)
    assert workers.calls[-1] == "abandon_weight_update" and receiver.state is State.BROKEN
    checksum = send(trainer, receiver, 2)  # a good one mends it
    receiver.finish(2, checksum)
    assert (receiver.state, receiver.version) == (State.READY, 2)
    workers.close()


def test_what_cannot_work_is_refused_before_the_model_is_touched(trainer) -> None:
    table, devices = trainer.ask("begin 1", tuple[BucketTable, DeviceBuffers])
    elsewhere = Workers(torch.device("cpu", 0))  # physical device 3, where no rank is
    receiver = Receiver(elsewhere, expected(), "bfloat16", "direct", version=4)
    with pytest.raises(
        UpdateRefused, match=r"no trainer rank is on this engine's device 0{30}03: exchange.through: host"
    ):
        receiver.begin(1, table.manifest, devices)
    assert elsewhere.calls == ["open_weight_buffers"] and (receiver.state, receiver.version) == (State.READY, 4)
    staged = Receiver(elsewhere, expected(), "bfloat16", "host", version=4)
    with pytest.raises(UpdateRefused, match="need an engine with direct staging"):
        staged.begin(1, table.manifest, devices)
    elsewhere.broken = "open_weight_buffers"
    with pytest.raises(UpdateRefused, match=r"version 1: RuntimeError: a kernel failed$"):
        receiver.begin(1, table.manifest, devices)
    assert (receiver.state, receiver.version) == (State.READY, 4)

    buffers = OpenBuffers(torch.device("cpu", 1))
    buffers.open(devices)
    with pytest.raises(BucketError, match="device buffer other is not open"):
        buffers.hashes("other", [])
    entry = msgspec.structs.replace(table.buckets[0][0], offset=1 << 40)
    with pytest.raises(BucketError, match="leave a buffer"):
        buffers.hashes("mr-device-0", [entry])
    # A trainer that was started anew has other handles: the old ones are closed and these opened.
    ((uuid, (first, _)),) = devices.handles.items()
    gone = bytearray(first)
    gone[8:12] = (999).to_bytes(4, "little")  # a file that this process does not have open
    with pytest.raises(CudaError, match="mapping of buffer object failed"):
        buffers.open(msgspec.structs.replace(devices, handles={uuid: (first, bytes(gone))}))
    assert "mr-device-0" not in buffers
    buffers.open(devices)
    assert "mr-device-0" in buffers
    buffers.close()
