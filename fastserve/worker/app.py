"""The worker's application: its parts, its lifespan, its routes for people and machines that look after it."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from fastserve import __version__
from fastserve.config import WorkerConfig
from fastserve.engine.contract import Engine, EngineInfo
from fastserve.errors import EngineDeadError, StartupError
from fastserve.observability.metrics import CONTENT_TYPE
from fastserve.serving.errors import error_response, install_error_handlers
from fastserve.serving.tls import client_ssl_context
from fastserve.text.chat_template import ChatTemplate, load_chat_template
from fastserve.text.conversation import derive_conversation
from fastserve.text.tokenizer import Tokenizer, load_tokenizer
from fastserve.worker import fastchat_routes, openai_routes
from fastserve.worker.admission import Admission
from fastserve.worker.heartbeat import Heartbeat
from fastserve.worker.jobs import JobMaker
from fastserve.worker.keeper import EngineKeeper, RestartPolicy
from fastserve.worker.metrics import WorkerMetrics
from fastserve.worker.progress import progress_reporter
from fastserve.worker.runtime import Runtime, runtime_of
from fastserve.worker.sampling import read_defaults
from fastserve.worker.service import GenerationService

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker is made of; decided before it starts."""

    config: WorkerConfig
    engine: Engine
    model_dir: Path
    model_names: tuple[str, ...]
    address: str
    """Under which others reach this worker."""
    wait_listening: Callable[[], Awaitable[None]]
    """Returns when requests are accepted: not before is the worker registered."""
    end_process: Callable[[], None]
    """Called when the engine has been given up, or a task that the worker cannot live without has failed."""
    restart_policy: RestartPolicy = field(default_factory=RestartPolicy)


class _App(FastAPI):
    """FastAPI, but a start that fails leaves no traceback in the log: the cause has been told in a sentence."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_quietly(message: MutableMapping[str, Any]) -> None:
            await send({"type": message["type"]} if message["type"] == "lifespan.startup.failed" else message)

        await super().__call__(scope, receive, send_quietly if scope["type"] == "lifespan" else send)


class Worker:
    """One worker's life. `app` serves it; `goodbye` is to be awaited when the process is told to stop."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._setup = setup
        self._heartbeat: Heartbeat | None = None
        self.failure: StartupError | None = None
        """Why the start failed."""
        self.keeper = EngineKeeper(setup.engine, progress_reporter(sys.stderr), time.monotonic, setup.restart_policy)
        self.app = _App(title="fastserve worker", version=__version__, lifespan=self._lifespan)
        install_error_handlers(self.app)
        self.app.include_router(openai_routes.router)
        self.app.include_router(fastchat_routes.router)
        self.app.add_api_route("/health", _health, methods=["GET"])
        self.app.add_api_route("/ready", _ready, methods=["GET"])
        self.app.add_api_route("/metrics", _metrics, methods=["GET"])

    async def goodbye(self) -> None:
        if self._heartbeat is not None:
            await self._heartbeat.goodbye()

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._setup.engine.close)
            try:
                runtime = await self._start()
            except StartupError as error:
                self.failure = error
                raise
            app.state.runtime = runtime
            tasks = [asyncio.create_task(self._vital("engine watch", self._look_after_engine(runtime)))]
            if not self._setup.config.no_register:
                self._heartbeat = self._make_heartbeat(runtime)
                tasks.append(asyncio.create_task(self._vital("heartbeat", self._register(self._heartbeat))))
            stack.push_async_callback(_end, tasks)
            yield

    async def _start(self) -> Runtime:
        """Engine and tokenizer start side by side. Raises StartupError."""
        setup, config = self._setup, self._setup.config
        try:
            async with asyncio.TaskGroup() as group:
                starting = group.create_task(self.keeper.start())
                reading = group.create_task(asyncio.to_thread(_read_texts, setup))
        except* StartupError as errors:
            raise errors.exceptions[0] from None
        info, (tokenizer, template) = starting.result(), reading.result()
        metrics = WorkerMetrics()
        admission = Admission(_limit(config, info), config.queue_size, time.monotonic)
        metrics.watch(admission, lambda: setup.engine.stats)
        metrics.show_fused_layers(info.fused_layers)
        # A tokenizer may know tokens that the model has no row for; the engine takes none of these.
        known_eos = [
            token_id for token_id in (*info.eos_token_ids, *tokenizer.eos_token_ids) if token_id < info.vocab_size
        ]
        eos = tuple(dict.fromkeys(known_eos))
        jobs = JobMaker(
            model_names=setup.model_names,
            tokenizer=tokenizer,
            template=template,
            defaults=read_defaults(setup.model_dir),
            eos_token_ids=eos,
            vocab_size=info.vocab_size,
            context_length=info.max_model_len,
            max_sequences=config.max_num_seqs,
            stream_interval=config.stream_interval,
            seed=config.seed,
            metrics=metrics,
        )
        logger.info(
            "ready: %s at %s, context of %d tokens, KV cache of %d tokens, up to %d requests at once",
            ", ".join(setup.model_names),
            setup.address,
            info.max_model_len,
            info.num_blocks * info.block_size,
            admission.limit,
        )
        return Runtime(
            info=info,
            keeper=self.keeper,
            admission=admission,
            metrics=metrics,
            jobs=jobs,
            service=GenerationService(self.keeper, tokenizer, admission, metrics),
            conversation=derive_conversation(setup.model_names[0], template, eos),
            heartbeat_interval_s=config.heartbeat_interval_s,
            version=__version__,
            started_at=int(time.time()),
        )

    def _make_heartbeat(self, runtime: Runtime) -> Heartbeat:
        config = self._setup.config
        return Heartbeat(
            config.controller_address,
            self._setup.address,
            config.heartbeat_interval_s,
            runtime.status,
            client_ssl_context(config),
        )

    async def _vital(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Do `work`, and end the process when it fails: without it nobody would restart or reach this worker."""
        try:
            await work
        except Exception:
            logger.exception("the %s failed; this worker ends", name)
            self.keeper.gave_up = True
            self._setup.end_process()

    async def _register(self, heartbeat: Heartbeat) -> None:
        await self._setup.wait_listening()
        await heartbeat.run()

    async def _look_after_engine(self, runtime: Runtime) -> None:
        async def changed() -> None:
            if self.keeper.ready:
                runtime.metrics.engine_restarts.inc()
                if self._heartbeat is not None:
                    self._heartbeat.resume()
            else:
                await self.goodbye()

        await self.keeper.watch(changed)
        self._setup.end_process()


def _read_texts(setup: WorkerSetup) -> tuple[Tokenizer, ChatTemplate | None]:
    override = setup.config.chat_template
    template = load_chat_template(setup.model_dir, None if override is None else Path(override))
    return load_tokenizer(setup.model_dir, trust_remote_code=setup.config.trust_remote_code), template


def _limit(config: WorkerConfig, info: EngineInfo) -> int:
    """Requests that may run at once. Unset, as many as the engine can hold: each needs a block of the KV cache."""
    if config.limit_worker_concurrency is not None:
        return config.limit_worker_concurrency
    return max(1, min(config.max_num_seqs, info.num_blocks))


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _health(request: Request) -> Response:
    """200 as long as this process can serve or will be able to again."""
    keeper = runtime_of(request).keeper
    state = "ready" if keeper.ready else "failed" if keeper.gave_up else "recovering"
    return JSONResponse({"status": state}, status_code=503 if keeper.gave_up else 200)


async def _ready(request: Request) -> Response:
    """200 while requests can be served now."""
    runtime = runtime_of(request)
    try:
        runtime.keeper.require_ready()
    except EngineDeadError as error:
        return error_response(error)
    return JSONResponse({"status": "ready", "models": runtime.jobs.model_names})


async def _metrics(request: Request) -> Response:
    return Response(runtime_of(request).metrics.exposition(), media_type=CONTENT_TYPE)
