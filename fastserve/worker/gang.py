"""The worker's part in a group of several machines: its keys, and the process on machines other than the first.

That process serves no model: it starts the ranks of its machine, answers health checks, and names rank 0's address to
everybody else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Mapping

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from fastserve.access.cluster_key import load_cluster_keys
from fastserve.config import WorkerConfig
from fastserve.distributed.gang import Gang
from fastserve.distributed.keys import ENV_GANG_KEY, gang_secret
from fastserve.distributed.problems import EnvironmentFault
from fastserve.engine.ranks.local_ranks import LocalRanks
from fastserve.engine.settings import EngineConfig
from fastserve.errors import MisdirectedRequestError
from fastserve.serving.errors import error_response, install_error_handlers
from fastserve.serving.listen import bind
from fastserve.serving.server import serve
from fastserve.worker.keeper import RestartPolicy

logger = logging.getLogger(__name__)

RESTARTS = RestartPolicy(attempts=10_000, window_s=60.0, max_pause_s=2.0)
"""Restart policy of rank 0's engine: other machines may be away often and for long."""
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def rank_environment(config: WorkerConfig, gang: Gang, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables for the ranks' processes: the secret of their sockets' keys. Raises StartupError when machines are not
    on loopback and there is no cluster key."""
    keys = load_cluster_keys(
        environ,
        key_file=config.cluster_key_file,
        insecure=config.insecure,
        hosts=[machine.ip for machine in gang.machines],
    )
    return {} if keys is None else {ENV_GANG_KEY: gang_secret(keys.current)}


def run_member(config: WorkerConfig, gang: Gang, engine: EngineConfig, environ: dict[str, str]) -> None:
    """Run the ranks of a machine other than the first until SIGTERM. `environ`: of their processes.

    Raises EnvironmentFault when rank 0 has refused one of them."""
    sockets = bind(config.host, config.port)
    refused: list[int] = []

    def end(rank: int) -> None:
        refused.append(rank)
        os.kill(os.getpid(), signal.SIGINT)

    async def wait_ready() -> None:
        # The line that a service is ready is rank 0's alone: here, no model is served.
        logger.info("this machine has ranks of a model that is served at %s", gang.service_url)
        await asyncio.Event().wait()

    ranks = LocalRanks(gang.local_ranks, engine, environ, end)
    try:
        serve(make_member_app(gang), config, sockets, wait_ready=wait_ready)
    finally:
        ranks.close(timeout_s=0.0)
    if refused:
        raise EnvironmentFault(f"Rank {refused[0]} cannot join rank 0 at {gang.service_url}; the lines above say why.")


def make_member_app(gang: Gang) -> FastAPI:
    app = FastAPI(title="fastserve member", docs_url=None, redoc_url=None, openapi_url=None)
    install_error_handlers(app)
    ranks = list(gang.local_ranks)

    async def health() -> Response:
        """200 while the ranks of this machine run or are started again."""
        return JSONResponse({"status": "member", "ranks": ranks, "served_at": gang.service_url})

    async def elsewhere(request: Request) -> Response:
        return error_response(
            MisdirectedRequestError(
                f"This machine has a part of a model that is served at {gang.service_url}: send requests there.",
                code="member_of_group",
            ),
            request.scope,
        )

    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/{path:path}", elsewhere, methods=_METHODS)
    return app
