"""The API server has run out of open files: it reports that, and blames neither a worker nor the controller."""

from __future__ import annotations

import asyncio
import errno
import json
import re
import resource
import sys
from collections.abc import AsyncIterator

import aiohttp
import pytest

from fastserve.serving.shortage import is_own_shortage
from tests.gateway.cluster import CHAT, DONE, EVENTS, StubController, StubWorker, stream

MAX_OPEN_FILES = 64
NUM_STREAMS = 200


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM])
def test_a_shortage_is_found_in_the_errors_that_wrap_it(number: int) -> None:
    error = OSError(number, "short")
    assert is_own_shortage(error)
    wrapped = aiohttp.ClientConnectorError(None, error)  # type: ignore[arg-type]
    assert is_own_shortage(wrapped)
    outer = RuntimeError("outer")
    outer.__cause__ = wrapped
    assert is_own_shortage(outer)


@pytest.mark.parametrize("number", [errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH])
def test_errors_of_the_other_side_are_no_own_shortage(number: int) -> None:
    assert not is_own_shortage(OSError(number, "theirs"))
    assert not is_own_shortage(TimeoutError())
    looped = OSError(number, "theirs")
    looped.__cause__ = looped
    assert not is_own_shortage(looped)


@pytest.fixture
async def controller() -> AsyncIterator[StubController]:
    made = StubController()
    await made.start()
    yield made
    await made.kill()


@pytest.fixture
async def worker(controller: StubController) -> AsyncIterator[StubWorker]:
    made = StubWorker(stream(*EVENTS, DONE, delay_s=0.05))
    await made.start()
    controller.add(made.address)
    yield made
    await made.kill()


async def test_a_server_out_of_open_files_blames_nobody(controller: StubController, worker: StubWorker) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fastserve.openai_api_server", "--port=0", "--host=127.0.0.1"),
        f"--controller-address={controller.address}",
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_OPEN_FILES, MAX_OPEN_FILES)),
    )
    assert process.stderr is not None
    try:
        url, line = "", b""
        async with asyncio.timeout(30):
            while b"Uvicorn running on" not in line:
                line = await process.stderr.readline()
                assert line, "the server ended"
                url = found[1].decode() if (found := re.search(rb"base_url (http\S+)/v1", line)) else url
        reading = asyncio.ensure_future(process.stderr.read())
        timeout = aiohttp.ClientTimeout(total=30)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:

            async def ask() -> tuple[int, bytes]:
                try:
                    async with http.post(url + "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
                        assert response.status == 200 or int(response.headers["retry-after"]) >= 1
                        return response.status, await response.read()
                except aiohttp.ClientError:
                    return 0, b""  # no connection: there was no file descriptor for it

            answers = await asyncio.gather(*(ask() for _ in range(NUM_STREAMS)))
            refused = [json.loads(body)["error"]["code"] for status, body in answers if status == 503]
            assert {status for status, _ in answers} <= {0, 200, 503}
            assert refused
            # There was no file descriptor for the client's connection, or none for the worker's.
            assert set(refused) <= {"server_out_of_resources", "server_overloaded"}
            assert not controller.failures
            assert not controller.failed

            async def is_well() -> bool:
                return (await ask())[0] == 200

            # The load is over.
            assert any([await is_well() for _ in range(20)])
        process.terminate()
        log = (await asyncio.wait_for(reading, 10)).decode()
        assert "does not answer" not in log
        assert "Traceback" not in log
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
