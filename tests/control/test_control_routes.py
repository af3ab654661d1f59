"""The controller's endpoints, in process, with workers that are real servers on the loopback interface."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from fastserve.config import ControllerConfig
from fastserve.control import fastchat_relay, routes, worker_client
from fastserve.control.app import create_app
from fastserve.errors import StartupError
from fastserve.protocol import LEASE_HEADER, WorkerStatus
from tests.apps import serve_app, until
from tests.keys import UNGUARDED
from tests.processes import free_ports

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
JSON = {"content-type": "application/json"}
FASTCHAT_STATUS = {"model_names": ["m"], "speed": 1, "queue_length": 0}


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(ControllerConfig(**UNGUARDED))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", headers=JSON) as client,
    ):
        yield client


@asynccontextmanager
async def fake_worker(**handlers: Handler) -> AsyncIterator[str]:
    """Run a server with these endpoints; yields its address."""
    app = web.Application()
    for name, handler in handlers.items():
        app.router.add_post(f"/{name}", handler)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")


def tells_status(**fields: Any) -> Handler:
    async def worker_get_status(_: web.Request) -> web.Response:
        return web.json_response(FASTCHAT_STATUS | fields)

    return worker_get_status


def streams(*pieces: bytes, cut: bool = False, status: int = 200) -> Handler:
    """Send the pieces; with `cut`, break the connection instead of ending the answer."""

    async def worker_generate_stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=status)
        response.enable_chunked_encoding()
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
            await asyncio.sleep(0.01)
        if cut:
            assert request.transport is not None
            request.transport.close()
        return response

    return worker_generate_stream


def unused_address() -> str:
    return f"http://127.0.0.1:{free_ports(1)[0]}"


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> Any:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def register(client: httpx.AsyncClient, address: str, **status: Any) -> None:
    await post(
        client,
        "/register_worker",
        worker_name=address,
        check_heart_beat=True,
        worker_status=FASTCHAT_STATUS | status,
    )


def records(body: bytes) -> list[dict[str, Any]]:
    *whole, rest = body.split(b"\0")
    assert rest == b""
    return [json.loads(record) for record in whole]


# ---- FastChat's endpoints ---------------------------------------------------------------------------------------


async def test_a_fastchat_worker_lives_as_with_fastchat(client: httpx.AsyncClient) -> None:
    beat = {"worker_name": "http://w:1", "queue_length": 2}
    assert await post(client, "/receive_heart_beat", **beat) == {"exist": False}
    assert (
        await post(
            client, "/register_worker", worker_name="http://w:1", check_heart_beat=True, worker_status=FASTCHAT_STATUS
        )
        is None
    )
    assert await post(client, "/receive_heart_beat", **beat) == {"exist": True}
    assert await post(client, "/list_models") == {"models": ["m"]}
    assert await post(client, "/get_worker_address", model="m") == {"address": "http://w:1"}
    assert await post(client, "/get_worker_address", model="nobody's") == {"address": ""}
    assert await post(client, "/worker_get_status") == {"model_names": ["m"], "speed": 1, "queue_length": 3}


async def test_test_connection(client: httpx.AsyncClient) -> None:
    response = await client.get("/test_connection")
    assert (response.status_code, response.json()) == (200, "success")


async def test_models_are_listed_without_a_body_and_by_kind(client: httpx.AsyncClient) -> None:
    await register(client, "http://a:1")
    await post(
        client,
        "/register_worker",
        worker_name="http://b:1",
        check_heart_beat=True,
        worker_status=FASTCHAT_STATUS | {"model_names": ["eyes"]},
        multimodal=True,
    )
    assert (await client.post("/list_models")).json() == {"models": ["eyes", "m"]}
    assert (await client.post("/list_multimodal_models")).json() == {"models": ["eyes"]}
    assert (await client.post("/list_language_models")).json() == {"models": ["m"]}


async def test_a_worker_registered_without_status_is_asked(client: httpx.AsyncClient) -> None:
    async with fake_worker(worker_get_status=tells_status(queue_length=3)) as address:
        body = {"worker_name": address, "check_heart_beat": False, "worker_status": None}
        assert await post(client, "/register_worker", **body) is None
    (worker,) = (await client.get("/workers")).json()["workers"]
    assert (worker["address"], worker["in_flight"]) == (address, 3)


async def test_an_unreachable_worker_is_not_registered(client: httpx.AsyncClient) -> None:
    body = {"worker_name": unused_address(), "check_heart_beat": False, "worker_status": None}
    assert await post(client, "/register_worker", **body) is None
    assert await post(client, "/list_models") == {"models": []}


async def test_refresh_asks_all_at_once_and_drops_only_the_unreachable(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_client, "STATUS_TIMEOUT_S", 0.5)

    asked, answering = [], asyncio.Event()

    async def busy(_: web.Request) -> web.Response:
        asked.append(1)
        await answering.wait()
        return web.json_response(FASTCHAT_STATUS)

    async with (
        fake_worker(worker_get_status=tells_status(model_names=["renamed"])) as healthy,
        fake_worker(worker_get_status=busy) as busy1,
        fake_worker(worker_get_status=busy) as busy2,
        fake_worker() as without_status,
    ):
        gone = unused_address()
        for address in (healthy, busy1, busy2, without_status, gone):
            await register(client, address)
        refresh = asyncio.create_task(client.post("/refresh_all_workers"))
        await until(lambda: len(asked) == 2)  # all are asked at once, and others are answered meanwhile
        assert await post(client, "/list_models") in ({"models": ["m"]}, {"models": ["m", "renamed"]})
        answering.set()
        assert (await refresh).json() is None
        table = (await client.get("/workers")).json()["workers"]
        assert {worker["address"] for worker in table} == {healthy, busy1, busy2, without_status}
        assert await post(client, "/list_models") == {"models": ["m", "renamed"]}


async def test_relay_passes_whole_records_on(client: httpx.AsyncClient) -> None:
    seen: list[tuple[bytes, str | None]] = []

    async def generate(request: web.Request) -> web.StreamResponse:
        seen.append((await request.read(), request.headers.get(LEASE_HEADER)))
        return await streams(b'{"text": "a", "error', b'_code": 0}\0{"text": "ab", "error_code": 0}\0')(request)

    async with fake_worker(worker_generate_stream=generate) as address:
        await register(client, address)
        response = await client.post("/worker_generate_stream", content=b'{"model": "m", "prompt": "x"}')
    assert [record["text"] for record in records(response.content)] == ["a", "ab"]
    assert seen[0][0] == b'{"model": "m", "prompt": "x"}'
    assert seen[0][1]
    assert (await post(client, "/worker_get_status"))["queue_length"] == 0


async def test_relay_without_worker_is_one_error_record(client: httpx.AsyncClient) -> None:
    response = await client.post("/worker_generate_stream", json={"model": "m", "prompt": "x"})
    (record,) = records(response.content)
    assert record["error_code"] == 50005
    assert "'m'" in record["text"]


async def test_relay_goes_to_another_worker_while_nothing_was_sent(client: httpx.AsyncClient) -> None:
    async with fake_worker(worker_generate_stream=streams(b'{"text": "a", "error_code": 0}\0')) as healthy:
        gone = unused_address()
        await register(client, gone, speed=1000)  # an idle cluster is a tie, so load the healthy one
        await register(client, healthy, queue_length=5)
        response = await client.post("/worker_generate_stream", json={"model": "m"})
    assert [record["text"] for record in records(response.content)] == ["a"]
    table = (await client.get("/workers")).json()["workers"]
    assert [worker["address"] for worker in table] == [healthy]


async def test_relay_of_a_broken_answer_ends_in_one_error_record(client: httpx.AsyncClient) -> None:
    broken = streams(b'{"text": "a", "error_code": 0}\0', b'{"text": "ab', cut=True)
    async with fake_worker(worker_generate_stream=broken) as address:
        await register(client, address)
        response = await client.post("/worker_generate_stream", json={"model": "m"})
    first, last = records(response.content)
    assert (first["text"], last["error_code"]) == ("a", 50006)
    assert (await client.get("/workers")).json()["workers"] == []


@pytest.mark.parametrize("status", [404, 500])
async def test_relay_of_a_refusal_is_one_error_record(client: httpx.AsyncClient, status: int) -> None:
    async with fake_worker(worker_generate_stream=streams(b"no", status=status)) as address:
        await register(client, address)
        response = await client.post("/worker_generate_stream", json={"model": "m"})
    (record,) = records(response.content)
    assert record["error_code"] == 50006
    assert (await post(client, "/worker_get_status"))["queue_length"] == 0


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([], id="nothing"),
        pytest.param([b"<html>It works!</html>"], id="html"),
        pytest.param([b'{"text": "a", "error_code": 0'], id="half a record"),
        pytest.param([b"x" * 65536] * 40, id="a record without an end"),
    ],
)
async def test_an_invalid_answer_is_relayed_as_one_error_record(
    client: httpx.AsyncClient, pieces: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastchat_relay, "MAX_RECORD_BYTES", 2**20)
    async with fake_worker(worker_generate_stream=streams(*pieces)) as address:
        await register(client, address)
        response = await client.post("/worker_generate_stream", json={"model": "m"})
    (record,) = records(response.content)
    assert record["error_code"] == 50006
    assert (await post(client, "/worker_get_status"))["queue_length"] == 0


async def test_relay_keeps_no_more_of_a_worker_than_one_record(client: httpx.AsyncClient) -> None:
    """Records of the maximum length take time and memory in proportion to their length."""
    record = json.dumps({"text": "x" * 2_000_000, "error_code": 0}).encode() + b"\0"
    async with fake_worker(worker_generate_stream=streams(record * 4)) as address:
        await register(client, address)
        response = await client.post("/worker_generate_stream", json={"model": "m"})
    assert response.content == record * 4


async def test_relay_of_a_request_that_kills_workers_ends_with_the_second(client: httpx.AsyncClient) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(5):
            await register(
                client, await stack.enter_async_context(fake_worker(worker_generate_stream=streams(cut=True)))
            )
        response = await client.post("/worker_generate_stream", json={"model": "m"})
        (record,) = records(response.content)
        assert record["text"].startswith("2 workers died")
        assert len((await client.get("/workers")).json()["workers"]) == 3


async def test_a_want_of_the_controllers_own_is_not_the_workers_failure(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_client, "is_own_shortage", lambda _: True)
    gone = unused_address()
    await register(client, gone)
    await post(client, "/refresh_all_workers")
    response = await client.post("/worker_generate_stream", json={"model": "m"})
    (record,) = records(response.content)
    assert record["text"].startswith("This controller has no open file")
    table = (await client.get("/workers")).json()["workers"]
    assert [(worker["address"], worker["in_flight"]) for worker in table] == [(gone, 0)]


async def test_few_workers_are_asked_for_their_status_at_a_time(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = running = asked = 0

    async def get_status(*_: Any) -> WorkerStatus:
        nonlocal most, running, asked
        running, asked = running + 1, asked + 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return WorkerStatus.model_validate(FASTCHAT_STATUS)

    for port in range(1, 201):
        await register(client, f"http://127.0.0.1:{port}")
    monkeypatch.setattr(worker_client.WorkerClient, "get_status", get_status)
    await asyncio.gather(*(post(client, "/refresh_all_workers") for _ in range(5)))
    assert (most, asked) == (routes.MAX_REFRESHED_AT_ONCE, 200)


async def test_a_controller_among_its_own_workers_ends_with_an_error(client: httpx.AsyncClient) -> None:
    app = create_app(ControllerConfig(**UNGUARDED))
    async with serve_app(app) as url, httpx.AsyncClient(base_url=url, headers=JSON, timeout=10) as real:
        await register(real, url)
        response = await real.post("/worker_generate_stream", json={"model": "m"})
        (record,) = records(response.content)
        assert record["error_code"] == 50006
        # One round, and no more.
        assert f'dispatched_total{{model="m",worker="{url}"}} 1.0' in (await real.get("/metrics")).text


# ---- our own endpoints ------------------------------------------------------------------------------------------


async def test_acquire_release_and_the_table(client: httpx.AsyncClient) -> None:
    await register(client, "http://a:1")
    answer = await post(client, "/acquire", model="m", lease="1")
    assert answer == {"address": "http://a:1", "known": True}
    table = (await client.get("/workers")).json()
    assert table["dispatch_method"] == "shortest_queue"
    assert [(w["address"], w["in_flight"], w["speed"]) for w in table["workers"]] == [("http://a:1", 1, 1.0)]
    assert await post(client, "/acquire", model="m", lease="1", exclude=["http://a:1"]) == {
        "address": "",
        "known": True,
        "retry_after_s": 1.0,
    }
    assert await post(client, "/acquire", model="n", lease="2") == {"address": "", "known": False}
    await post(client, "/acquire", model="m", lease="3")
    await post(client, "/release", leases=["1", "2", "3"])
    assert (await client.get("/workers")).json()["workers"][0]["in_flight"] == 0


async def test_deregistration_and_failure(client: httpx.AsyncClient) -> None:
    await register(client, "http://a:1")
    await register(client, "http://b:1")
    await post(client, "/report_failure", worker_name="http://a:1")
    await post(client, "/deregister_worker", worker_name="http://b:1")
    assert (await client.get("/workers")).json()["workers"] == []
    assert await post(client, "/receive_heart_beat", worker_name="http://a:1", queue_length=0) == {"exist": True}
    assert await post(client, "/receive_heart_beat", worker_name="http://b:1", queue_length=0) == {"exist": False}
    assert await post(client, "/get_worker_address", model="m") == {"address": "http://a:1"}


async def test_healthy_and_ready_without_workers(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).json() == {"status": "ok"}
    assert (await client.get("/ready")).json() == {"status": "ok", "workers": 0}
    await register(client, "http://a:1")
    assert (await client.get("/ready")).json() == {"status": "ok", "workers": 1}


async def test_metrics(client: httpx.AsyncClient) -> None:
    await register(client, "http://a:1")
    await post(client, "/acquire", model="m", lease="1")
    await post(client, "/get_worker_address", model="m")
    await post(client, "/acquire", model="made up", lease="2")
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = response.text.splitlines()
    assert 'fastserve_controller_dispatched_total{model="m",worker="http://a:1"} 2.0' in lines
    assert "fastserve_controller_no_worker_total 1.0" in lines
    assert "fastserve_controller_workers 1.0" in lines
    assert 'fastserve_controller_in_flight{worker="http://a:1"} 2.0' in lines
    await post(client, "/deregister_worker", worker_name="http://a:1")
    assert "fastserve_controller_in_flight{" not in (await client.get("/metrics")).text


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"lease": "1"}', "'model'"), (b"not json", "not valid JSON"), (b'{"model": 1, "lease": "1"}', "'model'")],
)
async def test_a_wrong_body_is_answered_in_openais_shape(
    client: httpx.AsyncClient, content: bytes, message: str
) -> None:
    response = await client.post("/acquire", content=content)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


async def test_a_wrong_path_or_method_too(client: httpx.AsyncClient) -> None:
    for response in (await client.get("/nowhere"), await client.get("/acquire")):
        assert response.status_code in (404, 405)
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_an_unknown_dispatch_method_ends_the_start() -> None:
    with pytest.raises(StartupError, match="shortest_queue"):
        create_app(ControllerConfig(dispatch_method="guess"))
