"""The wire: round trips of arrays, errors that come back as errors, dead peers, malformed messages."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from zmq.utils.monitor import recv_monitor_message

from megarubric.errors import ProcessDied
from megarubric.exchange.rpc import (
    Array,
    Call,
    Client,
    CurveKeys,
    Frames,
    RemoteError,
    Server,
    WireError,
    ipc_endpoint,
    read_array,
)


class Double(msgspec.Struct, frozen=True, tag=True):
    numbers: Array


class Explode(msgspec.Struct, frozen=True, tag=True):
    reason: str


class Stay(msgspec.Struct, frozen=True, tag=True):
    """Never answered."""


class Doubled(msgspec.Struct, frozen=True, tag=True):
    numbers: Array


def answer(call: Call) -> None:
    if isinstance(call.body, Double):
        frames = Frames()
        out = Doubled(frames.add(read_array(call.body.numbers, call.frames) * 2))
        call.reply(out, frames.buffers)
    elif isinstance(call.body, Explode):
        call.fail(ValueError(call.body.reason))


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    stop, threads = threading.Event(), []

    def start(endpoint: str, keys: CurveKeys | None = None) -> str:
        bound: list[str] = []
        ready = threading.Event()

        def loop() -> None:
            server = Server(endpoint, Double | Explode | Stay, keys)
            bound.append(server.endpoint)
            ready.set()
            while not stop.is_set():
                if (call := server.receive(0.05)) is not None:
                    answer(call)
            server.close()

        threads.append(threading.Thread(target=loop))
        threads[-1].start()
        assert ready.wait(10)
        return bound[0]

    yield start
    stop.set()
    for thread in threads:
        thread.join(10)


async def double(client: Client, numbers: np.ndarray) -> np.ndarray:
    frames = Frames()
    body, raw = await client.call(Double(frames.add(numbers)), frames.buffers, timeout_s=10)
    return read_array(body.numbers, raw)


def run_with(endpoint: str, work, **client_args):
    async def main():
        client = Client(endpoint, Doubled, **client_args)
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(main())


def test_many_calls_at_once_keep_their_answers(serve, tmp_path: Path) -> None:
    endpoint = serve(ipc_endpoint(tmp_path / "i", "s"))

    async def work(client: Client) -> None:
        inputs = [np.arange(n, dtype=np.float32) for n in range(50)] + [np.ones((300, 300))]
        outputs = await asyncio.gather(*(double(client, x) for x in inputs))
        for x, y in zip(inputs, outputs, strict=True):
            assert y.dtype == x.dtype
            np.testing.assert_array_equal(y, x * 2)

    run_with(endpoint, work)
    assert (tmp_path / "i").stat().st_mode & 0o777 == 0o700


def test_an_error_comes_back_in_one_line(serve, tmp_path: Path) -> None:
    endpoint = serve(ipc_endpoint(tmp_path / "i", "s"))
    with pytest.raises(RemoteError, match=r"^ValueError: no such thing$"):
        run_with(endpoint, lambda c: c.call(Explode("no such\n  thing"), timeout_s=10))


def test_a_dead_peer_is_an_error_not_a_hang(serve, tmp_path: Path) -> None:
    endpoint = serve(ipc_endpoint(tmp_path / "i", "s"))
    with pytest.raises(ProcessDied, match="trainer-0 was killed"):
        run_with(endpoint, lambda c: c.call(Stay()), peer_status=lambda: "trainer-0 was killed by SIGKILL")


def test_a_client_dropped_without_close_blocks_nothing() -> None:
    code = (
        "import asyncio, gc\n"
        "from megarubric.exchange.rpc import Client, Header\n"
        "async def main():\n"
        "    client = Client('ipc:///nowhere/at-all', Header)\n"
        "    try:\n"
        "        await client.call(Header(1, 1), timeout_s=0.1)\n"
        "    except TimeoutError:\n"
        "        print('timed out')\n"
        "asyncio.run(main())\n"
        "gc.collect()\n"
        "print('collected')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[:2] == ["timed out", "collected"], done.stderr


def test_timeout(serve, tmp_path: Path) -> None:
    endpoint = serve(ipc_endpoint(tmp_path / "i", "s"))
    with pytest.raises(TimeoutError, match="Stay: no answer"):
        run_with(endpoint, lambda c: c.call(Stay(), timeout_s=0.5))


def test_tcp_needs_keys_and_works_with_them(serve, tmp_path: Path) -> None:
    with pytest.raises(WireError, match="CURVE"):
        Server("tcp://127.0.0.1:*", Double)
    CurveKeys.generate().save(tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    keys = CurveKeys.load(tmp_path / "key")
    endpoint = serve("tcp://127.0.0.1:*", keys)
    result = run_with(endpoint, lambda c: double(c, np.arange(4)), keys=keys)
    np.testing.assert_array_equal(result, [0, 2, 4, 6])
    with pytest.raises(TimeoutError):  # who knows the public key only is not let in
        run_with(
            endpoint, lambda c: c.call(Explode("x"), timeout_s=0.5), keys=CurveKeys(keys.public, zmq.curve_keypair()[1])
        )


def test_a_client_with_a_key_pair_of_its_own_is_not_let_in(serve) -> None:
    keys, own = CurveKeys.generate(), CurveKeys.generate()
    endpoint = serve("tcp://127.0.0.1:*", keys)
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.linger = 0
    stranger.curve_serverkey = keys.public  # knows whom to ask, and proves to be somebody else
    stranger.curve_publickey, stranger.curve_secretkey = own.public, own.secret
    refused = stranger.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
    stranger.connect(endpoint)
    assert refused.poll(10_000) and recv_monitor_message(refused)["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH
    stranger.disable_monitor()
    stranger.close()
    context.destroy()
    np.testing.assert_array_equal(run_with(endpoint, lambda c: double(c, np.arange(2)), keys=keys), [0, 2])


@pytest.mark.parametrize("parts", [[], [b"x"], [b"\x93\x01\x01\xc2", b"junk"], [b"\x93\x09\x01\xc2", b"\x80"]])
def test_malformed_messages_do_not_stop_the_server(serve, tmp_path: Path, parts: list[bytes]) -> None:
    endpoint = serve(ipc_endpoint(tmp_path / "i", "s"))
    context = zmq.Context()
    raw = context.socket(zmq.DEALER)
    raw.connect(endpoint)
    raw.send_multipart([*parts] or [b""])
    np.testing.assert_array_equal(run_with(endpoint, lambda c: double(c, np.arange(3))), [0, 2, 4])
    raw.close(linger=0)
    context.term()


@given(
    hnp.arrays(st.sampled_from([np.float32, np.int32, np.bool_]), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0))
)
def test_arrays_round_trip_bit_for_bit(array: np.ndarray) -> None:
    frames = Frames()
    spec = msgspec.msgpack.decode(msgspec.msgpack.encode(frames.add(array)), type=Array)
    back = read_array(spec, [bytes(b) for b in frames.buffers])
    assert back.shape == np.ascontiguousarray(array).shape and back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()


@given(st.integers(-2, 3), st.text(max_size=8), st.lists(st.integers(-3, 2**40), max_size=3), st.binary(max_size=64))
def test_any_descriptor_is_an_array_or_a_wire_error(frame: int, dtype: str, shape: list[int], raw: bytes) -> None:
    try:
        read_array(Array(frame, dtype, tuple(shape)), [raw])
    except WireError as error:
        assert "\n" not in str(error)
