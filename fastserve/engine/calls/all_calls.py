"""The calls that every engine knows."""

from __future__ import annotations

from typing import Any

from fastserve.engine.calls import adapters, pause, profile, reset_prefix_cache, weights
from fastserve.engine.calls.handling import CallHandler

ALL_CALLS: tuple[CallHandler[Any, Any], ...] = (
    *reset_prefix_cache.HANDLERS,
    *pause.HANDLERS,
    *profile.HANDLERS,
    *adapters.HANDLERS,
    *weights.HANDLERS,
)
