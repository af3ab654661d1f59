"""Shared state of a worker's routes, available once the model is loaded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from fastapi import Request
from starlette.responses import Response

from fastserve.engine.contract import EngineInfo
from fastserve.errors import UnsupportedCapabilityError
from fastserve.openai.routes import ModelRoute, unsupported
from fastserve.protocol import WorkerStatus
from fastserve.text.conversation import Conversation
from fastserve.worker.adapters import ServedAdapters
from fastserve.worker.admission import Admission
from fastserve.worker.jobs import JobMaker
from fastserve.worker.keeper import EngineKeeper
from fastserve.worker.metrics import WorkerMetrics, kv_usage
from fastserve.worker.pooling_service import PoolingService
from fastserve.worker.prompt_pool import PromptPool
from fastserve.worker.service import GenerationService


@dataclass(frozen=True)
class ModelHandler:
    """The worker's implementation of a model route."""

    route: ModelRoute
    endpoint: Callable[[Request], Awaitable[Response]]
    is_offered: Callable[[Runtime], bool]
    """Whether the worker announces the capability. Without it the endpoint still exists, and its error names what is
    missing."""


@dataclass(frozen=True)
class Runtime:
    info: EngineInfo
    keeper: EngineKeeper
    admission: Admission
    metrics: WorkerMetrics
    jobs: JobMaker
    adapters: ServedAdapters
    pool: PromptPool
    service: GenerationService
    pooling: PoolingService | None
    """The service of a model that embeds or classifies; None: the model generates."""
    conversation: Conversation
    handlers: Sequence[ModelHandler]
    heartbeat_interval_s: float
    version: str
    started_at: int
    """Unix time in seconds."""

    def status(self) -> WorkerStatus:
        stats = self.keeper.engine.stats
        return WorkerStatus(
            ready=self.keeper.ready and not stats.weights_incomplete,
            model_names=list(self.jobs.settings.model_names),
            queue_length=self.admission.running + self.admission.waiting,
            tokens_per_s=stats.tokens_per_s or None,
            heartbeat_interval_s=self.heartbeat_interval_s,
            leases=self.admission.leases,
            context_length=self.info.max_model_len,
            max_concurrency=self.admission.limit,
            kv_usage=kv_usage(stats),
            paused=stats.paused,
            version=self.version,
            capabilities=self.capabilities,
            adapters_digest=self.adapters.digest,
            held_adapters=self.adapters.held,
        )

    @property
    def capabilities(self) -> list[str]:
        return list(dict.fromkeys(handler.route.capability for handler in self.handlers if handler.is_offered(self)))

    def require_pooling(self, route: ModelRoute) -> PoolingService:
        """Raises UnsupportedCapabilityError if the model does not offer this route for vectors or scores."""
        if self.pooling is None or route.capability not in self.capabilities:
            raise self._unsupported(route)
        return self.pooling

    def require_generation(self, route: ModelRoute) -> None:
        """Raises UnsupportedCapabilityError if the model generates no text."""
        if self.pooling is not None:
            raise self._unsupported(route)

    def _unsupported(self, route: ModelRoute) -> UnsupportedCapabilityError:
        routes = [handler.route for handler in self.handlers]
        return unsupported(self.jobs.settings.model_names[0], route, self.capabilities, routes)


def runtime_of(request: Request) -> Runtime:
    """Raises ModelLoadingError before the model is loaded."""
    runtime: Runtime | None = request.app.state.runtime
    if runtime is None:
        keeper: EngineKeeper = request.app.state.keeper
        raise keeper.unavailable()
    return runtime


def metrics_of(request: Request) -> WorkerMetrics:
    """The worker's metrics, also while the model loads."""
    metrics: WorkerMetrics = request.app.state.metrics
    return metrics


def status_of(request: Request) -> WorkerStatus:
    """The worker's status, also while the model loads."""
    status: Callable[[], WorkerStatus] = request.app.state.status
    return status()


def status_changed(request: Request) -> None:
    """Send a heartbeat with the new status now instead of at the end of the interval."""
    announce: Callable[[], None] = request.app.state.status_changed
    announce()
