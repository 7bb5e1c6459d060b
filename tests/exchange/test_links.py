"""Links between ranks: what is put is taken, in order and by the right peer; all else is one line."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from megarubric.errors import BadInput, ProcessDied
from megarubric.exchange.curve import join
from megarubric.exchange.delta import PieceHead
from megarubric.exchange.links import GROUP_BYTES, PROTOCOL, Header, LinkError, Links, Turn
from megarubric.exchange.rpc import CurveKeys

KEYS = CurveKeys.generate()


def name(rank: int) -> str:
    return f"trainer rank {rank} on host {rank // 2}"


@contextmanager
def linked(*ranks: int, timeout_s: float = 10.0) -> Iterator[list[Links]]:
    """Each connected to all."""
    made = [Links(rank, KEYS, timeout_s, name) for rank in ranks]
    try:
        endpoints = {rank: link.bind("127.0.0.1") for rank, link in zip(ranks, made)}
        for rank, link in zip(ranks, made):
            others = {other: endpoint for other, endpoint in endpoints.items() if other != rank}
            link.connect(others, others)
        yield made
    finally:
        for link in made:
            link.close()


@contextmanager
def raw_push(endpoint: str, keys: CurveKeys) -> Iterator[tuple[zmq.Socket, zmq.Socket]]:
    """A socket that connects with `keys`, and its monitor."""
    context = zmq.Context()
    push = context.socket(zmq.PUSH)
    push.linger = 0
    join(push, KEYS.public, KEYS.secret)
    push.curve_publickey, push.curve_secretkey = keys.public, keys.secret
    monitor = push.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
    push.connect(endpoint)
    try:
        yield push, monitor
    finally:
        push.disable_monitor()
        push.close()
        context.destroy()


def piece(number: int, nbytes: int) -> tuple[PieceHead, np.ndarray]:
    return PieceHead(number, nbytes, 1), np.random.default_rng(number).integers(0, 256, nbytes, np.uint8)


def test_both_send_much_before_either_takes():
    """More than any socket buffer, small pieces between large ones; nobody waits for the other's reading."""
    sizes = [3 * GROUP_BYTES, 10, 0, 700, GROUP_BYTES, 64, *[4096] * 600, 2 * GROUP_BYTES]
    with linked(0, 2) as ends:
        for fill in (1, 2):
            turn = Turn(fill, 7, fill - 1)
            for link, other in zip(ends, (2, 0)):
                link.start(turn)
                for number, nbytes in enumerate(sizes):
                    link.put(other, *piece(number, nbytes))
                link.flush()
            for link, other in zip(ends, (2, 0)):
                taken = [(h.rectangle, p.tobytes()) for h, p in link.take({other: range(len(sizes))})]
                assert taken == [(k, piece(k, n)[1].tobytes()) for k, n in enumerate(sizes)]
        assert ends[0].sent_bytes == ends[1].sent_bytes >= 2 * sum(sizes)
        assert ends[0].sent_bytes < 2 * sum(sizes) + 40_000  # a head of a few bytes a piece


def test_pieces_of_several_peers_arrive_in_any_order_of_peers():
    with linked(0, 1, 2) as (a, b, c):
        for link in (a, b, c):
            link.start(Turn(1, 1, 0))
        for link, numbers in ((b, (3, 9)), (a, (1, 4, 5))):
            for number in numbers:
                link.put(2, *piece(number, 1000))
            link.flush()
        assert sorted(h.rectangle for h, _ in c.take({0: [1, 4, 5], 1: [3, 9]})) == [1, 3, 4, 5, 9]
        assert list(c.take({})) == [] and list(c.take({0: []})) == []


TURN = Turn(3, 5, 2)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (lambda h: [h(), b"abcd", b"more"], "a message of 3 frames, expected 2"),
        (lambda h: [b"\xc1", b"abcd"], "unreadable header"),
        (lambda h: [h(v=2), b"abcd"], "trainer rank 1 on host 0 speaks protocol version 2, trainer rank 2 on host 1 1"),
        (lambda h: [h(turn=Turn(3, 5, 1)), b"abcd"], r"sent bucket 1 of version 5 \(fill 3\), .* expects bucket 2"),
        (lambda h: [h(turn=Turn(9, 5, 2)), b"abcd"], r"sent bucket 2 of version 5 \(fill 9\)"),
        (lambda h: [h(source=0), b"abcd"], "trainer rank 0 on host 0 sent more of bucket 2"),
        (lambda h: [h(number=1), b"abcd"], "sent message 1 of bucket 2 .* expects 0"),
        (lambda h: [h(), b"abc"], "sent 3 bytes for 1 pieces of 4"),
        (lambda h: [h(pieces=()), b""], "sent 0 bytes for 0 pieces of 0"),
        (lambda h: [h(pieces=(PieceHead(6, -1, 1), PieceHead(7, 5, 1))), b"abcd"], "sent 4 bytes for 2 pieces of 4"),
        (lambda h: [h(pieces=(PieceHead(7, 4, 1),)), b"abcd"], "sent rectangle 7, expected 6"),
        (
            lambda h: [h(pieces=(PieceHead(6, 2, 1), PieceHead(8, 1, 1), PieceHead(9, 1, 1))), b"abcd"],
            "sent rectangle 9, expected none",
        ),
    ],
)
def test_what_is_not_expected_is_one_line(parts: Callable, reason: str):
    def header(**changed) -> bytes:
        return msgspec.msgpack.encode(
            msgspec.structs.replace(Header(PROTOCOL, 1, TURN, 0, (PieceHead(6, 4, 1),)), **changed)
        )

    link = Links(2, KEYS, 10, name)
    try:
        with raw_push(link.bind("127.0.0.1"), KEYS) as (push, _):
            link.start(TURN)
            push.send_multipart(parts(header))
            with pytest.raises(LinkError, match=reason) as error:
                list(link.take({1: [6, 8]}))
            assert "\n" not in str(error.value)
    finally:
        link.close()


def test_what_a_failed_bucket_left_behind_is_dropped():
    with linked(0, 2) as (a, b):
        for fill in (1, 2):
            for link in (a, b):
                link.start(Turn(fill, 1, 0))
            a.put(2, *piece(fill, 100))
            if fill == 1:
                a.flush()
                for link in (a, b):
                    link.forget()  # before b took anything
        a.flush()
        assert [h.rectangle for h, _ in b.take({0: [2]})] == [2]


def test_only_the_runs_key_gets_in():
    link = Links(2, KEYS, 0.5, name)
    try:
        endpoint = link.bind("127.0.0.1")
        link.start(TURN)
        with raw_push(endpoint, CurveKeys.generate()) as (push, monitor):  # knows the public key, has another pair
            push.send_multipart([msgspec.msgpack.encode(Header(PROTOCOL, 1, TURN, 0, (PieceHead(6, 1, 1),))), b"x"])
            assert monitor.poll(10_000)
            assert recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH
            with pytest.raises(ProcessDied, match=r"^nothing from trainer rank 1 on host 0 within 0\.5 s$"):
                list(link.take({1: [6]}))  # and a refused one is not a lost peer
        plain = zmq.Context()
        unsafe = plain.socket(zmq.PUSH)
        unsafe.linger = 0
        unsafe.connect(endpoint)  # no CURVE
        for words in (b"GET / HTTP/1.0\r\n\r\n", b""):
            where = ("127.0.0.1", int(endpoint.rsplit(":", 1)[1]))
            # It may be thrown out before it has said all.
            with socket.create_connection(where) as stranger, contextlib.suppress(OSError):
                stranger.sendall(words)
                stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(4096):
                    pass
        with pytest.raises(ProcessDied, match=r"^nothing from"):
            list(link.take({1: [6]}))
        plain.destroy()
    finally:
        link.close()


def test_a_lost_peer_is_noticed_long_before_the_time_limit():
    with linked(0, 2, timeout_s=600) as (a, b):
        for link in (a, b):
            link.start(TURN)
        a.put(2, *piece(6, 100))
        a.flush()
        taken = b.take({0: [6, 8]})
        assert next(taken)[0].rectangle == 6
        threading.Timer(0.2, a.close).start()
        with pytest.raises(ProcessDied, match=r"^trainer rank 0 on host 0 has ended; trainer rank 2 on host 1 waits"):
            next(taken)


@pytest.mark.parametrize("address", ["no.such.host.invalid", "192.0.2.7"])
def test_an_address_that_is_not_here_is_one_line(address: str):
    link = Links(2, KEYS, 10, name)
    try:
        with pytest.raises(BadInput, match=f"^environment: MEGARUBRIC_ADDRESS: {address}: "):
            link.bind(address)
    finally:
        link.close()
