"""Request/reply over ZeroMQ: the one wire between the controller, the trainer and the engines.

A message is a ZeroMQ multipart: ``[header, body, *frames]``. Header and body are msgpack-encoded msgspec structs
(the body is a tagged union chosen by the service), frames are raw bytes (token ids, log-probabilities, weights)
described by `Array` entries in the body. Nothing executable is ever decoded.

One `Server` serves many `Client`s (ROUTER/DEALER), so replies may come in any order and a slow call never blocks a
fast one. A client whose peer process dies raises `ProcessDied` instead of hanging.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq
import zmq.asyncio
from numpy.typing import NDArray

from megarubric.errors import MegarubricError, ProcessDied
from megarubric.exchange.curve import Gate, join

PROTOCOL = 1
WATCH_S = 0.25  # how often a waiting client looks whether its peer's process still lives
_WIRE_DTYPES = frozenset({"uint8", "uint16", "int32", "int64", "float32", "float64", "bool"})


class Header(msgspec.Struct, frozen=True, array_like=True):
    """First frame of every message: protocol version, request number, and whether this is an error reply."""

    v: int
    id: int
    error: bool = False


class ErrorReply(msgspec.Struct, frozen=True):
    """Body of an error reply: the exception's class name and its one-line message."""

    kind: str
    message: str


class Array(msgspec.Struct, frozen=True, array_like=True):
    """Where an array lies in the raw frames of a message: frame number, dtype name, shape."""

    frame: int
    dtype: str
    shape: tuple[int, ...]


class RemoteError(MegarubricError):
    """The peer answered with an error."""


class WireError(MegarubricError):
    """A message that does not follow the protocol."""


class Frames:
    """Collects arrays into raw frames while a message body is being built."""

    def __init__(self) -> None:
        self.buffers: list[bytes | memoryview] = []

    def add(self, array: NDArray[Any]) -> Array:
        """Append `array` (made contiguous) as a frame; returns its descriptor for the body."""
        array = np.ascontiguousarray(array)
        if array.dtype.name not in _WIRE_DTYPES:
            raise WireError(f"dtype {array.dtype.name} does not travel; use one of {sorted(_WIRE_DTYPES)}")
        self.buffers.append(array.tobytes() if array.size < 65536 else memoryview(array).cast("B"))
        return Array(len(self.buffers) - 1, array.dtype.name, array.shape)


def read_array(spec: Array, frames: Sequence[bytes | memoryview]) -> NDArray[Any]:
    """The array that `spec` describes, as a read-only view of its frame.

    Raises WireError when the frame is missing, the dtype unknown or the size does not fit the shape.
    """
    if spec.dtype not in _WIRE_DTYPES:
        raise WireError(f"unknown dtype {spec.dtype!r}")
    if not 0 <= spec.frame < len(frames):
        raise WireError(f"frame {spec.frame} of {len(frames)} does not exist")
    if any(n < 0 for n in spec.shape):
        raise WireError(f"negative dimension in shape {spec.shape}")
    dtype = np.dtype(spec.dtype)
    raw = frames[spec.frame]
    expected = dtype.itemsize
    for n in spec.shape:
        expected *= n
    if len(raw) != expected:
        raise WireError(f"frame {spec.frame} has {len(raw)} bytes, shape {spec.shape} of {spec.dtype} needs {expected}")
    return np.frombuffer(raw, dtype=dtype).reshape(spec.shape)


def ipc_endpoint(directory: Path, name: str) -> str:
    """``ipc://`` address of `name` in `directory`, which is made private (0700). Unix socket paths end at 107 bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    os.chmod(directory, stat.S_IRWXU)
    endpoint = f"ipc://{directory}/{name}"
    if len(endpoint) - len("ipc://") > 107:
        raise WireError(f"socket path {endpoint} is longer than 107 bytes: choose a shorter run directory")
    return endpoint


class CurveKeys(msgspec.Struct, frozen=True):
    """CURVE key pair of a run (Z85 text); the same pair authenticates servers and clients of that run: nobody connects
    without its secret (`curve.Gate`)."""

    public: bytes
    secret: bytes

    @classmethod
    def generate(cls) -> CurveKeys:
        public, secret = zmq.curve_keypair()
        return cls(public, secret)

    def save(self, path: Path) -> None:
        """Write the pair, readable by the owner only."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "wb") as f:
            f.write(self.public + b"\n" + self.secret + b"\n")

    @classmethod
    def load(cls, path: Path) -> CurveKeys:
        public, secret = path.read_bytes().split()
        return cls(public, secret)


def _is_tcp(endpoint: str) -> bool:
    """Whether messages leave this host: then they are encrypted, with the run's keys. ``ipc://`` takes no notice of
    keys: its sockets lie in a private directory."""
    return endpoint.startswith("tcp://")


class Call:
    """One request being served: `body`, `frames`, and exactly one `reply` or `fail`."""

    def __init__(self, server: Server[Any], peer: bytes, number: int, body: Any, frames: list[bytes]) -> None:
        self._server, self._peer, self._number = server, peer, number
        self.body, self.frames = body, frames

    def reply(self, body: msgspec.Struct, frames: Sequence[bytes | memoryview] = ()) -> None:
        self._server.send(self._peer, Header(PROTOCOL, self._number), body, frames)

    def fail(self, error: BaseException) -> None:
        message = " ".join(str(error).split()) or type(error).__name__
        reply = ErrorReply(type(error).__name__, message)
        self._server.send(self._peer, Header(PROTOCOL, self._number, error=True), reply, ())


class Server[T: msgspec.Struct]:
    """Serves requests of the tagged union `request_type` on `endpoint`; used from one thread."""

    def __init__(self, endpoint: str, request_type: Any, keys: CurveKeys | None = None) -> None:
        if _is_tcp(endpoint) and keys is None:
            raise WireError("a tcp:// endpoint needs CURVE keys")
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if keys is not None and _is_tcp(endpoint):
            Gate(self._context, keys.public, keys.secret).guard(self._socket)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise WireError(f"cannot bind {endpoint}: {error.strerror or error}") from error
        self._decode_header = msgspec.msgpack.Decoder(Header)
        self._decode_body = msgspec.msgpack.Decoder(request_type)

    @property
    def endpoint(self) -> str:
        """The address bound, with the port that was chosen for a ``tcp://host:*`` endpoint."""
        return self._socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()  # type: ignore[union-attr]

    def receive(self, timeout_s: float) -> Call | None:
        """Next request, or None after `timeout_s` (0 polls) without one. A malformed one is answered and skipped."""
        if not self._socket.poll(int(timeout_s * 1000)):
            return None
        peer, *parts = self._socket.recv_multipart()
        number = 0
        try:
            if len(parts) < 2:
                raise WireError(f"a message has at least 2 frames, got {len(parts)}")
            header = self._decode_header.decode(parts[0])
            number = header.id
            if header.v != PROTOCOL:
                raise WireError(f"protocol version {header.v}, this side speaks {PROTOCOL}")
            return Call(self, peer, number, self._decode_body.decode(parts[1]), parts[2:])
        except (msgspec.DecodeError, WireError) as error:
            Call(self, peer, number, None, []).fail(error)
            return None

    def send(self, peer: bytes, header: Header, body: msgspec.Struct, frames: Sequence[bytes | memoryview]) -> None:
        self._socket.send_multipart(
            [peer, msgspec.msgpack.encode(header), msgspec.msgpack.encode(body), *frames], copy=False
        )

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class Client:
    """Asks a `Server`, from asyncio; any number of calls may be under way.

    `peer_status` returns None while the peer's process lives, else one line saying how it ended; it is asked a few
    times a second while a call waits.
    """

    def __init__(
        self,
        endpoint: str,
        reply_type: Any,
        keys: CurveKeys | None = None,
        peer_status: Callable[[], str | None] = lambda: None,
    ) -> None:
        # The process's one asyncio context, never terminated: a client that is dropped without `close` must not block
        # the collector, which would wait for its socket for ever.
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        if keys is not None and _is_tcp(endpoint):
            join(self._socket, keys.public, keys.secret)
        self._socket.connect(endpoint)
        self._peer_status = peer_status
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[tuple[Any, list[bytes]]]] = {}
        self._decode_header = msgspec.msgpack.Decoder(Header)
        self._decode_body = msgspec.msgpack.Decoder(reply_type)
        self._decode_error = msgspec.msgpack.Decoder(ErrorReply)
        self._tasks: tuple[asyncio.Task[None], asyncio.Task[None]] | None = None

    async def call(
        self, body: msgspec.Struct, frames: Sequence[bytes | memoryview] = (), timeout_s: float | None = None
    ) -> tuple[Any, list[bytes]]:
        """Send `body` and `frames`; returns the reply's body and frames.

        Raises RemoteError when the peer answers with an error, ProcessDied when its process ended, TimeoutError after
        `timeout_s` seconds.
        """
        if self._tasks is None:
            self._tasks = (asyncio.create_task(self._read()), asyncio.create_task(self._watch()))
        number = next(self._numbers)
        future: asyncio.Future[tuple[Any, list[bytes]]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            header = msgspec.msgpack.encode(Header(PROTOCOL, number))
            await self._socket.send_multipart([header, msgspec.msgpack.encode(body), *frames])
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise TimeoutError(f"{type(body).__name__}: no answer within {timeout_s:g} s") from None
        finally:
            self._waiting.pop(number, None)

    async def _watch(self) -> None:
        """Fail every waiting call when the peer's process has ended."""
        while True:
            await asyncio.sleep(WATCH_S)
            if self._waiting and (ended := self._peer_status()) is not None:
                self._fail(ProcessDied(ended))

    def _fail(self, error: Exception) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)

    async def _read(self) -> None:
        while True:
            parts = await self._socket.recv_multipart()
            try:
                header = self._decode_header.decode(parts[0])
                future = self._waiting.get(header.id)
                if future is None or future.done():
                    continue
                if header.error:
                    error = self._decode_error.decode(parts[1])
                    future.set_exception(RemoteError(f"{error.kind}: {error.message}"))
                else:
                    future.set_result((self._decode_body.decode(parts[1]), parts[2:]))
            except (msgspec.DecodeError, IndexError) as error:
                self._fail(WireError(f"unreadable reply: {error}"))

    async def close(self) -> None:
        for task in self._tasks or ():
            task.cancel()
        self._socket.close()
