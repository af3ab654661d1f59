"""The CURVE keys of ZeroMQ sockets between the machines of one model, derived from the cluster key.

There is one key pair for the sockets that bind and one for those that connect. Every machine derives both; a peer that
does not have the cluster key can neither complete a handshake nor read or change a message.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.utils import z85

ENV_GANG_KEY = "FASTSERVE_GANG_KEY"
"""Environment variable of a rank's process, with the secret that its keys are derived from."""
HANDSHAKE_TIMEOUT_MS = 5000
"""A connection without a complete handshake is closed after this time."""
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_ZAP_DOMAIN = "fastserve-ranks"
_SECRET_PERSON = b"fastserve-gang"
_POLL_MS = 200


@dataclass(frozen=True)
class CurveKeyPair:
    """A CURVE key pair in Z85, ZeroMQ's text form."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class CurveKeys:
    """The key pairs of all sockets between the ranks of a model."""

    server: CurveKeyPair
    """Used by sockets that bind."""
    client: CurveKeyPair
    """Used by sockets that connect."""

    @classmethod
    def derive(cls, secret: str) -> CurveKeys:
        """`secret`: see gang_secret."""
        return cls(_key_pair(secret, b"server"), _key_pair(secret, b"client"))

    def secure_server(self, socket: zmq.Socket[Any]) -> None:
        """Call it before `bind`, in a context with a CurveAuthenticator of these keys."""
        socket.curve_server = True
        socket.curve_publickey = self.server.public
        socket.curve_secretkey = self.server.secret
        socket.zap_domain = _ZAP_DOMAIN.encode()
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)

    def secure_client(self, socket: zmq.Socket[Any]) -> None:
        """Call it before `connect`."""
        socket.curve_serverkey = self.server.public
        socket.curve_publickey = self.client.public
        socket.curve_secretkey = self.client.secret
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)


def gang_secret(cluster_key: str) -> str:
    """A secret for the ranks of a model, from which the cluster key cannot be found: what ranks' processes inherit."""
    return hashlib.blake2b(cluster_key.encode(), digest_size=32, person=_SECRET_PERSON).hexdigest()


def _key_pair(secret: str, role: bytes) -> CurveKeyPair:
    private = z85.encode(hashlib.blake2b(role, key=bytes.fromhex(secret), digest_size=32).digest())
    return CurveKeyPair(zmq.curve_public(private), private)


class CurveAuthenticator:
    """Answers ZeroMQ's question in a context whether a peer may connect: yes if it has the client key.

    One for a context. Close it after the sockets and before the context.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: CurveKeys) -> None:
        self._client = z85.decode(keys.client.public)
        self._end = threading.Event()
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(_ZAP_ENDPOINT)
        self._thread = threading.Thread(target=self._run, name="curve", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """May be called twice."""
        self._end.set()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        while not self._end.is_set():
            if self._socket.poll(_POLL_MS):
                self._socket.send_multipart(self._answer(self._socket.recv_multipart()))

    def _answer(self, request: list[bytes]) -> list[bytes]:
        """Answer as ZeroMQ's RFC 27 says."""
        version, number, domain, _address, _identity, mechanism, *credentials = request
        is_known = (
            domain == _ZAP_DOMAIN.encode()
            and mechanism == b"CURVE"
            and len(credentials) == 1
            and hmac.compare_digest(credentials[0], self._client)
        )
        status = [b"200", b"OK"] if is_known else [b"400", b"the cluster key is another one"]
        return [version, number, *status, b"", b""]
