"""Host headers and origins that a service accepts."""

from __future__ import annotations

import socket

import pytest

from fastserve.access.hosts import HostCheck, check_host_names, is_loopback, is_own_origin
from fastserve.errors import StartupError


@pytest.mark.parametrize(
    "header",
    [
        *("localhost", "LOCALHOST:21001", "localhost.", "127.0.0.1:80", "10.1.2.3", "[::1]:21001", "[fe80::1]"),
        *("app.localhost:1", "gpu-box:21002", "api.example.com", "EXAMPLE.ORG", "a.b.example.org:8"),
        *(socket.gethostname(), socket.gethostname().partition(".")[0] + ".local:21001", "host.docker.internal:8888"),
    ],
)
def test_own_names_and_addresses_are_answered(header: str) -> None:
    hosts = HostCheck(["0.0.0.0", "gpu-box", "api.example.com", ".example.org", "example.org"])
    assert hosts.allows(header.encode())
    assert hosts.allows(header.encode()), "and again, from memory"


@pytest.mark.parametrize(
    "header",
    [
        *("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example:21001", "notexample.org"),
        *("", ":80", "localhost:x", "localhost:1:2", "localhost@evil.example", "a b", "2130706433", "0x7f.1", "[::1"),
        *("evil.example#localhost", "evil.example/localhost", "locälhost", "x" * 5000, "localhost\\evil", "::1"),
    ],
)
def test_foreign_and_malformed_names_are_not(header: str) -> None:
    hosts = HostCheck(["localhost", ".example.org"])
    assert not hosts.allows(header.encode("latin-1"))
    assert HostCheck(["*"]).allows(header.encode("latin-1"))


@pytest.mark.parametrize("name", ["https://api.example", "api.example:8888", "api.example/", "a b", "*.example", "."])
def test_a_name_that_would_match_nothing_is_refused(name: str) -> None:
    with pytest.raises(StartupError, match=r"--allowed-hosts: .* is no name of a host"):
        check_host_names([name], "--allowed-hosts")
    check_host_names(["*", ".example.org", "api.example", "Box_1", "10.0.0.1", "::1", "[::1]"], "--allowed-hosts")


def test_loopback_is_this_machine_only() -> None:
    assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]", "x.localhost"]))
    assert not any(map(is_loopback, ["", "0.0.0.0", "::", "localhost.example", "10.0.0.1", "127.example", "128.0.0.1"]))


def test_pages_of_this_machine_and_of_the_very_server_are_its_own() -> None:
    for origin in (
        "http://localhost:3000",
        "https://127.0.0.1",
        "http://[::1]:8",
        "http://x.localhost",
        "http://box:8888",
    ):
        assert is_own_origin(origin.encode(), b"box:8888"), origin
    for origin in ("https://evil.example", "null", "", "http://localhost.evil.example", "http://box:8889", "file://x"):
        assert not is_own_origin(origin.encode(), b"box:8888"), origin
        assert not is_own_origin(b"x" * 5000, None)
