"""Workers are called before they are listed, at allowed addresses only, and names stay with their first owner."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.access.serving import eventually, run_controller, run_server, run_worker
from tests.access.test_cluster_guard import CHAT, ask
from tests.keys import CLUSTER

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
STATUS = {"model_names": ["m"], "speed": 1, "queue_length": 0}


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(headers=CLUSTER) as session:
        yield session


@asynccontextmanager
async def stand_in(handle: Handler, port: int = 0) -> AsyncIterator[str]:
    """A server that answers everything with `handle`; yields its address."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def says(status: int, body: str = "{}", **headers: str) -> Handler:
    async def handle(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text=body, headers=headers)

    return handle


async def beat(
    http: aiohttp.ClientSession, controller: str, name: str, *, key: str | None = None, **status: Any
) -> tuple[int, str | None]:
    body = {"worker_name": name, "queue_length": 0, "status": STATUS | {"heartbeat_interval_s": 60.0} | status}
    headers = CLUSTER if key is None else {"Authorization": f"Bearer {key}"}
    return await ask(http, "POST", controller + "/receive_heart_beat", json=body, headers=headers)


async def listed(http: aiohttp.ClientSession, controller: str, headers: dict[str, str] = CLUSTER) -> set[str]:
    async with http.get(controller + "/workers", headers=headers) as response:
        return {row["address"] for row in (await response.json())["workers"]}


async def test_an_address_that_is_none_or_lies_elsewhere_is_never_called(http: aiohttp.ClientSession) -> None:
    async with run_controller() as controller:
        for name in ("file:///etc/passwd", "http://127.0.0.1:1/x?y", "http://u:p@127.0.0.1:1", "http://" + "a" * 9999):
            assert await beat(http, controller, name) == (400, "invalid_value")
            for path in ("/register_worker", "/deregister_worker", "/report_failure"):
                body = {"worker_name": name, "check_heart_beat": True, "worker_status": STATUS}
                assert await ask(http, "POST", controller + path, json=body) == (400, "invalid_value")
        for name in ("http://169.254.169.254", "http://93.184.216.34:80", "http://0.0.0.0:21001"):
            assert await beat(http, controller, name) == (403, "network_not_allowed")
            body = {"worker_name": name, "check_heart_beat": False}
            assert (await ask(http, "POST", controller + "/register_worker", json=body))[0] == 403
        assert await listed(http, controller) == set()


@pytest.mark.parametrize(
    "handle",
    [
        says(404),
        says(500),
        says(200, "<html>", **{"Content-Type": "text/html"}),
        says(200, '{"model_names": 7}'),
        says(302, Location="http://127.0.0.1:1/health"),
        says(200, '{"model_names": ["' + "m" * 300_000 + '"]}'),
    ],
    ids=["404", "500", "html", "wrong status", "redirect", "endless"],
)
async def test_what_does_not_answer_as_a_worker_is_not_listed(http: aiohttp.ClientSession, handle: Handler) -> None:
    async def no_health(request: web.Request) -> web.StreamResponse:
        return web.Response(status=404) if request.path == "/health" else await handle(request)

    async with run_controller(max_worker_status_bytes=100_000) as controller, stand_in(no_health) as address:
        assert (await beat(http, controller, address))[0] == 503
        body = {"worker_name": address, "check_heart_beat": True, "worker_status": STATUS}
        assert (await ask(http, "POST", controller + "/register_worker", json=body))[0] == 200, "as FastChat's answers"
        assert await listed(http, controller) == set()


async def test_redirects_are_not_followed_and_answers_not_handed_out(http: aiohttp.ClientSession) -> None:
    asked: list[str] = []

    async def secret(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        return web.json_response(STATUS | {"model_names": ["secret"]})

    async with run_controller() as controller, stand_in(secret) as inside:
        for status in (301, 302, 303, 307, 308):
            async with stand_in(says(status, Location=inside + "/latest/meta-data")) as address:
                body = {"worker_name": address, "check_heart_beat": False}
                async with http.post(controller + "/register_worker", json=body) as response:
                    assert "secret" not in await response.text()
        await ask(http, "POST", controller + "/refresh_all_workers")
        assert asked == []
        assert await listed(http, controller) == set()


async def test_slow_workers_hold_up_nobody_else(http: aiohttp.ClientSession) -> None:
    async def hang(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    async with (
        run_controller(worker_probe_timeout_s=1.0) as controller,
        stand_in(hang) as slow,
        stand_in(says(200)) as quick,
    ):
        waiting = [asyncio.create_task(beat(http, controller, slow)) for _ in range(20)]
        began = time.monotonic()
        assert await beat(http, controller, quick) == (200, None)
        assert await beat(http, controller, quick) == (200, None)
        assert not any(task.done() for task in waiting), f"after {time.monotonic() - began:.2f} s"
        assert {await task for task in waiting} == {(504, "worker_timeout")}
        assert await listed(http, controller) == {quick}


async def test_a_worker_is_called_once_and_again_when_it_was_away(http: aiohttp.ClientSession) -> None:
    calls: list[str] = []

    async def count(request: web.Request) -> web.StreamResponse:
        calls.append(request.path)
        return web.Response()

    async with run_controller() as controller, stand_in(count) as address:
        for name in (address, address + "/", address.upper()):
            assert await beat(http, controller, name) == (200, None)
        assert calls == ["/health"]
        assert await listed(http, controller) == {address}, "one worker, however its address is written"
        assert await ask(http, "POST", controller + "/deregister_worker", json={"worker_name": address}) == (200, None)
        assert await beat(http, controller, address) == (200, None)
        assert calls == ["/health", "/health"]


async def test_without_the_probe_workers_are_taken_at_their_word(http: aiohttp.ClientSession) -> None:
    async with run_controller(no_worker_probe=True) as controller:
        assert await beat(http, controller, "http://127.0.0.1:1") == (200, None)
        assert await listed(http, controller) == {"http://127.0.0.1:1"}


async def test_a_worker_that_registers_before_it_listens_is_listed_when_it_does(http: aiohttp.ClientSession) -> None:
    """FastChat's workers do so, and send the next heartbeat only after 45 seconds."""
    async with run_controller() as controller:
        async with stand_in(says(200)) as address:
            port = int(address.rpartition(":")[2])
        body = {"worker_name": address, "check_heart_beat": True, "worker_status": STATUS}
        assert await ask(http, "POST", controller + "/register_worker", json=body) == (200, None)
        assert await listed(http, controller) == set()
        async with stand_in(says(200), port):

            async def is_listed() -> bool:
                return await listed(http, controller) == {address}

            await eventually(is_listed, timeout_s=5)


async def test_names_and_addresses_stay_with_their_owner_while_its_workers_live(
    http: aiohttp.ClientSession, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours, ours_too, theirs = (secrets.token_urlsafe(32) for _ in range(3))
    path = tmp_path / "cluster.key"
    path.write_text(f"{ours}\n{ours_too}\nteam-b {theirs}\n")
    headers = {"Authorization": f"Bearer {ours}"}
    conflict = (409, "conflict")
    async with (
        run_controller(cluster_key_file=str(path)) as controller,
        stand_in(says(200)) as first,
        stand_in(says(200)) as second,
        stand_in(says(200)) as third,
    ):

        async def bye(name: str, key: str) -> tuple[int, str | None]:
            sent = {"Authorization": f"Bearer {key}"}
            url = controller + "/deregister_worker"
            return await ask(http, "POST", url, json={"worker_name": name}, headers=sent)

        assert await beat(http, controller, first, key=ours, model_names=["m", "n"]) == (200, None)
        assert await beat(http, controller, second, key=ours_too, model_names=["m"]) == (200, None), "a rotated key"
        assert await beat(http, controller, third, key=theirs, model_names=["x", "n"]) == conflict
        assert "The model 'n' of owner 'default' is not given to owner 'team-b'" in caplog.text
        assert await beat(http, controller, first, key=theirs, model_names=["x"]) == conflict
        assert await bye(first, theirs) == conflict
        assert await beat(http, controller, third, key=theirs, model_names=["x"]) == (200, None)
        assert await beat(http, controller, third, key=theirs, model_names=["x", "m"]) == conflict, "nor later on"
        assert await listed(http, controller, headers) == {first, second, third}
        assert await bye(first, ours_too) == (200, None)
        assert await beat(http, controller, third, key=theirs, model_names=["x", "n"]) == (200, None), "it is free now"
        assert await beat(http, controller, third, key=theirs, model_names=["x", "m"]) == conflict, "second lives"
        assert await beat(http, controller, first, key=ours, model_names=["n"]) == conflict


async def test_a_worker_that_is_asked_for_its_status_takes_no_name_of_another_owner(
    http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    ours, theirs = (secrets.token_urlsafe(32) for _ in range(2))
    path = tmp_path / "cluster.key"
    path.write_text(f"{ours}\nteam-b {theirs}\n")
    headers = {"Authorization": f"Bearer {ours}"}
    served = ["x"]

    async def status(_: web.Request) -> web.StreamResponse:
        return web.json_response(STATUS | {"heartbeat_interval_s": 60.0, "model_names": served})

    async with (
        run_controller(cluster_key_file=str(path)) as controller,
        stand_in(says(200)) as first,
        stand_in(status) as second,
    ):

        async def addresses(model: str) -> list[str]:
            async with http.get(controller + "/workers", headers=headers) as response:
                rows = (await response.json())["workers"]
            return sorted(row["address"] for row in rows if model in row["status"]["model_names"])

        assert await beat(http, controller, first, key=ours, model_names=["m"]) == (200, None)
        assert await beat(http, controller, second, key=theirs, model_names=["x"]) == (200, None)
        for names, listed_now in ((["x", "m"], "x"), (["y"], "y")):
            served[:] = names
            await ask(http, "POST", controller + "/refresh_all_workers", headers=headers)
            assert await addresses("m") == [first]
            assert await addresses(listed_now) == [second]
        assert await beat(http, controller, first, key=ours, model_names=["m", "y"]) == (409, "conflict")


async def test_a_worker_that_refuses_the_api_servers_key_is_no_matter_of_the_clients(
    http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    ours, theirs = (secrets.token_urlsafe(32) for _ in range(2))
    both, one = tmp_path / "both.key", tmp_path / "one.key"
    both.write_text(f"{ours}\n{theirs}\n")
    one.write_text(theirs + "\n")
    async with (
        run_controller(cluster_key_file=str(both)) as controller,
        run_worker(controller, cluster_key_file=str(one)),
        run_server(controller, cluster_key_file=str(both)) as server,
    ):

        async def has_worker() -> bool:
            return bool(await listed(http, controller, {"Authorization": f"Bearer {ours}"}))

        await eventually(has_worker)
        status, code = await ask(http, "POST", server + "/v1/chat/completions", json=CHAT)
        assert status >= 500
        assert code != "invalid_cluster_key"


async def test_a_worker_with_a_wrong_key_says_why_it_is_not_taken(
    http: aiohttp.ClientSession, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "other.key"
    path.write_text(secrets.token_urlsafe(32) + "\n")
    path.chmod(0o600)
    async with run_controller() as controller, run_worker(controller, cluster_key_file=str(path)):

        async def says_why() -> bool:
            return "status 401" in caplog.text and "Wrong cluster key" in caplog.text

        await eventually(says_why)
        assert await listed(http, controller) == set()
