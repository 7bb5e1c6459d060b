"""What a trainer process does with the controller's commands: rank 0 serves them, the others follow.

Every command is broadcast from rank 0 as bytes over gloo and executed by all. An error that all ranks meet alike (bad
batch, full disk, missing file) is answered in one line and the ranks go on. An error of one rank alone leaves the
others in a collective, so all ranks end. A heartbeat passes while nothing is asked, so the death of any rank is noticed
by the others within about a second.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from megarubric.errors import MegarubricError, ProcessDied
from megarubric.exchange.rpc import Call, Frames, Server
from megarubric.megatron import messages as m
from megarubric.megatron.trainer import Trainer

HEARTBEAT_S = 1.0


class Commands:
    """What each request does on a rank. Bodies and frames are as received; replies count on rank 0."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        pids = torch.zeros(trainer.world_size, dtype=torch.int64)
        pids[trainer.rank] = os.getpid()
        dist.all_reduce(pids, group=trainer.control)
        self._pids = [int(pid) for pid in pids]
        self._do: dict[type, Callable[..., tuple[Any, Frames]]] = {
            m.Describe: self._describe,
            m.Logprobs: self._logprobs,
            m.Train: self._train,
            m.BeginPublish: self._begin_publish,
            m.FillBucket: self._fill_bucket,
            m.EndPublish: self._end_publish,
            m.Checksum: self._checksum,
            m.SaveCheckpoint: self._save,
            m.FinishSave: self._finish_save,
            m.LoadCheckpoint: self._load,
            m.ExportHF: self._export,
            m.Offload: self._offload,
            m.Onload: self._onload,
            m.Shutdown: self._shutdown,
        }

    def __call__(self, body: Any, frames: Sequence[bytes | memoryview]) -> tuple[Any, Frames]:
        """Execute `body`; its reply and the reply's frames."""
        self._began = time.perf_counter()
        return self._do[type(body)](body, frames)

    def _seconds(self) -> float:
        return time.perf_counter() - self._began

    def _describe(self, body: m.Describe, frames: Any) -> tuple[m.Description, Frames]:
        t = self.trainer
        layout = {k: 1 if v is None else v for k, v in msgspec.structs.asdict(t.layout).items()}
        layout["dp"] = t.packing.dp
        reply = m.Description(t.world_size, layout, t.n_parameters, t.config.dtype, str(t.device), t.steps, self._pids)
        return reply, Frames()

    def _logprobs(self, body: m.Logprobs, frames: Any) -> tuple[m.TokenValues, Frames]:
        logprobs, entropy = self.trainer.logprobs(body.batch.unpack(frames), body.which, body.temperature)
        out = Frames()
        return m.TokenValues(out.add(logprobs), out.add(entropy), self._seconds()), out

    def _train(self, body: m.Train, frames: Any) -> tuple[m.Trained, Frames]:
        updates = self.trainer.train(body.batch.unpack(frames), body.loss, body.lr)
        return m.Trained(updates, self.trainer.steps, self._seconds()), Frames()

    def _begin_publish(self, body: m.BeginPublish, frames: Any) -> tuple[m.PublishPlan, Frames]:
        sender = self.trainer.sender
        sender.begin(body.version)
        table = sender.table
        plan = m.PublishPlan(body.version, table, sender.segments, table.segment_bytes, sender.devices)
        return plan, Frames()

    def _fill_bucket(self, body: m.FillBucket, frames: Any) -> tuple[Any, Frames]:
        bucket = self.trainer.sender.fill(body.version, body.index)
        return (None if bucket is None else m.Filled(body.index, bucket, self._seconds())), Frames()

    def _end_publish(self, body: m.EndPublish, frames: Any) -> tuple[m.WeightsChecksum, Frames]:
        sender = self.trainer.sender
        checksum = sender.end(body.version)
        return m.WeightsChecksum(checksum, sender.network_bytes, sender.network_raw_bytes), Frames()

    def _checksum(self, body: m.Checksum, frames: Any) -> tuple[m.WeightsChecksum, Frames]:
        return m.WeightsChecksum(self.trainer.sender.checksum()), Frames()

    def _save(self, body: m.SaveCheckpoint, frames: Any) -> tuple[m.CheckpointSaved, Frames]:
        if body.background:
            self.trainer.begin_save(body.path, body.extra)
            nbytes = 0
        else:
            nbytes = self.trainer.save(body.path, body.extra)
        return m.CheckpointSaved(body.path, nbytes, self._seconds()), Frames()

    def _finish_save(self, body: m.FinishSave, frames: Any) -> tuple[m.CheckpointSaved | m.Done, Frames]:
        saved = self.trainer.finish_save(wait=body.wait)
        if saved is None:
            return m.Done(self._seconds()), Frames()
        return m.CheckpointSaved(*saved, self._seconds()), Frames()

    def _load(self, body: m.LoadCheckpoint, frames: Any) -> tuple[m.CheckpointLoaded, Frames]:
        extra = self.trainer.load(body.path)
        return m.CheckpointLoaded(self.trainer.steps, extra, self._seconds()), Frames()

    def _export(self, body: m.ExportHF, frames: Any) -> tuple[m.Done, Frames]:
        self.trainer.export_hf(body.path)
        return m.Done(self._seconds()), Frames()

    def _offload(self, body: m.Offload, frames: Any) -> tuple[m.Done, Frames]:
        self.trainer.offload(body.parameters)
        return m.Done(self._seconds()), Frames()

    def _onload(self, body: m.Onload, frames: Any) -> tuple[m.Done, Frames]:
        self.trainer.onload()
        return m.Done(self._seconds()), Frames()

    def _shutdown(self, body: m.Shutdown, frames: Any) -> tuple[m.Done, Frames]:
        return m.Done(self._seconds()), Frames()


class Ranks:
    """Commands from rank 0 to all, and agreement on how they ended. Nothing but bytes is sent, and decoded by type."""

    def __init__(self, trainer: Trainer) -> None:
        self._group, self._alone = trainer.control, trainer.world_size == 1

    def tell(self, parts: Sequence[bytes | memoryview]) -> None:
        """Rank 0: send `parts` (none: a heartbeat) to the ranks in `hear`."""
        if self._alone:
            return
        sizes = torch.tensor([len(part) for part in parts], dtype=torch.int64)
        dist.broadcast(torch.tensor([len(parts)]), src=0, group=self._group)
        if parts:
            dist.broadcast(sizes, src=0, group=self._group)
            joined = bytearray().join(parts)
            dist.broadcast(torch.frombuffer(joined, dtype=torch.uint8), src=0, group=self._group)

    def hear(self) -> list[memoryview]:
        """The others: the parts that rank 0 told; none for a heartbeat."""
        count = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(count, src=0, group=self._group)
        if int(count) == 0:
            return []
        sizes = torch.zeros(int(count), dtype=torch.int64)
        dist.broadcast(sizes, src=0, group=self._group)
        joined = torch.empty(int(sizes.sum()), dtype=torch.uint8)
        dist.broadcast(joined, src=0, group=self._group)
        whole, parts, start = memoryview(joined.numpy()), [], 0
        for size in sizes.tolist():
            parts.append(whole[start : start + size])
            start += size
        return parts

    def agree(self, error: MegarubricError | None) -> None:
        """Raise ProcessDied when the command failed on some ranks only: their states no longer fit together."""
        if self._alone:
            return
        failed = torch.tensor([int(error is not None)])
        dist.all_reduce(failed, group=self._group)
        if 0 < int(failed) < self._group.size():
            what = str(error) if error else "another rank could not execute a command that this one executed"
            raise ProcessDied(f"the trainer ranks are out of step: {what}")


def serve(trainer: Trainer, server: Server[Any]) -> None:
    """Rank 0: answer the controller until it asks to shut down."""
    commands, ranks = Commands(trainer), Ranks(trainer)
    while True:
        call = server.receive(HEARTBEAT_S)
        if call is None:
            ranks.tell([])
        elif _answer(call, commands, ranks, trainer.world_size):
            return


def _answer(call: Call, commands: Commands, ranks: Ranks, world_size: int) -> bool:
    """Execute one call on all ranks and reply; True when it was the last."""
    try:
        ranks.tell([msgspec.msgpack.encode(call.body), *call.frames])
        error: MegarubricError | None = None
        try:
            body, frames = commands(call.body, call.frames)
        except MegarubricError as caught:
            error = caught
        ranks.agree(error)
    except Exception as fatal:
        if world_size == 1 and not isinstance(fatal, torch.OutOfMemoryError):
            traceback.print_exc()
            call.fail(fatal)
            return False  # nobody waits in a collective: the next command may well succeed
        ended = as_process_died(fatal)
        call.fail(ended)
        raise ended from fatal
    if error is not None:
        call.fail(error)
        return False
    call.reply(body, frames.buffers)
    return isinstance(call.body, m.Shutdown)


def as_process_died(error: BaseException) -> ProcessDied:
    """What ends a rank, in one line: a lost connection means that another rank ended first."""
    if isinstance(error, ProcessDied):
        return error
    text = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, RuntimeError) and ("gloo" in text or "Connection" in text or "NCCL" in text):
        return ProcessDied("this trainer rank lost another one, which ended or hung: see the other ranks' logs")
    return ProcessDied(f"a trainer rank failed: {type(error).__name__}: {text}")


def follow(trainer: Trainer) -> None:
    """The other ranks: execute what rank 0 tells until it tells to shut down."""
    commands, ranks = Commands(trainer), Ranks(trainer)
    decoder = msgspec.msgpack.Decoder(m.Request)
    while True:
        parts = ranks.hear()
        if not parts:
            continue
        body = decoder.decode(parts[0])
        error: MegarubricError | None = None
        try:
            commands(body, parts[1:])
        except MegarubricError as caught:
            error = caught
        ranks.agree(error)
        if isinstance(body, m.Shutdown):
            return
