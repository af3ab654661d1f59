"""The worker's metrics: what it counts itself, and what the engine's snapshots tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastapi.exceptions import RequestValidationError
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fastserve.engine.contract import EngineStats
from fastserve.errors import FastserveError, InvalidRequestError
from fastserve.observability.metrics import LATENCY_BUCKETS_S, CollectorRegistry, Counter, Gauge, Histogram, exposition
from fastserve.worker.admission import Admission

_INTER_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class WorkerMetrics:
    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "fastserve_worker_requests", "Requests that ended, by how.", ["outcome"], registry=registry
        )
        self.prompt_tokens = Counter("fastserve_worker_prompt_tokens", "Tokens of the prompts.", registry=registry)
        self.time_to_first_token = Histogram(
            "fastserve_worker_time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.inter_token = Histogram(
            "fastserve_worker_inter_token_seconds",
            "Time between two tokens of one answer.",
            buckets=_INTER_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self.unknown_fields = Counter(
            "fastserve_worker_unknown_fields",
            "Request fields that were not known and had no effect.",
            ["field"],
            registry=registry,
        )
        self.engine_restarts = Counter(
            "fastserve_worker_engine_restarts", "Times that the engine was started again.", registry=registry
        )

    def watch(self, admission: Admission, stats: Callable[[], EngineStats]) -> None:
        """Show the queue and the engine's snapshots too. Called once."""
        for name, text, read in (
            ("running", "Requests that hold a permit.", lambda: admission.running),
            ("waiting", "Requests that wait for a permit.", lambda: admission.waiting),
        ):
            gauge = Gauge(f"fastserve_worker_requests_{name}", text, registry=self._registry)
            gauge.set_function(read)
        self._registry.register(_EngineCollector(stats))

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Count a request that is turned away inside."""
        try:
            yield
        except FastserveError as error:
            self.requests.labels(error.code or error.type).inc()
            raise
        except RequestValidationError:
            self.requests.labels(InvalidRequestError.code).inc()
            raise

    def exposition(self) -> bytes:
        return exposition(self._registry)


_GAUGES = {
    "num_running": "Sequences that run.",
    "num_waiting": "Sequences that wait.",
    "num_blocks": "Blocks of the KV cache.",
    "num_used_blocks": "Blocks that running sequences hold.",
    "tokens_per_s": "Decode speed on the reference batch.",
}
_COUNTERS = {
    "steps": "Steps.",
    "prompt_tokens": "Prompt tokens that were scheduled.",
    "cached_tokens": "Prompt tokens found in the prefix cache.",
    "generated_tokens": "Tokens generated.",
    "preemptions": "Preemptions.",
    "finished": "Sequences that ended by themselves.",
    "aborted": "Sequences that were aborted.",
}


class _EngineCollector(Collector):
    """Reads the engine's latest snapshot when the metrics are asked for."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"fastserve_engine_{name}", text, value=getattr(stats, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"fastserve_engine_{name}", text, value=getattr(stats, name))
        usage = kv_usage(stats)
        yield GaugeMetricFamily("fastserve_engine_kv_usage", "Share of the KV cache in use.", value=usage)


def kv_usage(stats: EngineStats) -> float:
    """Share of the KV cache that running requests hold, 0 to 1."""
    return stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0
