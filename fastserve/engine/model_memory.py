"""The memory of a model on the CPU that can be given back to the system: of its KV cache, and of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fastserve.engine.attention.backend import KVCache
from fastserve.engine.huge_pages import DROPS_PAGES, drop_pages
from fastserve.engine.loading.weight_table import WeightTable
from fastserve.engine.memory import return_freed_memory
from fastserve.engine.occupation import MemoryTag


class ModelMemory:
    """An `EngineMemory`."""

    def __init__(self, caches: Sequence[KVCache], table: WeightTable, refusals: Mapping[MemoryTag, str | None]) -> None:
        """`refusals`: see EngineMemory.refusal."""
        self._caches = caches
        self._table = table
        self._refusals = refusals

    def refusal(self, tag: MemoryTag) -> str | None:
        if not DROPS_PAGES or any(tensor.device.type != "cpu" for tensor in self._tensors(tag)):
            return "memory is given back by engines on CPUs under Linux alone: elsewhere, stop the worker instead."
        return self._refusals[tag]

    def release(self, tag: MemoryTag) -> int:
        num_bytes = sum(drop_pages(tensor) for tensor in self._tensors(tag))
        return_freed_memory()
        return num_bytes

    def _tensors(self, tag: MemoryTag) -> list[torch.Tensor]:
        if tag == "kv_cache":
            return [tensor for cache in self._caches for tensor in cache]
        slots = dict.fromkeys(slot for name in self._table.names() for slot in self._table.slots(name))
        found = [tensor for slot in slots for tensor in slot.tensors()]
        return list({tensor.data_ptr(): tensor for tensor in found}.values())
