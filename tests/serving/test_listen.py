"""Addresses that a service listens on, and the one that it advertises."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fastserve.errors import StartupError
from fastserve.serving.listen import advertised_address, bind, local_host, port_problem

HAS_IPV6 = socket.has_ipv6 and port_problem("::1", 0) is None
needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="this machine has no IPv6")


@contextmanager
def listening(host: str, port: int = 0) -> Iterator[int]:
    sockets = bind(host, port)
    for sock in sockets:
        sock.listen()
    try:
        yield sockets[0].getsockname()[1]
    finally:
        for sock in sockets:
            sock.close()


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


@needs_ipv6
@pytest.mark.parametrize("host", ["::", ""])
def test_the_wildcard_listens_on_both_families_and_its_advertised_address_answers(host: str) -> None:
    with listening(host) as port:
        assert answers("127.0.0.1", port)
        assert answers("::1", port)
        address, _, number = advertised_address(host, port).removeprefix("http://").rpartition(":")
        assert number == str(port)
        assert answers(address.strip("[]"), port)


class Network:
    """Fakes a machine with only some addresses for `listen`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, ipv4: bool, ipv6: bool, leads_outside: bool) -> None:
        families = {socket.AF_INET: ipv4, socket.AF_INET6: ipv6}
        real = socket.socket

        class Socket(real):  # type: ignore[valid-type, misc]
            def __init__(self, family: int = -1, kind: int = -1, *rest: Any, **more: Any) -> None:
                if not families.get(socket.AddressFamily(family), True):
                    raise OSError(97, "Address family not supported by protocol")
                super().__init__(family, kind, *rest, **more)

            def connect(self, address: Any) -> None:
                if not leads_outside:
                    raise OSError(101, "Network is unreachable")
                super().connect(address)

        monkeypatch.setattr("fastserve.serving.listen.socket.socket", Socket)


@needs_ipv6
@pytest.mark.parametrize("leads_outside", [True, False])
def test_on_a_machine_with_ipv6_only_the_advertised_address_answers(
    monkeypatch: pytest.MonkeyPatch, leads_outside: bool
) -> None:
    with monkeypatch.context() as patch:
        Network(patch, ipv4=False, ipv6=True, leads_outside=leads_outside)
        sockets = bind("::", 0)
        port = sockets[0].getsockname()[1]
        assert [sock.family for sock in sockets] == [socket.AF_INET6]
        address = advertised_address("::", port)
        assert local_host("::") == local_host("") == "::1"
    sockets[0].listen()
    host = address.removeprefix("http://[").removesuffix(f"]:{port}")
    assert ":" in host
    assert answers(host, port)
    assert not answers("127.0.0.1", port)
    sockets[0].close()


def test_on_a_machine_with_ipv4_only_the_wildcard_of_both_is_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    Network(monkeypatch, ipv4=True, ipv6=False, leads_outside=False)
    sockets = bind("::", 0)
    assert [sock.family for sock in sockets] == [socket.AF_INET]
    assert advertised_address("::", 7) == "http://127.0.0.1:7"
    assert local_host("::") == local_host("") == "127.0.0.1"
    for sock in sockets:
        sock.close()


@needs_ipv6
def test_an_ipv6_address_stands_in_brackets() -> None:
    assert advertised_address("::1", 8, ssl=True) == "https://[::1]:8"


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("no.such.host.invalid", "the host name no.such.host.invalid cannot be resolved"),
        ("192.0.2.77", "this machine has no address 192.0.2.77"),
        ("a\x1b\nb", "the host name a\\x1b\\nb cannot be resolved"),
        ("x" * 3000, "cannot be resolved"),
    ],
)
def test_a_host_that_cannot_be_listened_on_is_refused_alike_by_both(host: str, words: str) -> None:
    problem = port_problem(host, 0)
    assert problem is not None
    assert words in problem
    with pytest.raises(StartupError) as caught:
        bind(host, 0)
    assert problem in caught.value.message
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", pytest.param("::", marks=needs_ipv6)])
def test_a_port_in_use_is_found_by_both(host: str) -> None:
    with listening("127.0.0.1") as port:
        assert port_problem(host, port) == "the port is in use by another program"
        with pytest.raises(StartupError, match="in use by another program"):
            bind(host, port)
    assert port_problem(host, port) is None


async def test_answers_are_sent_at_once_by_the_plain_event_loop_too() -> None:
    """Small pieces of an answer do not wait for the client's acknowledgement of the one before."""
    nodelay: list[int] = []
    done = asyncio.Event()

    def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        nodelay.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()
        done.set()

    [listening] = bind("127.0.0.1", 0)
    async with await asyncio.start_server(accepted, sock=listening), asyncio.timeout(10):
        _, writer = await asyncio.open_connection(*listening.getsockname())
        await done.wait()
        writer.close()
    assert nodelay[0] != 0
