"""Fixtures of the controller's tests: a manual clock, a registry, and workers' statuses."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from fastserve.control.registry import RegistryLimits, WorkerRegistry
from fastserve.protocol import WorkerStatus


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


LIMITS = RegistryLimits(max_workers=10_000, max_model_names=1_000, max_leases=100_000, model_memory_s=600.0)


@pytest.fixture
def make_registry(clock: Clock) -> Callable[..., WorkerRegistry]:
    def make(
        dispatch_method: str = "shortest_queue", heartbeat_expiration_s: float = 90.0, **limits: float
    ) -> WorkerRegistry:
        return WorkerRegistry(
            dispatch_method=dispatch_method,
            heartbeat_expiration_s=heartbeat_expiration_s,
            limits=replace(LIMITS, **limits),  # type: ignore[arg-type]
            clock=clock,
            rng=random.Random(0),
        )

    return make


@pytest.fixture
def registry(make_registry: Callable[..., WorkerRegistry]) -> WorkerRegistry:
    return make_registry()


@pytest.fixture
def status() -> Callable[..., WorkerStatus]:
    """Make statuses of a fastserve worker that serves "m" and has a lease for each request except `others`."""

    def make(*leases: str, models: tuple[str, ...] = ("m",), others: int = 0, **fields: object) -> WorkerStatus:
        values: dict[str, object] = {
            "model_names": list(models),
            "leases": list(leases),
            "queue_length": len(leases) + others,
            "heartbeat_interval_s": 1.0,
        }
        return WorkerStatus.model_validate(values | fields)

    return make
