"""Routes for vectors and scores on the worker."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import Request
from starlette.responses import Response

from fastserve.engine.contract import PoolingInfo
from fastserve.openai.answers import JSON
from fastserve.openai.routes import (
    CLASSIFY,
    COHERE_RERANK,
    EMBEDDINGS,
    ENGINE_EMBEDDINGS,
    OLLAMA_EMBED,
    OLLAMA_EMBEDDINGS,
    POOLING,
    POOLING_ROUTES,
    RERANK,
    SCORE,
    ModelRoute,
)
from fastserve.protocol import REQUEST_ID_HEADER
from fastserve.serving.responses import run_until_disconnect
from fastserve.worker.caller import Caller, caller_of, read_body
from fastserve.worker.pooling_request import PoolingJob, PoolingJobMaker
from fastserve.worker.responses import CLIENT_GONE
from fastserve.worker.runtime import ModelHandler, Runtime, metrics_of, runtime_of

MakeJob = Callable[[PoolingJobMaker, bytes, Caller], PoolingJob]


async def answer(request: Request, route: ModelRoute, make: MakeJob) -> Response:
    """Read the body, run the job and write its answer. Raises FastserveError."""
    caller = caller_of(request)
    with metrics_of(request).refusals():
        runtime = runtime_of(request)
        runtime.keeper.require_ready()
        service = runtime.require_pooling(route)
        body = await read_body(request)
        job = await runtime.pool.run(len(body), lambda: make(service.jobs, body, caller))
    result = await run_until_disconnect(request, service.run(job))
    if result is None:
        return Response(status_code=CLIENT_GONE)
    written = await runtime.pool.run(len(result.values), lambda: job.write(result))
    return Response(written, media_type=JSON, headers={REQUEST_ID_HEADER: caller.request_id})


def _endpoint(route: ModelRoute, make: MakeJob) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await answer(request, route, make)

    return endpoint


async def _engine_embeddings(request: Request) -> Response:
    model: str = request.path_params["model"]
    return await answer(request, ENGINE_EMBEDDINGS, lambda jobs, body, caller: jobs.embed(body, caller, model))


def _is_embedder(pooling: PoolingInfo) -> bool:
    return pooling.kind == "embed"


def _is_classifier(pooling: PoolingInfo) -> bool:
    return pooling.kind == "classify"


def _scores_pairs(pooling: PoolingInfo) -> bool:
    return pooling.kind == "embed" or pooling.width == 1


def _cohere_rerank(jobs: PoolingJobMaker, body: bytes, caller: Caller) -> PoolingJob:
    return jobs.rerank(body, caller, is_cohere=True)


_MAKERS: dict[str, tuple[MakeJob, Callable[[PoolingInfo], bool]]] = {
    EMBEDDINGS.capability: (lambda jobs, body, caller: jobs.embed(body, caller), _is_embedder),
    RERANK.capability: (lambda jobs, body, caller: jobs.rerank(body, caller, is_cohere=False), _scores_pairs),
    SCORE.capability: (lambda jobs, body, caller: jobs.score(body, caller), _scores_pairs),
    CLASSIFY.capability: (lambda jobs, body, caller: jobs.classify(body, caller), _is_classifier),
    POOLING.capability: (lambda jobs, body, caller: jobs.pool(body, caller), lambda _: True),
}


_SPECIAL: dict[str, MakeJob] = {
    COHERE_RERANK.path: _cohere_rerank,
    OLLAMA_EMBED.path: lambda jobs, body, caller: jobs.ollama(body, caller),
    OLLAMA_EMBEDDINGS.path: lambda jobs, body, caller: jobs.ollama_embedding(body, caller),
}
"""By path: routes of another form than the capability's."""


def _handler(route: ModelRoute) -> ModelHandler:
    make, can = _MAKERS[route.capability]
    endpoint = _endpoint(route, _SPECIAL.get(route.path, make))

    def is_offered(runtime: Runtime) -> bool:
        return runtime.info.pooling is not None and can(runtime.info.pooling)

    return ModelHandler(route, _engine_embeddings if route.names_model else endpoint, is_offered)


HANDLERS = tuple(map(_handler, (*POOLING_ROUTES, OLLAMA_EMBED, OLLAMA_EMBEDDINGS)))
