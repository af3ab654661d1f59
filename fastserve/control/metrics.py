"""The controller's metrics."""

from __future__ import annotations

from fastserve.observability.metrics import CollectorRegistry, Counter, Gauge, exposition
from fastserve.protocol import RoutingTable


class ControlMetrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.dispatched = Counter(
            "fastserve_controller_dispatched",
            "Requests that got a worker.",
            ["model", "worker"],
            registry=self._registry,
        )
        # Not by model: a name that nobody serves is whatever a client made up.
        self.no_worker = Counter(
            "fastserve_controller_no_worker", "Requests that got no worker.", registry=self._registry
        )
        self._workers = Gauge("fastserve_controller_workers", "Workers that take requests.", registry=self._registry)
        self._in_flight = Gauge(
            "fastserve_controller_in_flight", "Requests on a worker now.", ["worker"], registry=self._registry
        )

    def count(self, model: str, address: str) -> None:
        """A request for `model` was sent to the worker at `address`; "" when there was none."""
        if address:
            self.dispatched.labels(model, address).inc()
        else:
            self.no_worker.inc()

    def exposition(self, table: RoutingTable) -> bytes:
        self._workers.set(len(table.workers))
        self._in_flight.clear()
        for worker in table.workers:
            self._in_flight.labels(worker.address).set(worker.in_flight)
        return exposition(self._registry)
