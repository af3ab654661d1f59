"""Adapters for tests of the scheduler: they take no blocks, and have been read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastserve.engine.adapters.manager import AdapterManager, AdapterShape
from fastserve.engine.kv_cache import BlockPool
from fastserve.engine.settings import AdapterOptions


class WeightlessStore:
    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots

    def begin_reading(self) -> None:
        pass

    def inspect(self, path: str) -> AdapterShape:
        return AdapterShape(rank=8, targets=(), num_bytes=0, num_blocks=0)

    def read(self, path: str, shape: AdapterShape) -> Any:
        return path

    def place(self, slot: int, host: Any, block_ids: list[int]) -> None:
        pass

    def clear(self, slot: int) -> None:
        pass


def weightless_adapters(pool: BlockPool, names: Sequence[str]) -> AdapterManager:
    """A manager of these adapters, all of which may run at once."""
    count = len(names)
    options = AdapterOptions(modules=tuple((name, name) for name in names), max_loras=count, max_cpu_loras=count)
    manager = AdapterManager(WeightlessStore(count + 1), options, pool)
    for name in names:
        adapter = manager.find(name)
        assert adapter is not None
        manager._keep(adapter, name)
    return manager
