"""Reads adapters and puts them on the devices of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastserve.engine.adapters.manager import AdapterShape
from fastserve.engine.adapters.memory import AdapterMemory
from fastserve.engine.adapters.reading import AdapterReader, HostAdapter
from fastserve.engine.ranks.executor import Send
from fastserve.engine.ranks.messages import AdapterPart, ClearAdapter, PlaceAdapter


class DeviceStore:
    """An `AdapterStore` (manager.py). Rank 0 alone reads; the others get their parts when a place is given to them."""

    def __init__(self, reader: AdapterReader, memory: AdapterMemory, send: Send | None = None) -> None:
        """`send`: sends commands to the other ranks, if there are any."""
        self._reader = reader
        self._memory = memory
        self._send = send

    @property
    def num_slots(self) -> int:
        return self._memory.num_slots

    def begin_reading(self) -> None:
        """Torch's threads of a second caller would wait for the cores of those that compute the step."""
        torch.set_num_threads(1)

    def inspect(self, path: str) -> AdapterShape:
        return self._reader.inspect(path)

    def read(self, path: str, shape: AdapterShape) -> list[HostAdapter]:
        return self._reader.read(path, shape)

    def place(self, slot: int, host: Sequence[HostAdapter], block_ids: list[int]) -> None:
        own, *others = host
        if self._send is not None:
            for rank, part in enumerate(others, 1):
                self._send(PlaceAdapter(slot, block_ids, _to_bytes(part)), rank)
        self._memory.place(slot, own, block_ids)

    def clear(self, slot: int) -> None:
        if self._send is not None:
            self._send(ClearAdapter(slot))
        self._memory.clear(slot)


def place_part(memory: AdapterMemory, message: PlaceAdapter) -> None:
    """Put the part of a rank other than 0 on its device."""
    part = message.part
    tiles = torch.frombuffer(bytearray(part.tiles), dtype=memory.dtype).view(-1, memory.tile_size)
    tables = (np.array(table, dtype=np.int32) for table in (part.first_tile, part.rank_groups))
    memory.place(message.slot, HostAdapter(tiles, *tables), message.block_ids)


def _to_bytes(part: HostAdapter) -> AdapterPart:
    tiles = part.tiles.flatten().view(torch.uint8).numpy().tobytes()
    return AdapterPart(tiles, part.first_tile.tolist(), part.rank_groups.tolist())
