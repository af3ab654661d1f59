"""The real API server with a stub controller and stub workers of scripted behaviour, on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from fastserve.config import ApiServerConfig
from fastserve.gateway.app import create_app
from fastserve.openai.routes import MODEL_ROUTES, ModelRoute
from fastserve.protocol import (
    AcquireRequest,
    AcquireResponse,
    ReleaseRequest,
    RoutingTable,
    ServingRequest,
    ServingResponse,
    WorkerEntry,
    WorkerName,
    WorkerStatus,
)
from tests.apps import serve_app as serve_app
from tests.apps import until as until
from tests.processes import free_ports

Script = Callable[[web.Request], Awaitable[web.StreamResponse]]
MODEL = "demo"
EVENTS = [b'data: {"choices":[{"delta":{"content":"%d"}}]}\n\n' % number for number in range(5)]
DONE = b"data: [DONE]\n\n"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


class StubServer:
    """An aiohttp server that can be killed, and restarted on its port."""

    def __init__(self) -> None:
        self._runner: web.AppRunner | None = None
        self.port = 0

    def make_app(self) -> web.Application:
        raise NotImplementedError

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._runner = web.AppRunner(self.make_app(), handler_cancellation=True, shutdown_timeout=0.01)
        await self._runner.setup()
        # One that the system chose could be taken by any outgoing connection before the restart.
        self.port = self.port or free_ports(1)[0]
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self._site = site

    async def stop_listening(self) -> None:
        """Refuse new connections; open ones stay open."""
        server = self._site._server
        assert server is not None
        server.close()

    async def kill(self) -> None:
        if self._runner is not None:
            if self._runner.server is not None:
                for connection in list(self._runner.server.connections):
                    if connection.transport is not None:
                        connection.transport.abort()
            await self._runner.cleanup()
            self._runner = None


class StubController(StubServer):
    def __init__(self) -> None:
        super().__init__()
        self.workers: dict[str, WorkerStatus] = {}
        self.in_flight: dict[str, str] = {}
        self.acquired: list[str] = []
        self.granted: list[str] = []
        self.released: list[str] = []
        self.failed: list[str] = []
        self.unused: list[str] = []
        """Leases by outcome; see `ReleaseRequest`."""
        self.failures: list[str] = []
        self.excluded: list[list[str]] = []
        self.polls = 0
        self.remembered: set[str] = set()
        """Models that are known although no worker serves them."""
        self.retry_after_s: float | None = None
        self.hangs = False
        self.is_busy = False
        """`/serving` answers with 503."""

    def add(self, address: str, *models: str, capabilities: Sequence[str] | None = None) -> None:
        stated = None if capabilities is None else list(capabilities)
        self.workers[address] = WorkerStatus(model_names=list(models or (MODEL,)), capabilities=stated)

    def make_app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/acquire", self._acquire)
        app.router.add_post("/release", self._release)
        app.router.add_post("/report_failure", self._report_failure)
        app.router.add_get("/workers", self._workers)
        app.router.add_post("/serving", self._serving)
        return app

    async def _acquire(self, request: web.Request) -> web.Response:
        if self.hangs:
            await asyncio.sleep(60)
        asked = AcquireRequest.model_validate_json(await request.read())
        self.acquired.append(asked.lease)
        self.excluded.append(asked.exclude)
        named = {address: status for address, status in self.workers.items() if asked.model in status.model_names}
        serving = [address for address, status in named.items() if asked.capability in (None, *status.offered)]
        loads = list(self.in_flight.values())
        free = [address for address in serving if address not in asked.exclude]
        chosen = min(free, key=loads.count, default="")
        if chosen:
            self.granted.append(asked.lease)
            self.in_flight[asked.lease] = chosen
        known = bool(named) or asked.model in self.remembered
        offered = sorted({each for status in named.values() for each in status.offered})
        return _answer(
            AcquireResponse(
                address=chosen,
                known=known,
                retry_after_s=self.retry_after_s,
                capabilities=offered if named and not serving else None,
            )
        )

    async def _release(self, request: web.Request) -> web.Response:
        asked = ReleaseRequest.model_validate_json(await request.read())
        self.released += asked.leases
        self.failed += asked.failed
        self.unused += asked.unused
        for lease in asked.leases:
            self.in_flight.pop(lease, None)
        return web.json_response({})

    async def _report_failure(self, request: web.Request) -> web.Response:
        address = WorkerName.model_validate_json(await request.read()).worker_name
        self.failures.append(address)
        self.workers.pop(address, None)
        return web.json_response({})

    async def _serving(self, request: web.Request) -> web.Response:
        if self.is_busy:
            return web.json_response({}, status=503)
        asked = ServingRequest.model_validate_json(await request.read())
        served = {lease for status in self.workers.values() for lease in status.leases}
        return _answer(ServingResponse(leases=[lease for lease in asked.leases if lease in served]))

    async def _workers(self, _: web.Request) -> web.Response:
        self.polls += 1
        if self.hangs:
            await asyncio.sleep(60)
        loads = list(self.in_flight.values())
        rows = [
            WorkerEntry(address=address, status=status, in_flight=loads.count(address), speed=1.0)
            for address, status in self.workers.items()
        ]
        return _answer(RoutingTable(dispatch_method="shortest_queue", workers=rows))


def _answer(message: Any) -> web.Response:
    return web.Response(text=message.model_dump_json(), content_type="application/json")


class StubWorker(StubServer):
    """Answers each request with a call of its script."""

    def __init__(self, script: Script) -> None:
        super().__init__()
        self.script = script
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.running = 0
        self.aborted_at: list[float] = []

    def make_app(self) -> web.Application:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        return app

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.method == "GET" and request.path == "/health":
            return web.json_response({"status": "ok"})
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.append((request.path, headers, await request.read()))
        self.running += 1
        try:
            return await self.script(request)
        except (asyncio.CancelledError, ConnectionError):
            self.aborted_at.append(asyncio.get_running_loop().time())
            raise
        finally:
            self.running -= 1


# ---- scripts ----------------------------------------------------------------------------------------------------


def stream(*pieces: bytes, delay_s: float = 0.0, then: str = "end") -> Script:
    """Send the pieces as a stream; then `end` it, `reset` the connection, or `hang`."""

    async def script(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
            await asyncio.sleep(delay_s)
        if then == "hang":
            await asyncio.sleep(60)
        if then == "reset":
            await asyncio.sleep(0.02)  # let the data reach the other side
            abort(request)
        return response

    return script


def reply(body: bytes, content_type: str = "application/json", status: int = 200, **headers: str) -> Script:
    """Answer with these bytes as the body."""

    async def script(_: web.Request) -> web.StreamResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(body=body, status=status, headers={"content-type": content_type, **named})

    return script


def raw(content: bytes) -> Script:
    """Write these bytes to the connection instead of an HTTP answer, and close it."""

    async def script(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(content)
        request.transport.close()
        return web.Response()

    return script


def respond(status: int, body: Any, headers: dict[str, str] | None = None) -> Script:
    async def script(_: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=status, headers=headers)

    return script


async def hang(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.Response()


async def die(request: web.Request) -> web.StreamResponse:
    abort(request)
    return web.Response()


def abort(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": MODEL,
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "12"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


async def answer_well(request: web.Request) -> web.StreamResponse:
    """Answer like a healthy worker."""
    if json.loads(await request.read()).get("stream"):
        return await stream(*EVENTS, DONE)(request)
    return web.json_response(ANSWER)


# ---- the cluster ------------------------------------------------------------------------------------------------


@dataclass
class Cluster:
    controller: StubController
    url: str
    http: aiohttp.ClientSession
    stack: contextlib.AsyncExitStack
    workers: list[StubWorker] = field(default_factory=list)

    async def worker(self, script: Script, *models: str, capabilities: Sequence[str] | None = None) -> StubWorker:
        """Start a worker and add it to the controller, which prefers the one started first at equal load."""
        worker = StubWorker(script)
        await worker.start()
        self.stack.push_async_callback(worker.kill)
        self.controller.add(worker.address, *models, capabilities=capabilities)
        self.workers.append(worker)
        return worker

    async def in_table(self) -> None:
        """Let the API server refresh its routing table."""
        async with self.http.get(self.url + "/v1/models") as response:
            assert response.status == 200

    def post(self, body: Any = None, **options: Any) -> Any:
        path = options.pop("path", "/v1/chat/completions")
        return self.http.post(self.url + path, json=CHAT if body is None else body, **options)

    async def metric(self, name: str) -> float:
        async with self.http.get(self.url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    async def all_released(self) -> None:
        await until(lambda: set(self.controller.acquired) <= set(self.controller.released))
        assert not self.controller.in_flight

    @property
    def num_requests(self) -> int:
        """Requests that have reached workers."""
        return sum(len(worker.requests) for worker in self.workers)


@asynccontextmanager
async def start_cluster(*, model_routes: Sequence[ModelRoute] = MODEL_ROUTES, **options: Any) -> AsyncIterator[Cluster]:
    async with contextlib.AsyncExitStack() as stack:
        controller = StubController()
        await controller.start()
        stack.push_async_callback(controller.kill)
        settings = ApiServerConfig(host="127.0.0.1", controller_address=controller.address, **options)
        url = await stack.enter_async_context(serve_app(create_app(settings, model_routes=model_routes)))
        headers = {"authorization": f"Bearer {settings.api_keys[0]}"} if settings.api_keys else {}
        http = await stack.enter_async_context(aiohttp.ClientSession(headers=headers))
        yield Cluster(controller, url, http, stack)
