"""The controller's metrics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fastserve.breaker import State as BreakerState
from fastserve.observability.metrics import CollectorRegistry, Counter, exposition

BREAKER_STATES: dict[BreakerState, float] = {"closed": 0.0, "half-open": 1.0, "open": 2.0}


@dataclass(frozen=True, slots=True)
class WorkerFigures:
    address: str
    in_flight: int
    breaker: BreakerState
    dispatched: tuple[tuple[str, int], ...]
    """Requests dispatched to it, by model."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The registry's counts for `/metrics`."""

    workers: Sequence[WorkerFigures]
    """Workers that take requests."""
    num_leases: int
    num_refused: int
    num_breakers_opened: int


class ControlMetrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.bad_messages = Counter(
            "fastserve_controller_bad_messages",
            "Messages of workers and API servers that were refused.",
            registry=self.registry,
        )
        self._figures = Figures((), 0, 0, 0)
        self.registry.register(self)

    def exposition(self, figures: Figures) -> bytes:
        self._figures = figures
        return exposition(self.registry)

    def collect(self) -> Iterable[Metric]:
        """Called by the collector registry. The series of a worker that has left are gone, so they do not pile up."""
        figures = self._figures
        dispatched = CounterMetricFamily(
            "fastserve_controller_dispatched", "Requests that got a worker.", labels=["model", "worker"]
        )
        in_flight = GaugeMetricFamily("fastserve_controller_in_flight", "Requests on a worker now.", labels=["worker"])
        breaker_state = GaugeMetricFamily(
            "fastserve_controller_breaker_state",
            "Circuit breaker of a worker: 0 closed, 1 half-open, 2 open.",
            labels=["worker"],
        )
        for worker in figures.workers:
            for model, count in worker.dispatched:
                dispatched.add_metric([model, worker.address], count)
            in_flight.add_metric([worker.address], worker.in_flight)
            breaker_state.add_metric([worker.address], BREAKER_STATES[worker.breaker])
        yield dispatched
        yield in_flight
        yield breaker_state
        # Without a model label: clients can make up any name.
        yield CounterMetricFamily(
            "fastserve_controller_no_worker", "Requests that got no worker.", value=figures.num_refused
        )
        yield CounterMetricFamily(
            "fastserve_controller_breakers_opened",
            "Times that the circuit breaker of a worker opened.",
            value=figures.num_breakers_opened,
        )
        yield GaugeMetricFamily(
            "fastserve_controller_workers", "Workers that take requests.", value=len(figures.workers)
        )
        yield GaugeMetricFamily("fastserve_controller_leases", "Open leases.", value=figures.num_leases)
