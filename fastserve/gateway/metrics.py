"""The API server's metrics."""

from __future__ import annotations

from fastserve.observability.metrics import LATENCY_BUCKETS_S, CollectorRegistry, Counter, Gauge, Histogram


class GatewayMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "fastserve_gateway_requests",
            "Requests that have ended; status 499 is a client that went away before the end",
            ["route", "status"],
            registry=registry,
        )
        self.in_flight = Gauge("fastserve_gateway_requests_in_flight", "Requests being answered", registry=registry)
        self.retries = Counter(
            "fastserve_gateway_retries", "Requests handed to another worker, unseen by the client", registry=registry
        )
        self.retries_denied = Counter(
            "fastserve_gateway_retries_denied", "Retries that the retry budget did not allow", registry=registry
        )
        self.worker_failures = Counter(
            "fastserve_gateway_worker_failures",
            "Attempts at workers that failed: refused or connect (no connection), lost (it broke), cut (a stream "
            "without its end), timeout (silent), frozen (no heartbeats), invalid (no answer of OpenAI's), error (5xx)",
            ["kind"],
            registry=registry,
        )
        self.bad_table_rows = Counter(
            "fastserve_gateway_bad_table_rows",
            "Rows of the controller's table that were left out because they were not valid",
            registry=registry,
        )
        self.broken_streams = Counter(
            "fastserve_gateway_broken_streams", "Streams that had to end with an error event", registry=registry
        )
        self.time_to_first_token = Histogram(
            "fastserve_gateway_time_to_first_token_seconds",
            "From the request to the first data event of its stream",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.duration = Histogram(
            "fastserve_gateway_request_duration_seconds",
            "From the request to the end of its answer",
            ["route"],
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
