"""The worker's metrics: its own counters, and the engine's statistics."""

from __future__ import annotations

import time
from collections import Counter as CounterOf
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from fastserve.engine.contract import STEP_SECONDS_BOUNDS, STEP_SIZE_BOUNDS, EngineStats, FusedLayers
from fastserve.engine.contract import Histogram as EngineHistogram
from fastserve.errors import FastserveError
from fastserve.observability.metrics import LATENCY_BUCKETS_S, CollectorRegistry, Counter, Gauge, Histogram, exposition
from fastserve.worker.admission import Admission

_INTER_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)

_MAX_LISTED_ADAPTERS = 128
"""In a label."""


class WorkerMetrics:
    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
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
        self.inter_token = QuickHistogram(
            "fastserve_worker_inter_token_latency_seconds",
            "Time between two tokens of one answer.",
            _INTER_TOKEN_BUCKETS_S,
        )
        registry.register(self.inter_token)
        self.queue_time = Histogram(
            "fastserve_worker_request_queue_time_seconds",
            "From the arrival of a request to its permit to run.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.unknown_fields = Counter(
            "fastserve_worker_unknown_fields",
            "Request fields that were not known and had no effect.",
            ["field"],
            registry=registry,
        )
        self.adapters_in_use = AdaptersInUse()
        self.engine_restarts = Counter(
            "fastserve_worker_engine_restarts", "Times that the engine was started again.", registry=registry
        )

    def watch(self, admission: Admission, preparing: Callable[[], int], stats: Callable[[], EngineStats]) -> None:
        """Add the queues' and the engine's metrics. Called once."""
        for name, text, read in (
            ("running", "Requests that hold a permit.", lambda: admission.running),
            ("waiting", "Requests that wait for a permit.", lambda: admission.waiting),
            ("limit", "Permits: the most requests that run at once.", lambda: admission.limit),
            ("preparing", "Requests whose body is read in a thread, or waits for one.", preparing),
            ("waiting_tokens", "Prompt tokens of the requests that wait.", lambda: admission.queued_tokens),
        ):
            gauge = Gauge(f"fastserve_worker_requests_{name}", text, registry=self.registry)
            gauge.set_function(read)
        self.registry.register(_EngineCollector(stats))

    def show_adapters_in_use(self, max_loras: int) -> None:
        """Add the adapters of requests. Called once."""
        self.adapters_in_use.max_loras = max_loras
        self.registry.register(self.adapters_in_use)

    def show_fused_layers(self, kinds: Iterable[FusedLayers]) -> None:
        """Add the numbers of layers with and without a fused kernel. Called once."""
        gauge = Gauge(
            "fastserve_engine_layers",
            "Layers of the model, by whether a fused kernel computes them.",
            ["kind", "fused"],
            registry=self.registry,
        )
        for layers in kinds:
            gauge.labels(layers.kind, "true").set(layers.fused)
            gauge.labels(layers.kind, "false").set(layers.total - layers.fused)

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Count requests that are refused in this context."""
        try:
            yield
        except FastserveError as error:
            self.requests.labels(error.code or error.type).inc()
            raise

    def exposition(self) -> bytes:
        return exposition(self.registry)


class RequestOfAdapter:
    """One request in `AdaptersInUse`."""

    def __init__(self, adapter: str, waiting: CounterOf[str], running: CounterOf[str]) -> None:
        self._adapter = adapter
        self._waiting = waiting
        self._running = running
        self._counted_in = waiting
        waiting[adapter] += 1

    def start(self) -> None:
        """It has its first token. May be called again."""
        if self._counted_in is self._waiting:
            self.end()
            self._counted_in = self._running
            self._running[self._adapter] += 1

    def end(self) -> None:
        self._counted_in[self._adapter] -= 1
        if not self._counted_in[self._adapter]:
            del self._counted_in[self._adapter]


class AdaptersInUse(Collector):
    """vLLM's `lora_requests_info`: the adapters of requests that run and wait, as labels; its value is the time."""

    def __init__(self) -> None:
        self.max_loras = 0
        self._waiting: CounterOf[str] = CounterOf()
        self._running: CounterOf[str] = CounterOf()

    @contextmanager
    def request(self, adapter: str) -> Iterator[RequestOfAdapter]:
        """Count a request of this block, which waits until it is started; "" (no adapter) is not shown."""
        request = RequestOfAdapter(adapter, self._waiting, self._running)
        try:
            yield request
        finally:
            request.end()

    def collect(self) -> Iterator[Metric]:
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        family = GaugeMetricFamily(
            "fastserve_engine_lora_requests_info", "Adapters of requests, and the time.", labels=labels
        )
        family.add_metric([str(self.max_loras), _listed(self._running), _listed(self._waiting)], time.time())
        yield family


def _listed(names: Iterable[str]) -> str:
    return ",".join(sorted(name for name in names if name)[:_MAX_LISTED_ADAPTERS])


class QuickHistogram(Collector):
    """A cheap histogram for observations at every token: prometheus_client's takes several locks. Not thread-safe."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self._name = name
        self._text = text
        self._bounds = bounds
        self._histogram = EngineHistogram()

    def observe(self, value: float) -> None:
        self._histogram.add(value, self._bounds)

    def collect(self) -> Iterator[Metric]:
        buckets = _cumulative(self._histogram, self._bounds)
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._histogram.total)


_GAUGES = {
    "num_requests_running": ("num_running", "Sequences that run."),
    "num_requests_waiting": ("num_waiting", "Sequences that wait in the engine."),
    "paused": ("paused", "1 while an administrator has paused the engine."),
    "weights_incomplete": ("weights_incomplete", "1 after a weight update that failed halfway."),
    "num_blocks": ("num_blocks", "Blocks of the KV cache."),
    "num_used_blocks": ("num_used_blocks", "Blocks that running sequences hold."),
    "tokens_per_s": ("tokens_per_s", "Decode speed on the reference batch."),
}
"""Metric: field of EngineStats and help text. A metric that vLLM has too carries vLLM's name."""
_COUNTERS = {
    "steps": ("steps", "Steps."),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens of requests that were scheduled."),
    "prefix_cache_queries": ("prompt_tokens", "Prompt tokens looked for in the prefix cache."),
    "prefix_cache_hits": ("cached_tokens", "Of these, found there."),
    "generation_tokens": ("generated_tokens", "Tokens generated."),
    "spec_decode_num_draft_tokens": ("draft_tokens", "Tokens that speculative decoding guessed."),
    "spec_decode_num_accepted_tokens": ("accepted_tokens", "Of these, the right ones."),
    "weight_updates": ("weight_updates", "Weight updates that were put in place."),
    "num_preemptions": ("preemptions", "Preemptions."),
    "finished": ("finished", "Sequences that ended by themselves."),
    "aborted": ("aborted", "Sequences that were aborted."),
}
_HISTOGRAMS = {
    "step_duration_seconds": ("step_seconds", STEP_SECONDS_BOUNDS, "Duration of a step."),
    "iteration_tokens_total": ("step_tokens", STEP_SIZE_BOUNDS, "Tokens that a step computed."),
    "step_sequences": ("step_sequences", STEP_SIZE_BOUNDS, "Sequences that a step computed tokens of."),
}


_ADAPTER_GAUGES = {
    "num_loras": ("num_adapters", "Adapters that the engine knows."),
    "num_loras_on_device": ("num_on_device", "Adapters on the device."),
    "num_loras_on_host": ("num_on_host", "Copies of adapters in host memory."),
    "num_loras_running": ("num_running", "Different adapters of running sequences."),
}
_ADAPTER_COUNTERS = {
    "lora_loads": ("loads", "Copies of adapters to the device."),
    "lora_evictions": ("evictions", "Adapters that gave up their place on the device to others."),
}
"""As above, with fields of AdapterStats."""


class _EngineCollector(Collector):
    """Exports the engine's latest statistics at each scrape."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, (field, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"fastserve_engine_{name}", text, value=getattr(stats, field))
        for name, (field, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"fastserve_engine_{name}", text, value=getattr(stats, field))
        for name, (field, bounds, text) in _HISTOGRAMS.items():
            histogram: EngineHistogram = getattr(stats, field)
            yield HistogramMetricFamily(
                f"fastserve_engine_{name}", text, buckets=_cumulative(histogram, bounds), sum_value=histogram.total
            )
        if stats.adapters is not None:
            for name, (field, text) in _ADAPTER_GAUGES.items():
                yield GaugeMetricFamily(f"fastserve_engine_{name}", text, value=getattr(stats.adapters, field))
            for name, (field, text) in _ADAPTER_COUNTERS.items():
                yield CounterMetricFamily(f"fastserve_engine_{name}", text, value=getattr(stats.adapters, field))
        version = GaugeMetricFamily(
            "fastserve_engine_weight_version", "1 for the version of the weights that compute.", labels=["version"]
        )
        version.add_metric([stats.weight_version], 1.0)
        yield version
        usage = kv_usage(stats)
        yield GaugeMetricFamily("fastserve_engine_kv_cache_usage_perc", "Used KV cache; 1 is all of it.", value=usage)


def _cumulative(histogram: EngineHistogram, bounds: tuple[float, ...]) -> list[tuple[str, float]]:
    """Prometheus's cumulative buckets: each counts all values up to its bound."""
    counts = histogram.counts or [0] * (len(bounds) + 1)
    names = [*map(str, bounds), "+Inf"]
    return list(zip(names, map(float, accumulate(counts)), strict=True))


def kv_usage(stats: EngineStats) -> float:
    """Fraction of the KV cache's blocks that running requests hold, 0 to 1."""
    return stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0
