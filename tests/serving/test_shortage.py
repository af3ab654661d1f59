"""Open files: the limit is raised, and running out of them does not count as the other side's failure."""

from __future__ import annotations

import errno
import resource
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from fastserve.serving.shortage import MIN_CONNECTIONS, is_own_shortage, max_connections_of_process

CONNECT_WITHOUT_FILES = """
import asyncio, os, resource, socket, sys
import aiohttp
from fastserve.serving.shortage import is_own_shortage

async def main(host):
    async with aiohttp.ClientSession() as session:
        with socket.create_server(("127.0.0.1", 0)) as server:
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            files = []
            try:
                while True:
                    files.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                pass
            try:
                await session.get(f"http://{host}:{server.getsockname()[1]}/")
            except Exception as error:
                print(type(error).__name__, is_own_shortage(error))

asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_connection_that_fails_for_want_of_files_is_our_own_shortage(host: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", CONNECT_WITHOUT_FILES, host], capture_output=True, text=True, timeout=60
    )
    assert run.stdout.endswith(" True\n"), run.stdout + run.stderr


def refused() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        socket.create_connection(sock.getsockname(), timeout=1)


def unknown() -> None:
    socket.getaddrinfo("no.such.host.invalid", 1)


@pytest.mark.parametrize("fail", [refused, unknown])
def test_another_side_that_cannot_be_reached_is_no_shortage_of_ours(fail: Callable[[], None]) -> None:
    with pytest.raises(OSError) as caught:
        fail()
    assert not is_own_shortage(caught.value)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOMEM])
def test_a_shortage_is_found_behind_the_error_that_it_was_raised_as(number: int) -> None:
    with pytest.raises(RuntimeError) as caught:  # noqa: PT012 - one raise within another
        try:
            raise OSError(number, "")
        except OSError as cause:
            raise RuntimeError from cause
    assert is_own_shortage(caught.value)


@pytest.mark.parametrize(("configured", "expected"), [(1, 1), (8, 8), (10**6, None)])
def test_no_more_connections_than_configured_or_than_there_are_files(configured: int, expected: int | None) -> None:
    limit = max_connections_of_process(configured)
    assert (
        limit == expected
        if expected
        else MIN_CONNECTIONS <= limit <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
    )


def test_the_soft_limit_of_open_files_is_raised_to_the_hard_one() -> None:
    code = (
        "import resource; from fastserve.serving.shortage import raise_file_limit; raise_file_limit();"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=lower, check=True)
    assert run.stdout == "300\n"
