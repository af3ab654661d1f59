"""The record of one registered worker."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastserve.breaker import Breaker
from fastserve.control.models import Pool
from fastserve.protocol import WorkerStatus


@dataclass(slots=True, eq=False)
class WorkerRecord:
    address: str
    status: WorkerStatus
    check_heart_beat: bool
    last_beat: float
    models: tuple[str, ...] = ()
    """Model names that it is listed with, each once."""
    capabilities: Sequence[str] | None = ()
    """`capabilities` of the status that it is listed with."""
    adapter_list: str = ""
    """Key of the list of adapters that it is listed with."""
    pools: dict[tuple[str, str], Pool] = field(default_factory=dict)
    """Its pools, by model and capability, and by list of adapters and capability."""
    breaker: Breaker = field(default_factory=Breaker)
    probe: str | None = None
    """Lease of the request that serves as its breaker's probe."""
    unleased: int = 0
    """Requests without a lease, as of the last heartbeat."""
    sent_unleased: int = 0
    """Requests sent to it without a lease since the last heartbeat."""
    dispatched: dict[str, int] = field(default_factory=dict)
    """Requests dispatched to it, by model."""
    failed_at: float | None = None
    """Time at which a connection to it failed; None after a sign of life."""
    answered_at: float = -math.inf
    reported_at: float = -math.inf
    wake_at: float = math.inf
    """Time of its next entry in the queue of due checks."""
    row: tuple[object, ...] = ()
    """Values of its last row of the table, besides the speed; the row has changed when the current ones differ."""
    row_speed: float = 0.0
    row_json: bytes | None = None
