"""Keys of sockets between machines: who has the cluster key connects, and nobody else."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import zmq

from fastserve.distributed.keys import CurveAuthenticator, CurveKeys, gang_secret

KEY = "a key of this test, 1234567890"
WAIT_MS = 10_000
REFUSAL_MS = 400


@pytest.fixture
def server() -> Iterator[tuple[zmq.Socket[bytes], str]]:
    keys = CurveKeys.derive(gang_secret(KEY))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    authenticator = CurveAuthenticator(context, keys)
    bound = context.socket(zmq.ROUTER)
    keys.secure_server(bound)
    port = bound.bind_to_random_port("tcp://127.0.0.1")
    yield bound, f"tcp://127.0.0.1:{port}"
    bound.close(linger=0)
    authenticator.close()
    context.term()


@pytest.fixture
def client() -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context.socket(zmq.DEALER)
    context.destroy(linger=0)


def test_a_peer_with_the_cluster_key_connects(server: tuple[zmq.Socket[bytes], str], client: zmq.Socket[bytes]) -> None:
    bound, endpoint = server
    CurveKeys.derive(gang_secret(KEY)).secure_client(client)
    client.connect(endpoint)
    client.send(b"hello")
    assert bound.poll(WAIT_MS)
    identity, message = bound.recv_multipart()
    assert message == b"hello"
    bound.send_multipart([identity, b"welcome"])
    assert client.poll(WAIT_MS)
    assert client.recv() == b"welcome"


@pytest.mark.parametrize("what", ["no mechanism", "another cluster key", "the server's key without the client's"])
def test_a_stranger_reaches_nobody(server: tuple[zmq.Socket[bytes], str], client: zmq.Socket[bytes], what: str) -> None:
    bound, endpoint = server
    if what == "another cluster key":
        CurveKeys.derive(gang_secret(KEY + "0")).secure_client(client)
    elif what != "no mechanism":
        client.curve_serverkey = CurveKeys.derive(gang_secret(KEY)).server.public
        client.curve_publickey, client.curve_secretkey = zmq.curve_keypair()
    client.connect(endpoint)
    client.send(b"hello")
    assert not bound.poll(REFUSAL_MS)
    test_a_peer_with_the_cluster_key_connects(server, client.context.socket(zmq.DEALER))


def test_bytes_of_no_protocol_do_not_end_the_socket(
    server: tuple[zmq.Socket[bytes], str], client: zmq.Socket[bytes]
) -> None:
    _, endpoint = server
    host, port = endpoint.removeprefix("tcp://").split(":")
    strangers = [socket.create_connection((host, int(port))) for _ in range(100)]
    for stranger in strangers:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)))
    test_a_peer_with_the_cluster_key_connects(server, client)
    for stranger in strangers:
        stranger.close()


def test_keys_do_not_show_the_secret() -> None:
    secret = gang_secret(KEY)
    keys = CurveKeys.derive(secret)
    assert keys == CurveKeys.derive(secret)
    assert keys.server != keys.client
    assert keys.server.secret.decode() not in repr(keys)
    assert KEY not in secret
