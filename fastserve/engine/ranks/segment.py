"""The memory that the ranks of one machine share: slots for exchanges, and each rank's progress while it loads.

It has no name: other ranks inherit a descriptor of it, so nothing stale is left when processes are killed, and the size
of /dev/shm does not matter. Pages of slots take memory once they are written.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import threading

MAX_RANKS = 64
SLOT_BYTES = 64 << 20
"""Address space of one rank's part of an exchange; longer ones take several exchanges."""
# The layout of Header in all_reduce.h.
_HEADER_BYTES = 16384
_LINE_BYTES = 64
_FIRST_RANK = 2 * _LINE_BYTES
_RANK_BYTES = 2 * _LINE_BYTES


class Segment:
    """Must be closed by each process that maps it."""

    def __init__(self, descriptor: int, num_ranks: int, slot_bytes: int = SLOT_BYTES) -> None:
        """Map a segment that `create` has made; the descriptor is owned by this object."""
        self._open = threading.Lock()
        """Held by other threads while they use the map."""
        self.descriptor = descriptor
        self.num_ranks = num_ranks
        self.slot_bytes = slot_bytes
        self._map = mmap.mmap(descriptor, _num_bytes(num_ranks, slot_bytes))
        self._exported = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._exported)
        self._lost = ctypes.c_uint32.from_buffer(self._map)
        self._progress = [
            (ctypes.c_uint64 * 2).from_buffer(self._map, _FIRST_RANK + rank * _RANK_BYTES + _LINE_BYTES)
            for rank in range(num_ranks)
        ]

    @classmethod
    def create(cls, num_ranks: int, slot_bytes: int = SLOT_BYTES) -> Segment:
        """A new segment of zeros. Its descriptor is not inherited by child processes unless they are started so."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("fastserve-ranks", os.MFD_CLOEXEC)
        else:
            descriptor, path = tempfile.mkstemp(prefix="fastserve-ranks-")
            os.unlink(path)
        os.ftruncate(descriptor, _num_bytes(num_ranks, slot_bytes))
        return cls(descriptor, num_ranks, slot_bytes)

    def declare_lost(self) -> None:
        """Have all waits for other ranks, in all processes, fail from now on. Any thread may call it, also later."""
        with self._open:
            if not self._map.closed:
                self._lost.value = 1

    @property
    def is_lost(self) -> bool:
        return bool(self._lost.value)

    def set_progress(self, rank: int, done: int, total: int) -> None:
        progress = self._progress[rank]
        progress[0], progress[1] = done, total

    def progress(self) -> tuple[int, int]:
        """Bytes loaded and to be loaded by all ranks. One that has not begun counts as the largest."""
        done = sum(int(found[0]) for found in self._progress)
        totals = [int(found[1]) for found in self._progress]
        return done, sum(total or max(totals) for total in totals)

    def close(self) -> None:
        """May be called twice. No kernel may use the segment any more."""
        with self._open:
            if self._map.closed:
                return
            del self._exported, self._lost, self._progress
            self._map.close()
            os.close(self.descriptor)


def _num_bytes(num_ranks: int, slot_bytes: int) -> int:
    return _HEADER_BYTES + 2 * num_ranks * slot_bytes
