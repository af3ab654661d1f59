"""Memory for packed weights, in the system's huge pages where it has them.

Reading them takes fewer look-ups of addresses, and getting them fewer faults. A huge page lies at a multiple of its
size and in one mapping, so tensors are cut from such mappings, and what is left of one is for the next small tensors.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_HUGE_PAGE = 1 << 21
_HAS_HUGE_PAGES = sys.platform == "linux" and hasattr(mmap, "MADV_HUGEPAGE")
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if _HAS_HUGE_PAGES else 0
_MAPPING = 2 * _HUGE_PAGE
_SMALL = 1 << 16
"""Bytes of a tensor that is left to the C library."""
_ALIGNED = 64
_MOST_OPEN = 4


Bytes = npt.NDArray[np.uint8]


def map_bytes(size: int) -> Bytes:
    """Zeros in a mapping of their own, which goes with the last array that looks at it. Raises OSError where there is
    no room."""
    if size < _HUGE_PAGE or not _HAS_HUGE_PAGES:
        return np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
    # Python's own mappings begin anywhere and end nowhere before they are closed, so room to align them would stay.
    libc = _libc()
    length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    start = libc.mmap(None, length + _HUGE_PAGE, mmap.PROT_READ | mmap.PROT_WRITE, _PRIVATE, -1, 0)
    if start == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    before = -start % _HUGE_PAGE
    first = start + before
    if before:
        libc.munmap(start, before)
    libc.munmap(first + length, _HUGE_PAGE - before)
    libc.madvise(first, length, mmap.MADV_HUGEPAGE)
    memory = (ctypes.c_uint8 * size).from_address(first)
    weakref.finalize(memory, libc.munmap, first, length).atexit = False
    return np.ctypeslib.as_array(memory)


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


class _Mapping:
    """Zeros that are handed out once, from the beginning to the end. Tensors keep it alive."""

    def __init__(self, size: int) -> None:
        self._left = map_bytes(size)

    @property
    def room(self) -> int:
        return len(self._left)

    def take(self, size: int) -> torch.Tensor:
        taken, self._left = self._left[:size], self._left[-(-size // _ALIGNED) * _ALIGNED :]
        return torch.from_numpy(taken)


_open: list[_Mapping] = []
"""Those with room left."""
_lock = threading.Lock()


def zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """On the CPU; pages are taken from the system when they are written to."""
    return _zero_bytes(math.prod(shape) * dtype.itemsize).view(dtype).view(tuple(shape))


def _zero_bytes(size: int) -> torch.Tensor:
    if size >= _SMALL and _HAS_HUGE_PAGES:
        try:
            return _take(size)
        except OSError:  # there may still be room for the tensor alone
            close_mappings()
    return untouched_zeros((size,), torch.uint8)


def untouched_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """On the CPU, in common pages. The memory is taken when it is written, not now, as with torch's zeros: numpy leaves
    pages untouched that it gets as zeros."""
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(tuple(shape))


def close_mappings() -> None:
    """What is left of them is not handed out: they go with the tensors that are in them."""
    with _lock:
        _open.clear()


def _take(size: int) -> torch.Tensor:
    with _lock:
        mapping = next((one for one in _open if one.room >= size), None)
        if mapping is None:
            mapping = _Mapping(max(_MAPPING, -(-size // _HUGE_PAGE) * _HUGE_PAGE))
            _open.append(mapping)
        taken = mapping.take(size)
        _open.sort(key=lambda one: one.room)
        while _open and (len(_open) > _MOST_OPEN or _open[0].room < _SMALL):
            del _open[0]
        return taken
