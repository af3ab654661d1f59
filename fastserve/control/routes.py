"""The controller's endpoints: FastChat's nine, and ours.

They are plain Starlette routes: `/acquire` and `/release` stand in the way of every client's request, and FastAPI's
machinery would cost more than the answer. Each message is parsed once, by its pydantic model.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fastserve.control.fastchat_relay import relay
from fastserve.control.metrics import ControlMetrics
from fastserve.control.registry import WorkerRegistry
from fastserve.control.worker_client import WorkerClient, WorkerUnreachableError
from fastserve.errors import WorkerLostError, WorkerTimeoutError
from fastserve.observability.metrics import CONTENT_TYPE
from fastserve.protocol import (
    AcquireRequest,
    AddressResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    ModelList,
    ModelRequest,
    RegisterRequest,
    ReleaseRequest,
    WorkerName,
)
from fastserve.serving.responses import StreamResponse

logger = logging.getLogger(__name__)
BodyT = TypeVar("BodyT", bound=BaseModel)
Endpoint = Callable[[Request], Awaitable[Response]]


def fastchat_routes(registry: WorkerRegistry, client: WorkerClient, metrics: ControlMetrics) -> list[Route]:
    """The endpoints of FastChat's controller, with its answers."""

    async def register_worker(request: Request) -> Response:
        body = await _parse(request, RegisterRequest)
        status = body.worker_status
        if status is None:
            try:
                status = await client.get_status(body.worker_name)
            except (WorkerLostError, WorkerTimeoutError) as error:
                logger.warning("Worker %s is not registered: %s", body.worker_name, error.message)
                return JSONResponse(None)
        if body.multimodal:
            status = status.model_copy(update={"multimodal": True})
        registry.register(body.worker_name, body.check_heart_beat, status)
        return JSONResponse(None)

    async def refresh_all_workers(_: Request) -> Response:
        await asyncio.gather(*(refresh(address) for address in registry.addresses()))
        return JSONResponse(None)

    async def refresh(address: str) -> None:
        try:
            registry.polled(address, await client.get_status(address))
        except WorkerUnreachableError:
            registry.report_failure(address)
        except (WorkerLostError, WorkerTimeoutError) as error:
            logger.warning("Worker %s stays as it is: %s", address, error.message)

    async def get_worker_address(request: Request) -> Response:
        body = await _parse(request, ModelRequest)
        address = registry.get_worker_address(body.model)
        metrics.count(body.model, address)
        return _json(AddressResponse(address=address))

    async def receive_heart_beat(request: Request) -> Response:
        body = await _parse(request, HeartbeatRequest)
        return _json(HeartbeatResponse(exist=registry.heartbeat(body.worker_name, body.queue_length, body.status)))

    async def worker_generate_stream(request: Request) -> Response:
        body = await _parse(request, ModelRequest)
        answer = relay(registry, client, metrics, body.model, await request.body())
        return StreamResponse(answer, media_type="application/octet-stream")

    async def worker_get_status(_: Request) -> Response:
        workers = registry.table().workers
        total = {
            "model_names": registry.list_models(),
            "speed": sum(worker.speed for worker in workers),
            "queue_length": sum(worker.in_flight for worker in workers),
        }
        return JSONResponse(total)

    async def say_success(_: Request) -> Response:
        return JSONResponse("success")

    def list_models(multimodal: bool | None) -> Endpoint:
        async def endpoint(_: Request) -> Response:
            return _json(ModelList(models=registry.list_models(multimodal=multimodal)))

        return endpoint

    return [
        Route("/register_worker", register_worker, methods=["POST"]),
        Route("/refresh_all_workers", refresh_all_workers, methods=["POST"]),
        Route("/list_models", list_models(None), methods=["POST"]),
        Route("/list_multimodal_models", list_models(True), methods=["POST"]),
        Route("/list_language_models", list_models(False), methods=["POST"]),
        Route("/get_worker_address", get_worker_address, methods=["POST"]),
        Route("/receive_heart_beat", receive_heart_beat, methods=["POST"]),
        Route("/worker_generate_stream", worker_generate_stream, methods=["POST"]),
        Route("/worker_get_status", worker_get_status, methods=["POST"]),
        Route("/test_connection", say_success, methods=["GET"]),
    ]


def fastserve_routes(registry: WorkerRegistry, metrics: ControlMetrics) -> list[Route]:
    """What our API servers and workers ask, and what people and their monitoring look at."""

    async def acquire(request: Request) -> Response:
        body = await _parse(request, AcquireRequest)
        answer = registry.acquire(body.model, body.lease, body.exclude)
        metrics.count(body.model, answer.address)
        return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")

    async def release(request: Request) -> Response:
        registry.release((await _parse(request, ReleaseRequest)).leases)
        return JSONResponse(None)

    async def report_failure(request: Request) -> Response:
        registry.report_failure((await _parse(request, WorkerName)).worker_name)
        return JSONResponse(None)

    async def deregister_worker(request: Request) -> Response:
        registry.deregister((await _parse(request, WorkerName)).worker_name)
        return JSONResponse(None)

    async def workers(_: Request) -> Response:
        return _json(registry.table())

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(_: Request) -> Response:
        # Ready without workers too: they cannot register with a controller that waits for them.
        return JSONResponse({"status": "ok", "workers": len(registry.table().workers)})

    async def show_metrics(_: Request) -> Response:
        return Response(metrics.exposition(registry.table()), headers={"content-type": CONTENT_TYPE})

    return [
        Route("/acquire", acquire, methods=["POST"]),
        Route("/release", release, methods=["POST"]),
        Route("/report_failure", report_failure, methods=["POST"]),
        Route("/deregister_worker", deregister_worker, methods=["POST"]),
        Route("/workers", workers, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/ready", ready, methods=["GET"]),
        Route("/metrics", show_metrics, methods=["GET"]),
    ]


async def _parse(request: Request, message: type[BodyT]) -> BodyT:
    try:
        return message.model_validate_json(await request.body())
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")
