"""A stand-in service with routes for tests, run as a process: `python standin.py --flags-of-any-service`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fastserve.config import ServerConfig
from fastserve.errors import InvalidRequestError
from fastserve.observability.logging import setup_logging
from fastserve.options import parse_config
from fastserve.serving.direct import offer_direct_answers
from fastserve.serving.errors import install_error_handlers
from fastserve.serving.listen import bind
from fastserve.serving.responses import StreamResponse, run_until_disconnect
from fastserve.serving.server import run_entry, serve

router = APIRouter()
kept: list[bytearray] = []


@router.get("/health")
async def health() -> Response:
    return JSONResponse({"status": "ok"})


@router.get("/things/{name:path}")
async def thing(name: str) -> Response:
    return JSONResponse({"name": name})


@router.post("/refuse")
async def refuse(request: Request) -> Response:
    """Answers with an error whose message is the body, a JSON string."""
    word = json.loads(await request.body())
    raise InvalidRequestError(f"'{word}' is wrong, that is to say '{word}'.", param=word)


@router.post("/size")
async def size(request: Request) -> Response:
    """Answers with the size of the body."""
    return JSONResponse({"size": len(await request.body())})


@router.post("/unread")
async def unread() -> Response:
    """Answers without reading the body."""
    return JSONResponse({"size": None})


@router.post("/hold")
async def hold(request: Request) -> Response:
    """Keeps the body in memory until the client disconnects."""
    body = await request.body()
    await run_until_disconnect(request, asyncio.sleep(60))
    return JSONResponse({"size": len(body)})


@router.get("/sleep")
async def sleep(request: Request, seconds: float) -> Response:
    await run_until_disconnect(request, asyncio.sleep(seconds))
    return JSONResponse({"slept": seconds})


@router.get("/stream")
async def stream(count: int = 1_000_000, pause_s: float = 0.02, piece: int = 20, kind: str = "event") -> Response:
    """Streams events of about `piece` bytes, with a pause after each."""

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            for number in range(count):
                yield b"data: " + str(number).encode().ljust(piece, b".") + b"\n\n"
                if pause_s:
                    await asyncio.sleep(pause_s)
            yield b"data: [DONE]\n\n"
        finally:
            print("stream closed", flush=True)

    return StreamResponse(events(), media_type="text/event-stream" if kind == "event" else "application/octet-stream")


@router.get("/block")
async def block() -> Response:
    """Blocks the event loop, as a bug would."""
    for _ in range(600):
        time.sleep(0.1)  # noqa: ASYNC251 - that is the bug
    return JSONResponse({})


@router.get("/exhaust")
async def exhaust(seconds: float) -> Response:
    """Uses up all file descriptors for a while."""
    files = []
    with suppress(OSError):
        while True:
            files.append(os.open(os.devnull, os.O_RDONLY))
    await asyncio.sleep(seconds)
    for file in files:
        os.close(file)
    return JSONResponse({"files": len(files)})


@router.get("/allocate")
async def allocate(megabytes: int) -> Response:
    """Allocates memory; 0 frees it."""
    if megabytes:
        kept.append(bytearray(os.urandom(1) * (megabytes << 20)))
    else:
        kept.clear()
    return JSONResponse({})


class Repeated:
    """Answers whether a body took the normal path; repetitions are answered directly."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        await asyncio.sleep(0.1)
        offer_direct_answers(scope, lambda body: json.dumps({"direct": len(body)}).encode())
        await JSONResponse({"usual": len(body)})(scope, receive, send)


router.routes.append(Route("/repeated", Repeated(), methods=["POST"]))


def main(argv: list[str]) -> None:
    config: Any = parse_config(ServerConfig, argv, "standin", os.environ)
    setup_logging(config.log_level, "standin", {})
    sockets = bind(config.host, config.port)
    print(sockets[0].getsockname()[1], flush=True)
    app = FastAPI()
    install_error_handlers(app)
    app.include_router(router)
    serve(app, config, sockets, vital_paths={"/allocate"})


if __name__ == "__main__":
    run_entry(lambda: main(sys.argv[1:]))
