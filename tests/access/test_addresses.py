"""Syntax of workers' addresses, and the networks that they may be in."""

from __future__ import annotations

import pytest

from fastserve.access.addresses import check_service_address, own_networks, parse_networks, parse_worker_address
from fastserve.access.resolving import NetworkResolver
from fastserve.errors import InvalidRequestError, PermissionDeniedError, StartupError


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("http://localhost:21002", "http://localhost:21002"),
        ("HTTP://GPU-Box.example.COM.:21002/", "http://gpu-box.example.com:21002"),
        ("https://10.0.0.5", "https://10.0.0.5"),
        ("http://10.0.0.5:80", "http://10.0.0.5"),
        ("http://[0:0::1]:5", "http://[::1]:5"),
        ("http://[::ffff:10.0.0.5]:5", "http://10.0.0.5:5"),
        ("http://my_service-1:21002", "http://my_service-1:21002"),
    ],
)
def test_a_proper_address_has_one_form(text: str, canonical: str) -> None:
    assert str(parse_worker_address(text)) == canonical
    assert str(parse_worker_address(canonical)) == canonical


@pytest.mark.parametrize(
    "text",
    [
        *(
            "file:///etc/passwd",
            "javascript:alert(1)",
            "gopher://h:1",
            "ftp://h",
            "//h:1",
            "h:1",
            "",
            "http://",
            "http://:1",
        ),
        *(
            "http://u@h:1",
            "http://u:p@h:1",
            "http://h:1/path",
            "http://h:1//",
            "http://h:1?q",
            "http://h:1#f",
            "http://h?",
        ),
        *(
            "http://h:0",
            "http://h:65536",
            "http://h:99999999",
            "http://h:-1",
            "http://h:",
            "http://h:1:2",
            "http://h: 1",
        ),
        *("http://127.1:1", "http://2130706433:1", "http://0x7f000001:1", "http://0177.0.0.1:1", "http://1.2.3.4.5:1"),
        *("http://[::1", "http://[::1%25eth0]:1", "http://[1.2.3.4]:1", "http://::1:1", "http://a..b:1", "http://-a:1"),
        *(
            "http://h:1\n",
            "http://h\r\nX: y:1",
            "http://h\x00:1",
            "http://h\u202e:1",
            "http://\u212a:1",
            "http://h:\uff11",
        ),
        *(
            "http://h:1\\@x",
            "http://h%2e:1",
            "http://" + "a" * 64 + ":1",
            "http://" + "a." * 140 + "b",
            "http://" + "a" * 10**5,
        ),
    ],
)
def test_anything_else_is_refused_by_name_in_few_words(text: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        parse_worker_address(text)
    message = refused.value.message
    assert refused.value.param == "worker_name"
    assert "http://10.0.0.5:21002" in message
    assert len(message) < 500
    assert message.isascii()
    assert message.isprintable()


async def check(address: str, *networks: str) -> None:
    resolver = NetworkResolver(parse_networks(networks or ("local",)))
    try:
        await resolver.check(parse_worker_address(address))
    finally:
        await resolver.close()


async def test_loopback_and_own_subnets_are_allowed_and_others_are_not() -> None:
    for address in ("http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1", "http://127.9.9.9"):
        await check(address)
    assert {str(network) for network in own_networks()} >= {"127.0.0.0/8", "::1/128"}
    for address in (
        "http://169.254.169.254",
        "http://8.8.8.8:1",
        "http://0.0.0.0:1",
        "http://[::]:1",
        "http://[fe80::1]:1",
    ):
        with pytest.raises(PermissionDeniedError, match=r"--allowed-worker-networks") as refused:
            await check(address)
        assert refused.value.code == "network_not_allowed"


async def test_the_list_of_networks_decides() -> None:
    await check("http://8.8.8.8:1", "8.8.0.0/16")
    await check("http://[2001:db8::5]:1", "local", "2001:db8::/32")
    await check("http://no.such.host.invalid:1", "any")
    for refused in ("http://127.0.0.1:1", "http://localhost:1", "http://[::ffff:127.0.0.1]:1"):
        with pytest.raises(PermissionDeniedError):
            await check(refused, "10.0.0.0/8")
    with pytest.raises(StartupError, match=r"'10\.0\.0\.x' is none of"):
        parse_networks(["10.0.0.x"])


async def test_a_name_that_resolves_to_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"no\.such\.host\.invalid:1 cannot be resolved"):
        await check("http://no.such.host.invalid:1")


async def test_a_name_is_judged_by_every_address_and_again_at_each_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [["127.0.0.1"], ["127.0.0.1", "8.8.8.8"], ["8.8.8.8"]]

    def getaddrinfo(*_: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        return [(2, 1, 6, "", (address, 1)) for address in found.pop(0)]

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    resolver = NetworkResolver(parse_networks(["local"]))
    try:
        assert [row["host"] for row in await resolver.resolve("worker.example", 1)] == ["127.0.0.1"]
        for _ in range(2):
            with pytest.raises(OSError, match="outside of the networks"):
                await resolver.resolve("worker.example", 1)
    finally:
        await resolver.close()


@pytest.mark.parametrize(
    "text",
    [
        "localhost:1",
        "http://",
        "http://:1",
        "http://h:99999",
        "http://h:x",
        "http://h:0",
        "ftp://h:1",
        "http://[::1",
        "",
    ],
)
def test_an_address_of_a_service_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(StartupError, match=r"^--flag .*is no address of a service"):
        check_service_address(text, "--flag")
    for good in ("http://h", "https://h:1/", "HTTP://[::1]:21001", "http://proxy.example/cluster"):
        check_service_address(good, "--flag")
