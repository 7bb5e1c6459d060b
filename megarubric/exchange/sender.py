"""The trainer's end of a weight exchange: every rank writes what it holds straight to its place in a bucket.

The plan is made once, from shapes alone. A version is published bucket by bucket into two shared memory segments in
turn: `begin`, then for each bucket in order `fill`, then `end`. Nothing is gathered on a rank: a tensor-parallel slice,
an expert, a pipeline stage's layer is written by a rank that holds it, and a barrier makes the bucket whole. Every host
has two segments of its own; what none of its ranks holds comes from a rank of another host (`spread`, `links`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megarubric.errors import BadInput, MegarubricError
from megarubric.exchange import spread as spreading
from megarubric.exchange.buckets import (
    Bucket,
    Segment,
    TensorEntry,
    digest_entries,
    dtype_bytes,
    sweep,
    tensor_view,
)
from megarubric.exchange.control import gather_bytes, settle
from megarubric.exchange.delta import Bytes, Kept, PieceHead, Sent, whole
from megarubric.exchange.links import Links, Turn
from megarubric.exchange.publisher import Publisher
from megarubric.exchange.rpc import CurveKeys
from megarubric.megatron.pieces import Piece


@dataclass
class _Work:
    """What this rank does for one bucket. Rectangles are numbers of the spread, in ascending order."""

    writes: list[tuple[TensorEntry, Piece]] = field(default_factory=list)
    sends: list[tuple[int, Piece, list[int]]] = field(default_factory=list)  # rectangle, piece, receiving ranks
    receives: dict[int, list[int]] = field(default_factory=dict)  # by source rank
    places: dict[int, tuple[TensorEntry, tuple[slice, ...], int]] = field(default_factory=dict)  # of rectangles; bytes


class Sender(Publisher):
    """One rank's part in publishing through the hosts' memory.

    pieces: this rank's, owned or not (a copy holds the same values). group: all ranks, over gloo. Rank 0 of a host
    makes and removes its segments.

    hosts: host of a rank is ``rank * hosts // world``. Several need `keys`, the run's, and `address`, where ranks of
    other hosts reach this one. delta: send between hosts what changed since the last version, for a host copy of what
    this rank sends and of what it receives. timeout_s: how long to wait for a rank of another host.
    """

    def __init__(
        self,
        manifest: dict[str, tuple[int, ...]],
        dtype: torch.dtype,
        pieces: Sequence[Piece],
        *,
        group: dist.ProcessGroup,
        shm_prefix: str,
        bucket_bytes: int,
        hosts: int = 1,
        keys: CurveKeys | None = None,
        address: str = "127.0.0.1",
        delta: bool = False,
        timeout_s: float = 600.0,
    ) -> None:
        """Raises BadInput for more hosts than ranks, or several without keys."""
        self._rank, self._world, self._hosts = dist.get_rank(group), dist.get_world_size(group), hosts
        if not 1 <= hosts <= self._world:
            raise BadInput("trainer", "hosts", f"{hosts} hosts for {self._world} ranks")
        if hosts > 1 and keys is None:
            raise BadInput("trainer", "keys", "ranks on several hosts need the run's keys: --keys FILE")
        super().__init__(manifest, dtype, bucket_bytes)
        self.segments = tuple((f"{p}0", f"{p}1") for p in (f"{shm_prefix}-h{h}-weights-" for h in range(hosts)))
        self._host = spreading.host_of(self._rank, self._world, hosts)
        self._leads = self._rank == 0 or spreading.host_of(self._rank - 1, self._world, hosts) != self._host
        self._prefix = f"{shm_prefix}-h{self._host}-weights-"
        self._dtype, self._group, self._pieces = dtype, group, pieces
        self._keys, self._address, self._timeout_s = keys, address, timeout_s
        self._item_bytes = dtype_bytes(self.wire)
        self._sent = Sent(self._item_bytes) if delta else None
        self._kept = Kept(self._item_bytes) if delta else None
        self._work: list[_Work] = []
        self._links: Links | None = None
        self._mapped: list[Segment] = []
        self._fills = 0
        self._raw = 0  # bytes of pieces that this rank sent for the present version, before encoding
        self._sent_before = 0

    def begin(self, version: int) -> None:
        """Plans, connects and makes the segments at the first call; they are kept until `close`. Raises BadInput when
        there is no room for the segments, SpreadError when the ranks' pieces do not make up the tensors.
        """
        if not self._mapped:
            if not self._work:
                self._plan()
            self._open()
        super().begin(version)
        self._raw, self._sent_before = 0, self._links.sent_bytes if self._links else 0

    def fill(self, version: int, index: int) -> Bucket | None:
        """Write bucket `index` on every host; the bucket of host 0 on rank 0.

        What goes wrong on one rank alone (LinkError, DeltaError, ProcessDied) is raised on every rank; the version must
        then be begun again.
        """
        self._check_turn(version, index)
        segment, work, error = self._mapped[index % 2], self._work[index], None
        self._fills += 1
        try:
            with torch.no_grad():
                if self._links is not None:
                    self._links.start(Turn(self._fills, version, index))
                    self._send(work, self._links)  # only queues: nothing waits for a receiver
                for entry, piece in work.writes:
                    tensor_view(segment.buffer, entry)[piece.hf_index].copy_(piece.local)
            if self._links is not None:
                self._receive(work, self._links, segment)
        except MegarubricError as caught:
            error = caught
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies to the host have ended before others are told so
        try:
            # Also tells senders that all they sent has arrived, so that they may change the memory it was sent from.
            settle(error, self._group)
        except MegarubricError:
            self._forget()
            raise
        self._next += 1
        if self._rank != 0:
            return None
        return self._filled(segment.name, index, digest_entries(segment.buffer, self.table.buckets[index]))

    def end(self, version: int) -> str:
        """The version's checksum; sums what the ranks sent to other hosts."""
        checksum = super().end(version)
        if self._hosts > 1:
            sent = self._links.sent_bytes - self._sent_before if self._links else 0
            sums = torch.tensor([sent, self._raw])
            dist.all_reduce(sums, group=self._group)
            self.network_bytes, self.network_raw_bytes = (int(n) for n in sums)
        return checksum

    def close(self) -> None:
        """Close the connections and unmap the segments; the first rank of a host removes their names."""
        if self._links is not None:
            self._links.close()
            self._links, self._work = None, []
        self._unmap()

    # One bucket ------------------------------------------------------------------------------------------------------

    def _send(self, work: _Work, links: Links) -> None:
        for rectangle, piece, receivers in work.sends:
            data = self._bytes(piece)
            if self._sent is None:
                head, payload = PieceHead(rectangle, data.nbytes, self._fills), data
            else:
                head, payload = self._sent.encode(rectangle, data)
            for receiver in receivers:
                links.put(receiver, head, payload)
            self._raw += data.nbytes * len(receivers)
        links.flush()

    def _receive(self, work: _Work, links: Links, segment: Segment) -> None:
        for head, payload in links.take(work.receives):
            entry, index, nbytes = work.places[head.rectangle]
            data = self._kept.decode(head, payload, nbytes) if self._kept else whole(head, payload, nbytes)
            place = np.frombuffer(
                segment.buffer, f"u{self._item_bytes}", entry.nbytes // self._item_bytes, entry.offset
            )
            part = place.reshape(entry.shape)[index]
            part[...] = data.view(place.dtype).reshape(part.shape)

    def _bytes(self, piece: Piece) -> Bytes:
        """The piece as it travels: the parameter's own memory where that is contiguous, on the host, of the dtype."""
        local = piece.local.to("cpu", self._dtype).contiguous()
        data: Bytes = local.reshape(-1).view(torch.uint8).numpy()
        return data

    def _forget(self) -> None:
        """A bucket failed somewhere: which rank has what is not known, so begin anew, with whole pieces."""
        self._version = None
        for memory in (self._links, self._sent, self._kept):
            if memory is not None:
                memory.forget()

    # Once ------------------------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Agree with all ranks on who writes and sends what; connect to ranks of other hosts."""
        tensors = self.table.manifest
        own = {(p.hf_name, tuple((s.start, s.stop) for s in p.hf_index)): p for p in self._pieces}
        rows = spreading.rectangles(((p.hf_name, p.hf_index) for p in own.values()), tensors)
        told = gather_bytes(rows.tobytes(), self._group)
        held = [np.frombuffer(data, np.int64).reshape(-1, rows.shape[1]) for data in told]
        plan = spreading.spread(held, tensors, self._hosts)
        part = plan.part(self._rank)

        entries = [entry for bucket in self.table.buckets for entry in bucket]
        bucket_of = np.repeat(np.arange(len(self.table.buckets)), [len(bucket) for bucket in self.table.buckets])
        work = [_Work() for _ in self.table.buckets]

        def place(rectangle: int) -> tuple[_Work, TensorEntry, tuple[slice, ...]]:
            row: NDArray[np.int64] = plan.rectangles[rectangle]
            entry = entries[row[0]]
            return work[bucket_of[row[0]]], entry, spreading.slices(row.tolist(), entry.shape)

        def piece(entry: TensorEntry, index: Iterable[slice]) -> Piece:
            return own[entry.name, tuple((s.start, s.stop) for s in index)]

        for rectangle in part.writes:
            bucket, entry, index = place(rectangle)
            bucket.writes.append((entry, piece(entry, index)))
        for rectangle, receivers in part.sends.items():
            bucket, entry, index = place(rectangle)
            bucket.sends.append((rectangle, piece(entry, index), receivers))
        for rectangle, source in part.receives.items():
            bucket, entry, index = place(rectangle)
            bucket.receives.setdefault(source, []).append(rectangle)
            bucket.places[rectangle] = (entry, index, int(plan.nbytes[rectangle]))
        if self._hosts > 1:
            self._connect({r for receivers in part.sends.values() for r in receivers}, set(part.receives.values()))
        self._work = work

    def _connect(self, receivers: set[int], sources: set[int]) -> None:
        assert self._keys is not None
        links, error, endpoint = Links(self._rank, self._keys, self._timeout_s, self._name), None, ""
        try:
            if receivers or sources:
                endpoint = links.bind(self._address)
        except MegarubricError as caught:
            error = caught
        try:
            settle(error, self._group)
        except MegarubricError:
            links.close()
            raise
        told = gather_bytes(msgspec.msgpack.encode(endpoint), self._group)
        endpoints = [msgspec.msgpack.decode(data, type=str) for data in told]
        links.connect({r: endpoints[r] for r in sorted(receivers)}, {r: endpoints[r] for r in sorted(sources)})
        self._links = links

    def _name(self, rank: int) -> str:
        return f"trainer rank {rank} on host {spreading.host_of(rank, self._world, self._hosts)}"

    def _open(self) -> None:
        """Make this host's segments, or map those that its first rank made."""
        nbytes = self.table.segment_bytes
        if self._leads:
            sweep(self._prefix)  # of a trainer of this run that was killed
        for makes in (True, False):
            error: MegarubricError | None = None
            try:
                if self._leads == makes:
                    for name in self.segments[self._host]:
                        made = Segment.create(name, nbytes) if makes else Segment.open(name, writable=True)
                        self._mapped.append(made)
            except MegarubricError as caught:
                error = caught
            try:
                settle(error, self._group)
            except MegarubricError:
                self._unmap()
                raise

    def _unmap(self) -> None:
        for segment in self._mapped:
            segment.close()
            if self._leads:
                segment.unlink()
        self._mapped = []
