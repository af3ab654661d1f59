"""Prometheus metrics. Each process creates one registry and passes it on; nothing is registered globally."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["CONTENT_TYPE", "LATENCY_BUCKETS_S", "CollectorRegistry", "Counter", "Gauge", "Histogram", "exposition"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


def exposition(registry: CollectorRegistry) -> bytes:
    """Body of `/metrics`, of content type CONTENT_TYPE."""
    return generate_latest(registry)
