"""Reads adapters and puts them on one device."""

from __future__ import annotations

from fastserve.engine.adapters.manager import AdapterShape
from fastserve.engine.adapters.memory import AdapterMemory
from fastserve.engine.adapters.reading import AdapterReader, HostAdapter


class DeviceStore:
    """An `AdapterStore` (manager.py)."""

    def __init__(self, reader: AdapterReader, memory: AdapterMemory) -> None:
        self._reader = reader
        self._memory = memory

    @property
    def num_slots(self) -> int:
        return self._memory.num_slots

    def inspect(self, path: str) -> AdapterShape:
        return self._reader.inspect(path)

    def read(self, path: str, shape: AdapterShape) -> HostAdapter:
        return self._reader.read(path, shape)

    def place(self, slot: int, host: HostAdapter, block_ids: list[int]) -> None:
        self._memory.place(slot, host, block_ids)

    def clear(self, slot: int) -> None:
        self._memory.clear(slot)
