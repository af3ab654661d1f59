"""rtp-llm's routes on the worker: generation at `POST /`, its health checks, its status and its tokenizer."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from fastserve.errors import FastserveError
from fastserve.openai.answers import JSON, encode_json
from fastserve.openai.routes import COMPLETIONS
from fastserve.worker.caller import read_body
from fastserve.worker.jobs import JobMaker
from fastserve.worker.metrics import kv_usage
from fastserve.worker.prepare import prepare
from fastserve.worker.responses import respond
from fastserve.worker.rtp_llm_request import make_job, read_text
from fastserve.worker.runtime import runtime_of
from fastserve.worker.writers.rtp_llm import RtpLlmWriter, error_body

router = APIRouter()


@router.post("/")
async def generate(request: Request) -> Response:
    try:
        runtime, (job, shape) = await prepare(request, COMPLETIONS, make_job)
        return await respond(request, runtime, job, RtpLlmWriter(job, shape))
    except FastserveError as error:
        return _refusal(error)


@router.post("/tokenizer/encode")
async def encode(request: Request) -> Response:
    """Ids and tokens of `prompt`, with the special tokens that the tokenizer adds."""
    try:
        runtime, body = runtime_of(request), await read_body(request)
        answer = await runtime.pool.run(len(body), lambda: _encode(runtime.jobs, body))
    except FastserveError as error:
        return _refusal(error)
    return Response(encode_json(answer), media_type=JSON)


@router.get("/")
async def home() -> dict[str, str]:
    return {"status": "home"}


@router.get("/worker_status")
async def worker_status(request: Request) -> Response:
    runtime = runtime_of(request)
    admission, stats = runtime.admission, runtime.keeper.engine.stats
    tokens = runtime.info.num_blocks * runtime.info.block_size
    return JSONResponse(
        {
            "available_concurrency": max(0, admission.limit - admission.running),
            "available_kv_cache": round(tokens * (1 - kv_usage(stats))),
            "total_kv_cache": tokens,
            "alive": runtime.keeper.ready,
        }
    )


async def _is_well(request: Request) -> Response:
    runtime_of(request).keeper.require_ready()
    return JSONResponse("ok")


for _path in ("/status", "/GraphService/cm2_status", "/SearchService/cm2_status", "/health_check"):
    router.add_api_route(_path, _is_well, methods=["GET", "POST"])
router.add_api_route("/health", _is_well, methods=["POST"])


def _encode(jobs: JobMaker, body: bytes) -> dict[str, Any]:
    ids = jobs.encoder.encode(read_text(body, jobs.settings.bounds), "prompt", add_special_tokens=True)
    return {"token_ids": ids, "tokens": [jobs.tokenizer.token_bytes(item).decode(errors="replace") for item in ids]}


def _refusal(error: FastserveError) -> Response:
    return JSONResponse(error_body(error), status_code=error.status, headers=error.headers())
