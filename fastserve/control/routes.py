"""The controller's endpoints: FastChat's nine, and our own. Each message is parsed once, by its pydantic model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Scope

from fastserve.access.addresses import parse_worker_address
from fastserve.control.admission import WorkerAdmission
from fastserve.control.endpoint import MessageEndpoint
from fastserve.control.fastchat_relay import MAX_HOPS, relay
from fastserve.control.metrics import ControlMetrics
from fastserve.control.registry import WorkerRegistry
from fastserve.control.worker_client import WorkerClient, WorkerUnreachableError
from fastserve.errors import FastserveError, InvalidRequestError, WorkerLostError, WorkerTimeoutError
from fastserve.observability.metrics import CONTENT_TYPE
from fastserve.observability.text import printable
from fastserve.protocol import (
    AcquireRequest,
    AddressResponse,
    HeartbeatRequest,
    ModelList,
    ModelRequest,
    RegisterRequest,
    ReleaseRequest,
    ServingRequest,
    ServingResponse,
    WorkerName,
)
from fastserve.serving.hops import LoopGuard
from fastserve.serving.messages import parse_message
from fastserve.serving.responses import StreamResponse

logger = logging.getLogger(__name__)
Endpoint = Callable[[Request], Awaitable[Response]]

MAX_REFRESHED_AT_ONCE = 64
"""Workers that are polled for their status at the same time."""
NULL = b"null"
EXISTS = b'{"exist":true}'
EXISTS_SEND_ADAPTERS = b'{"exist":true,"send_adapters":true}'
EXISTS_NOT = b'{"exist":false}'

VITAL_PATHS = frozenset(
    {
        "/acquire",
        "/release",
        "/report_failure",
        "/deregister_worker",
        "/register_worker",
        "/receive_heart_beat",
        "/get_worker_address",
        "/serving",
        "/workers",
        "/ready",
    }
)
"""Small messages that the cluster depends on: served even when memory is short."""


def message_endpoints(
    registry: WorkerRegistry, admission: WorkerAdmission, client: WorkerClient, metrics: ControlMetrics
) -> dict[str, MessageEndpoint[Any]]:
    """The endpoints that take a message and answer with another, by path."""

    def wait(_: RegisterRequest, __: Scope) -> None:
        """A registration cannot be answered at once: the worker is called first."""

    async def register_worker(body: RegisterRequest, scope: Scope) -> bytes:
        owner: str = scope["state"]["owner"]
        try:
            await register(body, owner)
        except (WorkerLostError, WorkerTimeoutError) as error:
            logger.warning("Worker %s is not registered yet: %s", printable(body.worker_name), printable(error.message))
            admission.retry_later(body.worker_name, lambda: register(body, owner))
        return NULL

    async def register(body: RegisterRequest, owner: str) -> None:
        status = body.worker_status
        if status is None:
            # The address is about to be called, so it is checked before anything else is known.
            status = await client.get_status(await admission.admit(body.worker_name, owner, ()))
        address = await admission.admit(body.worker_name, owner, status.model_names, is_ready=status.ready)
        if body.multimodal:
            status = status.model_copy(update={"multimodal": True})
        registry.register(address, body.check_heart_beat, status)

    def note_heartbeat(address: str, body: HeartbeatRequest) -> bytes:
        if not registry.heartbeat(address, body.queue_length, body.status, body.adapters):
            return EXISTS_NOT
        return EXISTS_SEND_ADAPTERS if registry.misses_adapters(address) else EXISTS

    def receive_heart_beat(body: HeartbeatRequest, scope: Scope) -> bytes | None:
        status, owner = body.status, scope["state"]["owner"]
        if status is None:
            address = admission.address_of(body.worker_name, owner)
        else:
            known = admission.find(body.worker_name, owner, status.model_names, is_ready=status.ready)
            if known is None:
                return None
            address = known
        return note_heartbeat(address, body)

    async def admit_and_receive(body: HeartbeatRequest, scope: Scope) -> bytes:
        status, owner = body.status, scope["state"]["owner"]
        names, is_ready = ((), True) if status is None else (status.model_names, status.ready)
        address = await admission.admit(body.worker_name, owner, names, is_ready=is_ready)
        return note_heartbeat(address, body)

    def get_worker_address(body: ModelRequest, _: Scope) -> bytes:
        return _json(AddressResponse(address=registry.get_worker_address(body.model)))

    def acquire(body: AcquireRequest, _: Scope) -> bytes:
        answer = registry.acquire(body.model, body.lease, body.exclude, body.capability)
        return answer.model_dump_json(exclude_none=True).encode()

    def release(body: ReleaseRequest, _: Scope) -> bytes:
        registry.release(body.leases, body.failed, body.unused)
        return NULL

    def serving(body: ServingRequest, _: Scope) -> bytes:
        return _json(ServingResponse(leases=registry.serving(body.leases)))

    def report_failure(body: WorkerName, _: Scope) -> bytes:
        registry.report_failure(str(parse_worker_address(body.worker_name)))
        return NULL

    def deregister_worker(body: WorkerName, scope: Scope) -> bytes:
        registry.deregister(admission.address_of(body.worker_name, scope["state"]["owner"]))
        return NULL

    return {
        "/register_worker": MessageEndpoint(RegisterRequest, metrics, wait, register_worker),
        "/receive_heart_beat": MessageEndpoint(
            HeartbeatRequest, metrics, receive_heart_beat, admit_and_receive, is_routine=True
        ),
        "/get_worker_address": MessageEndpoint(ModelRequest, metrics, get_worker_address),
        "/acquire": MessageEndpoint(AcquireRequest, metrics, acquire),
        "/release": MessageEndpoint(ReleaseRequest, metrics, release),
        "/serving": MessageEndpoint(ServingRequest, metrics, serving),
        "/report_failure": MessageEndpoint(WorkerName, metrics, report_failure),
        "/deregister_worker": MessageEndpoint(WorkerName, metrics, deregister_worker),
    }


def fastchat_routes(registry: WorkerRegistry, admission: WorkerAdmission, client: WorkerClient) -> list[Route]:
    """FastChat's other controller endpoints, with the answers that its controller gives."""
    loop_guard = LoopGuard("controller", MAX_HOPS)
    refreshes: list[asyncio.Task[None]] = []
    """The last refresh, if any."""

    async def refresh_all_workers(_: Request) -> Response:
        # Concurrent requests share one refresh, and the number of workers called at a time is bounded.
        if refreshes and not refreshes[-1].done():
            task = refreshes[-1]
        else:
            task = asyncio.create_task(refresh_all())
            refreshes[:] = [task]
        await asyncio.shield(task)
        return JSONResponse(None)

    async def refresh_all() -> None:
        slots = asyncio.Semaphore(MAX_REFRESHED_AT_ONCE)
        await asyncio.gather(*(refresh(address, slots) for address in registry.addresses()))

    async def refresh(address: str, slots: asyncio.Semaphore) -> None:
        try:
            async with slots:
                status = await client.get_status(address)
            if registry.knows(address):  # it may have left in the meantime
                await admission.admit_again(address, status.model_names, is_ready=status.ready)
                registry.polled(address, status)
        except WorkerUnreachableError:
            registry.report_failure(address)
        except FastserveError as error:
            logger.warning("Worker %s stays as it is: %s", printable(address), printable(error.message))

    async def worker_generate_stream(request: Request) -> Response:
        hops = loop_guard.next_hops(request.scope["headers"])
        content = await request.body()
        answer = relay(registry, client, parse_message(ModelRequest, content).model, content, hops)
        return StreamResponse(answer, media_type="application/octet-stream")

    async def worker_get_status(_: Request) -> Response:
        workers = registry.table().workers
        total = {
            "model_names": registry.list_models(),
            "speed": sum(worker.speed for worker in workers),
            "queue_length": sum(worker.in_flight for worker in workers),
        }
        return JSONResponse(total)

    async def show_success(_: Request) -> Response:
        return JSONResponse("success")

    def list_models(multimodal: bool | None) -> Endpoint:
        async def endpoint(_: Request) -> Response:
            return JSONResponse(ModelList(models=registry.list_models(multimodal=multimodal)).model_dump())

        return endpoint

    return [
        Route("/refresh_all_workers", refresh_all_workers, methods=["POST"]),
        Route("/list_models", list_models(None), methods=["POST"]),
        Route("/list_multimodal_models", list_models(True), methods=["POST"]),
        Route("/list_language_models", list_models(False), methods=["POST"]),
        Route("/worker_generate_stream", worker_generate_stream, methods=["POST"]),
        Route("/worker_get_status", worker_get_status, methods=["POST"]),
        Route("/test_connection", show_success, methods=["GET"]),
    ]


def fastserve_routes(registry: WorkerRegistry, metrics: ControlMetrics) -> list[Route]:
    """Routes for API servers (`/workers`, `/serving`, ...) and for monitoring."""

    async def workers(request: Request) -> Response:
        """With `epoch` and `since`: the changes since that version, without leases."""
        query = request.query_params
        if "since" not in query:
            return Response(registry.table().model_dump_json(), media_type="application/json")
        try:
            since = int(query["since"][:20])
        except ValueError:
            raise InvalidRequestError(
                "Invalid value for 'since': it is the version of a table.", param="since"
            ) from None
        return Response(registry.table_json(query.get("epoch", ""), since), media_type="application/json")

    async def adapters(request: Request) -> Response:
        """With `since`: nothing if that is the version of the list."""
        since = request.query_params.get("since", "")[:20]
        table = registry.adapters(int(since) if since.isdecimal() and since.isascii() else -1)
        return Response(table.model_dump_json(), media_type="application/json")

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(_: Request) -> Response:
        # Ready without workers too: they can only register with a controller that is ready.
        return JSONResponse({"status": "ok", "workers": registry.num_usable})

    async def show_metrics(_: Request) -> Response:
        # On a thread: with thousands of workers it would hold up the event loop too long.
        text = await asyncio.to_thread(metrics.exposition, registry.figures())
        return Response(text, headers={"content-type": CONTENT_TYPE})

    return [
        Route("/workers", workers, methods=["GET"]),
        Route("/adapters", adapters, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/ready", ready, methods=["GET"]),
        Route("/metrics", show_metrics, methods=["GET"]),
    ]


def _json(answer: BaseModel) -> bytes:
    return answer.model_dump_json().encode()
