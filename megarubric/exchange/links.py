"""Trainer ranks of different hosts: pieces of weights over ZeroMQ, encrypted, only among holders of the run's key.

Every rank binds one PULL socket; every rank that sends to it connects a PUSH socket. A message is ``[header,
payload]``: the header a msgpack `Header`, the payload the raw bytes of its pieces one after the other. A large piece is
a message of its own and is sent without being copied; small ones to the same receiver share a message.

Sockets have no high-water mark: a bucket ends with a barrier, so at most one bucket is ever in flight, and a sender
that never blocks cannot deadlock with a receiver that is itself sending.
"""

from __future__ import annotations

import ipaddress
import resource
import socket as network
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec
import numpy as np
import zmq

from megarubric.errors import BadInput, MegarubricError, ProcessDied
from megarubric.exchange.curve import Gate, join
from megarubric.exchange.delta import Bytes, PieceHead
from megarubric.exchange.rpc import CurveKeys

PROTOCOL = 1
GROUP_BYTES = 1 << 20  # small pieces are gathered up to this
PROBE_S = 1.0  # after so long a silence, and every so often then, a receiver looks whether its peers still listen


class LinkError(MegarubricError):
    """A message between ranks that is not the one expected."""


class Turn(msgspec.Struct, frozen=True, array_like=True):
    """One bucket on its way. `fill` counts buckets since the start, so that no message is taken for another's."""

    fill: int
    version: int
    bucket: int


class Header(msgspec.Struct, frozen=True, array_like=True):
    """First frame: protocol version, sending rank, the bucket, and the number of the message from this rank to this
    receiver in it."""

    v: int
    source: int
    turn: Turn
    number: int
    pieces: tuple[PieceHead, ...]


class Links:
    """One rank's sockets to ranks of other hosts. Used from one thread.

    `name` gives words for a rank in errors. A peer that ended, or is silent for `timeout_s`, while something is
    expected of it, is a ProcessDied.
    """

    def __init__(self, rank: int, keys: CurveKeys, timeout_s: float, name: Callable[[int], str]) -> None:
        self._rank, self._keys, self._timeout_s, self._name = rank, keys, timeout_s, name
        self._context = zmq.Context(io_threads=2)
        self._gate = Gate(self._context, keys.public, keys.secret)
        self._pull: zmq.Socket[bytes] | None = None
        self._sources: dict[int, str] = {}
        self._push: dict[int, zmq.Socket[bytes]] = {}
        self._outbox: dict[int, tuple[list[PieceHead], list[Bytes]]] = {}
        self._number: dict[int, int] = {}
        self._turn = Turn(0, 0, 0)
        self._stale = 0  # messages of fills up to this one are left over from one that failed
        self._decode = msgspec.msgpack.Decoder(Header)
        self.sent_bytes = 0  # handed to the network, headers included

    def bind(self, address: str) -> str:
        """Listen on a free port of `address`, an IP address or host name of this host; the endpoint for others.

        Raises BadInput when it is not an address of this host.
        """
        try:
            ip = network.getaddrinfo(address, None, type=network.SOCK_STREAM)[0][4][0]
        except OSError as error:
            raise BadInput("environment", "MEGARUBRIC_ADDRESS", f"{address}: {error.strerror}") from None
        six = ipaddress.ip_address(ip).version == 6
        pull: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self._pull = pull
        pull.ipv6 = six
        pull.set_hwm(0)
        self._gate.guard(pull)
        try:
            pull.bind(f"tcp://{f'[{ip}]' if six else ip}:*")
        except zmq.ZMQError as error:
            raise BadInput("environment", "MEGARUBRIC_ADDRESS", f"{address}: {error.strerror or error}") from None
        return str(pull.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode())  # type: ignore[union-attr]

    def connect(self, endpoints: Mapping[int, str], sources: Mapping[int, str]) -> None:
        """Connect to each rank of `endpoints`, to send to it. `sources`: endpoints of the ranks that send to this."""
        self._sources = dict(sources)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = 1024 + 4 * len(endpoints)  # a socket is a connection and a signalling pipe
        if soft != resource.RLIM_INFINITY and soft < needed:
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard)
            )
        for rank, endpoint in endpoints.items():
            push: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
            self._push[rank] = push
            push.ipv6 = "[" in endpoint
            push.set_hwm(0)
            push.linger = 0
            join(push, self._keys.public, self._keys.secret)
            push.connect(endpoint)

    def start(self, turn: Turn) -> None:
        """The bucket that `put` and `take` are about from now on."""
        self._turn = turn
        self._number = dict.fromkeys(self._push, 0)

    def put(self, receiver: int, head: PieceHead, payload: Bytes) -> None:
        """Send a piece, or keep it to go with the next. `payload` must not change until the bucket is settled."""
        if payload.nbytes < GROUP_BYTES:
            heads, payloads = self._outbox.setdefault(receiver, ([], []))
            heads.append(head)
            payloads.append(payload)
            if sum(p.nbytes for p in payloads) >= GROUP_BYTES:
                self._send_outbox(receiver)
            return
        if receiver in self._outbox:
            self._send_outbox(receiver)  # pieces arrive in the order in which they were put
        self._send(receiver, (head,), payload)

    def flush(self) -> None:
        """Send what `put` kept."""
        for receiver in list(self._outbox):
            self._send_outbox(receiver)

    def take(self, expected: Mapping[int, Sequence[int]]) -> Iterator[tuple[PieceHead, Bytes]]:
        """Receive from each rank of `expected` its rectangles in that order; yields them as they arrive, as read-only
        bytes. Raises LinkError for any other message, ProcessDied for a lost or silent peer."""
        waiting = {source: deque(rectangles) for source, rectangles in expected.items() if rectangles}
        numbers = dict.fromkeys(waiting, 0)
        while waiting:
            parts = self._receive(waiting)
            if len(parts) != 2:
                raise LinkError(f"{self._name(self._rank)}: a message of {len(parts)} frames, expected 2")
            try:
                header = self._decode.decode(parts[0])
            except msgspec.DecodeError as error:
                raise LinkError(f"{self._name(self._rank)}: unreadable header: {error}") from None
            if header.v == PROTOCOL and header.turn.fill <= self._stale:
                continue
            source, payload = header.source, np.frombuffer(parts[1], dtype=np.uint8)
            self._check(header, waiting, numbers, payload.nbytes)
            numbers[source] += 1
            at = 0
            for head in header.pieces:
                if not waiting[source] or head.rectangle != waiting[source][0]:
                    due = waiting[source][0] if waiting[source] else "none"
                    raise LinkError(f"{self._name(source)} sent rectangle {head.rectangle}, expected {due}")
                waiting[source].popleft()
                yield head, payload[at : at + head.nbytes]
                at += head.nbytes
            if not waiting[source]:
                del waiting[source]

    def forget(self) -> None:
        """The present bucket failed: nothing more of it is sent, and what still arrives of it is dropped."""
        self._outbox.clear()
        self._stale = self._turn.fill

    def close(self) -> None:
        """Close all sockets at once; what was not sent is dropped."""
        if self._pull is not None:
            self._pull.close(linger=0)
        for push in self._push.values():
            push.close(linger=0)
        self._pull, self._push = None, {}
        self._context.term()

    def _send_outbox(self, receiver: int) -> None:
        heads, payloads = self._outbox.pop(receiver)
        self._send(receiver, tuple(heads), np.concatenate(payloads))

    def _send(self, receiver: int, heads: tuple[PieceHead, ...], payload: Bytes) -> None:
        header = msgspec.msgpack.encode(Header(PROTOCOL, self._rank, self._turn, self._number[receiver], heads))
        self._number[receiver] += 1
        self._push[receiver].send_multipart([header, payload.data], copy=False)
        self.sent_bytes += len(header) + payload.nbytes

    def _receive(self, waiting: Mapping[int, object]) -> list[memoryview]:
        assert self._pull is not None
        began = time.monotonic()
        while not self._pull.poll(int(min(PROBE_S, self._timeout_s) * 1000)):
            for source in waiting:
                if source in self._sources and not _listens(self._sources[source]):
                    raise ProcessDied(f"{self._name(source)} has ended; {self._name(self._rank)} waits for its weights")
            if time.monotonic() - began > self._timeout_s:
                raise ProcessDied(f"nothing from {self._names(waiting)} within {self._timeout_s:g} s")
        return [frame.buffer for frame in self._pull.recv_multipart(copy=False)]

    def _names(self, ranks: Mapping[int, object]) -> str:
        some = [self._name(rank) for rank in sorted(ranks)[:4]]
        return ", ".join(some) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")

    def _check(self, header: Header, waiting: Mapping[int, object], numbers: Mapping[int, int], nbytes: int) -> None:
        here, source = self._name(self._rank), self._name(header.source)
        if header.v != PROTOCOL:
            raise LinkError(f"{source} speaks protocol version {header.v}, {here} {PROTOCOL}")
        if header.turn != self._turn:
            raise LinkError(f"{source} sent {_words(header.turn)}, {here} expects {_words(self._turn)}")
        if header.source not in waiting:
            raise LinkError(f"{source} sent more of {_words(self._turn)} than {here} expects")
        number = numbers[header.source]
        if header.number != number:
            raise LinkError(f"{source} sent message {header.number} of {_words(self._turn)}, {here} expects {number}")
        total = sum(head.nbytes for head in header.pieces)
        if total != nbytes or not header.pieces or any(head.nbytes < 0 for head in header.pieces):
            raise LinkError(f"{source} sent {nbytes} bytes for {len(header.pieces)} pieces of {total}")


def _words(turn: Turn) -> str:
    return f"bucket {turn.bucket} of version {turn.version} (fill {turn.fill})"


def _listens(endpoint: str) -> bool:
    """False when nothing does: the process has ended. A host that does not answer at all is left to the time limit."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    try:
        network.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        pass
    return True
