"""Who may connect: a CURVE server alone lets in any client that knows its public key; a `Gate` asks for the run's own.

A run has one key pair (`rpc.CurveKeys`), which servers and clients alike hold. The gate answers libzmq's ZAP requests
(RFC 27) of one ZeroMQ context: only a client that proved to have the secret of the run's pair is let in.
"""

from __future__ import annotations

import threading
from typing import Any

import zmq
from zmq.utils import z85

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
DOMAIN = b"megarubric"


class Gate:
    """Authenticates the connections to all `guard`ed sockets of `context`. Ends when the context is terminated."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], public: bytes, secret: bytes) -> None:
        """`public` and `secret` are the run's pair as Z85 text. Made before any guarded socket is bound."""
        self._public, self._secret = public, secret
        self._allowed = z85.decode(public)
        self._socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(ZAP_ENDPOINT)
        threading.Thread(target=self._answer, name="zap", daemon=True).start()

    def guard(self, socket: zmq.Socket[bytes]) -> None:
        """Make `socket` a CURVE server with the run's key, before it is bound."""
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self._public, self._secret
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody is let in when nobody answers here

    def _answer(self) -> None:
        try:
            while True:
                # version, request id, domain, address, identity, mechanism, credentials (of CURVE: the client's key)
                version, number, domain, _, _, mechanism, *credentials = self._socket.recv_multipart()
                known = domain == DOMAIN and mechanism == b"CURVE" and credentials == [self._allowed]
                status = (b"200", b"OK") if known else (b"400", b"not of this run")
                self._socket.send_multipart([version, number, *status, b"", b""])
        except zmq.ZMQError:
            pass  # the context ends
        finally:
            self._socket.close()


def join(socket: zmq.Socket[Any], public: bytes, secret: bytes) -> None:
    """Make `socket` a CURVE client of the run, before it connects."""
    socket.curve_serverkey = public
    socket.curve_publickey, socket.curve_secretkey = public, secret
