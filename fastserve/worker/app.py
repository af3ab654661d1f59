"""The worker's application: its components, lifespan, and health, readiness and metrics routes."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from fastserve import __version__
from fastserve.access.addresses import check_service_address
from fastserve.access.api_keys import load_api_keys
from fastserve.access.hosts import host_of
from fastserve.access.key_files import reloading
from fastserve.access.service import guard_client_service, guard_cluster_service, load_access
from fastserve.config import WorkerConfig
from fastserve.engine.contract import Engine, EngineInfo
from fastserve.errors import StartupError, WeightsIncompleteError
from fastserve.observability.metrics import CONTENT_TYPE
from fastserve.observability.text import printable, short_count
from fastserve.openai.body import RequestBounds
from fastserve.protocol import MAX_MODEL_NAMES, MAX_NAME_CHARS, AdapterEntry, WorkerStatus
from fastserve.serving.errors import install_error_handlers
from fastserve.serving.tls import client_ssl_context
from fastserve.text.chat_template import ChatTemplate, load_chat_template
from fastserve.text.conversation import derive_conversation
from fastserve.text.load_tokenizer import load_tokenizer
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker import (
    adapter_routes,
    admin_routes,
    anthropic_routes,
    fastchat_routes,
    ollama_routes,
    openai_routes,
    pooling_routes,
    responses_routes,
    rtp_llm_routes,
    slora_routes,
    token_routes,
    weight_routes,
)
from fastserve.worker.adapter_source import Adapter, find_root
from fastserve.worker.adapter_state import AdapterState
from fastserve.worker.adapters import ServedAdapters, listed_adapters
from fastserve.worker.admission import Admission
from fastserve.worker.fingerprint import Fingerprints, model_digest
from fastserve.worker.grammars import GrammarMaker
from fastserve.worker.heartbeat import Heartbeat
from fastserve.worker.jobs import JobMaker, JobSettings
from fastserve.worker.keeper import EngineKeeper, RestartPolicy
from fastserve.worker.metrics import WorkerMetrics
from fastserve.worker.pooling_encoder import TextEncoder
from fastserve.worker.pooling_files import read_pooling_options
from fastserve.worker.pooling_request import PoolingJobMaker, PoolingLimits
from fastserve.worker.pooling_service import PoolingService
from fastserve.worker.progress import progress_reporter
from fastserve.worker.prompt_pool import PromptPool
from fastserve.worker.runtime import ModelHandler, Runtime, metrics_of, runtime_of
from fastserve.worker.sampling_params import read_defaults
from fastserve.worker.service import GenerationService

logger = logging.getLogger(__name__)

HANDLERS = (*openai_routes.HANDLERS, *pooling_routes.HANDLERS)
"""All model routes of a worker."""


@dataclass(frozen=True)
class WorkerSetup:
    """Inputs of a `ModelWorker`, fixed before it starts."""

    config: WorkerConfig
    engine: Engine
    model_dir: Path
    tokenizer_dir: Path
    model_names: tuple[str, ...]
    address: str
    """URL at which other services reach this worker."""
    wait_listening: Callable[[], Awaitable[None]]
    """Returns once connections are accepted. The first heartbeat waits for it."""
    end_process: Callable[[], None]
    """Called if the model cannot be loaded, the engine has been given up, or another critical task has failed."""
    weight_paths: Sequence[Path] = ()
    """Files and folders of the weights, if `model_dir` is not the only one."""
    adapters: Sequence[Adapter] = ()
    """Those that the engine is started with."""
    restart_policy: RestartPolicy = field(default_factory=RestartPolicy)
    has_other_machines: bool = False
    """The model is divided over several machines: the worker's health is that of all of them."""
    handlers: Sequence[ModelHandler] = HANDLERS
    """Model routes. The capabilities of those that the model supports are announced."""
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    """Environment variables, which may hold the cluster's and the administrators' keys."""


class ModelWorker:
    """A worker from start to end. `app` serves it; await `deregister` when the process is asked to stop.

    The application listens before the model is loaded. Until then it is announced to the controller as not ready,
    serves health checks and metrics, and refuses requests with 503 and Retry-After.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        """Raises StartupError if keys are missing or unreadable, or an address or a model name is invalid."""
        self._setup = setup
        self._metrics = WorkerMetrics()
        self._load_keys()
        self._heartbeat = None if setup.config.no_register else self._make_heartbeat()
        self._loaded = asyncio.Event()
        self.failure: StartupError | None = None
        """The error of a model that could not be loaded."""
        _check_names(setup.model_names)
        self.keeper = EngineKeeper(setup.engine, progress_reporter(sys.stderr), time.monotonic, setup.restart_policy)
        self.app = self._make_app()
        self._guard()

    def _make_app(self) -> FastAPI:
        # No FastAPI docs pages: they load scripts from other hosts.
        app = FastAPI(
            title="fastserve worker", version=__version__, lifespan=self._lifespan, docs_url=None, redoc_url=None
        )
        app.state.runtime = None
        app.state.keeper = self.keeper
        app.state.has_other_machines = self._setup.has_other_machines
        app.state.metrics = self._metrics
        app.state.status = self.status
        app.state.status_changed = self._announce_status
        install_error_handlers(app)
        app.include_router(openai_routes.router)
        for handler in self._setup.handlers:
            app.add_api_route(handler.route.path, handler.endpoint, methods=[handler.route.method])
        app.include_router(token_routes.router)
        app.include_router(responses_routes.router)
        app.include_router(fastchat_routes.router)
        app.include_router(rtp_llm_routes.router)
        app.include_router(slora_routes.router)
        app.include_router(anthropic_routes.router)
        app.include_router(ollama_routes.router)
        app.include_router(admin_routes.router)
        app.include_router(adapter_routes.admin_router)
        app.include_router(weight_routes.admin_router)
        app.include_router(weight_routes.router)
        app.include_router(adapter_routes.router)
        app.add_api_route("/health", _health, methods=["GET"])
        app.add_api_route("/ready", _ready, methods=["GET"])
        app.add_api_route("/metrics", _metrics, methods=["GET"])
        return app

    def _load_keys(self) -> None:
        setup, config = self._setup, self._setup.config
        if not config.no_register:
            check_service_address(config.controller_address, "--controller-address")
            check_service_address(setup.address, "--worker-address")
        self._access = load_access(
            config,
            setup.environ,
            host=config.host,
            cluster_hosts=[config.host, host_of(config.controller_address)],
            is_in_cluster=not config.no_register,
            names=[host_of(setup.address)],
        )
        self._api_keys = load_api_keys(config.api_keys, config.api_keys_file)

    def _guard(self) -> None:
        """In a cluster, require the cluster key; a standalone worker serves clients directly."""
        setup, config = self._setup, self._setup.config
        if not config.no_register:
            if self._api_keys.value:
                logger.warning("API keys have no effect on a worker of a cluster, which requires the cluster key.")
            guard_cluster_service(self.app, self._access, self._metrics.registry)
            return
        if not self._api_keys.value and not self._access.is_on_loopback:
            logger.warning("Whoever reaches %s can use the model: set API keys.", setup.address)
        guard_client_service(
            self.app, self._access, self._metrics.registry, self._api_keys, allowed_origins=(), json_only=True
        )

    async def deregister(self) -> None:
        if self._heartbeat is not None:
            await self._heartbeat.deregister()

    async def wait_loaded(self) -> None:
        """Return once the model is loaded; never return if it cannot be."""
        await self._loaded.wait()

    def status(self) -> WorkerStatus:
        runtime: Runtime | None = self.app.state.runtime
        if runtime is not None:
            return runtime.status()
        return WorkerStatus(
            model_names=list(self._setup.model_names),
            heartbeat_interval_s=self._setup.config.heartbeat_interval_s,
            version=__version__,
            ready=False,
        )

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._setup.engine.close)
            await stack.enter_async_context(
                reloading(self._api_keys, self._access.cluster_keys, self._access.admin_keys)
            )
            pool = PromptPool(
                self._setup.config.prompt_threads,
                self._setup.config.max_preparing,
                self._setup.config.max_refused_prompt_percent,
            )
            stack.callback(pool.close)
            tasks = [asyncio.create_task(self._run_critical("engine watch", self._load_and_watch(pool)))]
            stack.push_async_callback(_cancel_all, tasks)
            if self._heartbeat is not None:
                tasks.append(asyncio.create_task(self._run_critical("heartbeat", self._announce(self._heartbeat))))
            yield

    async def _load_and_watch(self, pool: PromptPool) -> None:
        try:
            runtime = await self._load(pool)
        except StartupError as error:
            self._fail(error)
            return
        except Exception as error:
            logger.exception("the model could not be loaded")
            cause = f"{type(error).__name__}: {printable(str(error), 500)}"
            self._fail(StartupError(f"The worker could not start: {cause}. The lines above say where."))
            return
        self.app.state.runtime = runtime
        # Exclude the tokenizer, which stays, from garbage collections: all requests wait for these.
        gc.collect()
        gc.freeze()
        self._loaded.set()
        self._announce_status()
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(runtime.adapters.watch())
            await self._watch_engine(runtime)
            watching.cancel()

    def _fail(self, failure: StartupError) -> None:
        self.failure = failure
        self.keeper.gave_up = True
        self._setup.end_process()

    async def _load(self, pool: PromptPool) -> Runtime:
        """Start the engine and load the tokenizer concurrently. Raises StartupError."""
        setup, config, metrics = self._setup, self._setup.config, self._metrics
        try:
            async with asyncio.TaskGroup() as group:
                starting = group.create_task(self.keeper.start())
                reading = group.create_task(asyncio.to_thread(_load_tokenizer_and_template, setup))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        info, (tokenizer, template) = starting.result(), reading.result()
        admission = Admission(
            _max_running_requests(config, info), config.queue_size, config.max_queued_tokens, time.monotonic
        )
        metrics.watch(admission, lambda: pool.pending, lambda: setup.engine.stats)
        metrics.show_fused_layers(info.fused_layers)
        if config.serves_adapters:
            metrics.show_adapters_in_use(config.max_loras)
        settings = _job_settings(setup, info, tokenizer)
        adapters = self._serve_adapters()
        paths = setup.weight_paths or [setup.model_dir]
        fingerprints = Fingerprints(
            await asyncio.to_thread(model_digest, paths, config, info),
            lambda: setup.engine.stats.weight_version,
            adapters.file_digest,
        )
        await adapters.restore()
        self._log_ready(info, admission)
        return Runtime(
            info=info,
            keeper=self.keeper,
            admission=admission,
            metrics=metrics,
            jobs=JobMaker(
                settings, tokenizer, template, metrics, adapters, fingerprints, _grammars(config, settings, tokenizer)
            ),
            adapters=adapters,
            pool=pool,
            service=GenerationService(self.keeper, tokenizer, admission, metrics, adapters),
            pooling=self._make_pooling(info, tokenizer, admission, adapters),
            conversation=derive_conversation(setup.model_names[0], template, settings.eos_token_ids),
            handlers=setup.handlers,
            heartbeat_interval_s=config.heartbeat_interval_s,
            version=__version__,
            started_at=int(time.time()),
        )

    def _make_pooling(
        self, info: EngineInfo, tokenizer: Tokenizer, admission: Admission, adapters: ServedAdapters
    ) -> PoolingService | None:
        """Raises StartupError."""
        setup, config = self._setup, self._setup.config
        if info.pooling is None:
            return None
        settings = read_pooling_options(setup.model_dir, info.pooling.kind, config.pooling)
        jobs = PoolingJobMaker(
            setup.model_names[0],
            info.pooling,
            settings,
            TextEncoder(tokenizer, info.vocab_size, info.max_model_len, lowercase=settings.lowercase),
            _request_bounds(config, max_prompt_tokens=config.max_pooling_tokens),
            PoolingLimits(config.max_pooling_tokens, config.max_pooling_answer_bytes, config.long_texts),
            adapters,
        )
        return PoolingService(self.keeper, admission, self._metrics, jobs)

    def _serve_adapters(self) -> ServedAdapters:
        setup, config = self._setup, self._setup.config
        return ServedAdapters(
            setup.engine,
            setup.model_names,
            is_enabled=config.serves_adapters,
            at_start=setup.adapters,
            root=find_root(config),
            allow_any_path=config.allow_any_lora_path,
            max_adapters=config.max_adapters,
            state=None if config.lora_state_file is None else AdapterState(Path(config.lora_state_file)),
            on_change=self._announce_status,
        )

    def _log_ready(self, info: EngineInfo, admission: Admission) -> None:
        logger.info(
            "ready: %s at %s (%s, %s parameters, %s on %s, loaded in %.1f s), context of %d tokens, KV cache of "
            "%d tokens, up to %d requests at once",
            ", ".join(self._setup.model_names),
            self._setup.address,
            info.architecture,
            short_count(info.num_parameters),
            info.dtype,
            info.device,
            info.load_s,
            info.max_model_len,
            info.num_blocks * info.block_size,
            admission.limit,
        )

    def _make_heartbeat(self) -> Heartbeat:
        config = self._setup.config
        return Heartbeat(
            config.controller_address,
            self._setup.address,
            config.heartbeat_interval_s,
            self.status,
            self._adapter_entries,
            self._access.cluster_keys,
            client_ssl_context(config),
        )

    def _adapter_entries(self) -> list[AdapterEntry]:
        runtime: Runtime | None = self.app.state.runtime
        return [] if runtime is None else listed_adapters(runtime.adapters.all())

    async def _run_critical(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run `work`, and end the process if it fails: the worker would neither recover nor be reachable without it."""
        try:
            await work
        except Exception:
            logger.exception("the %s failed; this worker ends", name)
            self.keeper.gave_up = True
            self._setup.end_process()

    async def _announce(self, heartbeat: Heartbeat) -> None:
        await self._setup.wait_listening()
        await heartbeat.run()

    def _announce_status(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.beat_now()

    async def _watch_engine(self, runtime: Runtime) -> None:
        async def changed() -> None:
            if self.keeper.ready:
                runtime.metrics.engine_restarts.inc()
                runtime.adapters.engine_restarted()
            self._announce_status()

        await self.keeper.watch(changed)
        self._setup.end_process()


def _load_tokenizer_and_template(setup: WorkerSetup) -> tuple[Tokenizer, ChatTemplate | None]:
    override = setup.config.chat_template
    template = load_chat_template(
        setup.tokenizer_dir, None if override is None else Path(override), setup.config.conv_template
    )
    return load_tokenizer(setup.tokenizer_dir, trust_remote_code=setup.config.trust_remote_code), template


def _check_names(model_names: tuple[str, ...]) -> None:
    try:
        WorkerStatus(model_names=list(model_names))
    except pydantic.ValidationError as error:
        raise StartupError(
            f"--model-names: at most {MAX_MODEL_NAMES} names of at most {MAX_NAME_CHARS} printable characters can be "
            "served; the name of a model's folder counts when the flag is not given."
        ) from error


def _job_settings(setup: WorkerSetup, info: EngineInfo, tokenizer: Tokenizer) -> JobSettings:
    config = setup.config
    # A tokenizer may have tokens beyond the model's vocabulary, which the engine refuses.
    known = range(info.vocab_size)
    eos = [token_id for token_id in (*info.eos_token_ids, *tokenizer.eos_token_ids) if token_id in known]
    return JobSettings(
        model_names=setup.model_names,
        context_length=info.max_model_len,
        vocab_size=info.vocab_size,
        eos_token_ids=tuple(dict.fromkeys(eos)),
        max_sequences=config.max_num_seqs,
        max_prompt_logprobs=config.max_prompt_logprobs,
        bounds=_request_bounds(config, max_prompt_tokens=config.max_num_seqs * info.max_model_len),
        sampling_defaults=read_defaults(setup.model_dir),
        template_timeout_s=config.template_timeout_s,
        stream_interval=config.stream_interval,
        tool_call_parser=config.tool_call_parser,
        reasoning_parser=config.reasoning_parser,
        trusts_request_templates=config.trust_request_chat_template,
        seed=config.seed,
    )


def _grammars(config: WorkerConfig, settings: JobSettings, tokenizer: Tokenizer) -> GrammarMaker:
    return GrammarMaker(
        tokenizer,
        vocab_size=settings.vocab_size,
        end_token_ids=settings.eos_token_ids,
        max_bytes=config.max_grammar_bytes,
        fuel=config.max_grammar_fuel,
        max_cached_bytes=config.max_cached_grammar_bytes,
    )


def _request_bounds(config: WorkerConfig, max_prompt_tokens: int) -> RequestBounds:
    options = {item.name for item in dataclasses.fields(RequestBounds)} - {"max_prompt_tokens"}
    return RequestBounds(max_prompt_tokens=max_prompt_tokens, **{name: getattr(config, name) for name in options})


def _max_running_requests(config: WorkerConfig, info: EngineInfo) -> int:
    """Requests that may run at once. By default as many as the engine can hold: each needs a block of the KV cache."""
    if config.limit_worker_concurrency is not None:
        return config.limit_worker_concurrency
    return config.max_num_seqs if info.pooling is not None else max(1, min(config.max_num_seqs, info.num_blocks))


async def _cancel_all(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _health(request: Request) -> Response:
    """200 while this process serves or may still become able to; with several machines, while all of them serve."""
    keeper: EngineKeeper = request.app.state.keeper
    if keeper.gave_up:
        state = "failed"
    elif request.app.state.runtime is None:
        state = "loading"
    elif not keeper.ready:
        state = "recovering"
    else:
        stats = keeper.engine.stats
        state = "paused" if stats.paused else "pausing" if stats.pausing else "ready"
        if stats.weights_incomplete:
            state = "weights incomplete"
    fails = keeper.gave_up or (request.app.state.has_other_machines and not keeper.ready)
    return JSONResponse({"status": state}, status_code=503 if fails else 200)


async def _ready(request: Request) -> Response:
    """200 while requests can be served now."""
    runtime = runtime_of(request)
    runtime.keeper.require_ready()
    if runtime.keeper.engine.stats.weights_incomplete:
        raise WeightsIncompleteError("Weights are missing: an update failed halfway, or their memory is released.")
    return JSONResponse({"status": "ready", "models": runtime.jobs.settings.model_names})


async def _metrics(request: Request) -> Response:
    return Response(metrics_of(request).exposition(), media_type=CONTENT_TYPE)
