"""Memory for packed weights, in the operating system's huge pages where it has them.

Huge pages cause fewer TLB misses and page faults. A huge page is aligned to its size and belongs to one mapping, so
tensors are cut from aligned mappings, and the rest of a mapping is used for the next small tensors.
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
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_HUGE_PAGE = 1 << 21
_HAS_HUGE_PAGES = sys.platform == "linux" and hasattr(mmap, "MADV_HUGEPAGE")
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if _HAS_HUGE_PAGES else 0
_MAPPING = 2 * _HUGE_PAGE
_SMALL = 1 << 16
"""Bytes of a tensor below which the C library allocates it."""
_ALIGNED = 64
_MAX_OPEN = 4
"""Mappings with room left that are kept for later tensors."""


DROPS_PAGES = sys.platform == "linux"
_MADV_DONTNEED, _MADV_FREE = 4, 8
Bytes = npt.NDArray[np.uint8]


def map_bytes(size: int) -> Bytes:
    """Zeros in a mapping of their own, which is unmapped with the last array that refers to it. Raises OSError when
    there is not enough memory."""
    if size < _HUGE_PAGE or not _HAS_HUGE_PAGES:
        return np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
    # Python's own mappings cannot be trimmed, so the extra bytes needed to align one would stay mapped.
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
    """Zeros that are handed out from the beginning to the end, each part once. Tensors keep it alive."""

    def __init__(self, size: int) -> None:
        self._left = map_bytes(size)

    @property
    def room(self) -> int:
        return len(self._left)

    def take(self, size: int) -> torch.Tensor:
        taken, self._left = self._left[:size], self._left[-(-size // _ALIGNED) * _ALIGNED :]
        return torch.from_numpy(taken)


_open: list[_Mapping] = []
"""Mappings with room left."""
_lock = threading.Lock()


def zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A zero tensor on the CPU, in huge pages if it is large. Physical memory is allocated on the first write."""
    return _zero_bytes(math.prod(shape) * dtype.itemsize).view(dtype).view(tuple(shape))


def _zero_bytes(size: int) -> torch.Tensor:
    if size >= _SMALL and _HAS_HUGE_PAGES:
        try:
            return _take(size)
        except OSError:  # there may still be room for the tensor alone
            close_mappings()
    return untouched_zeros((size,), torch.uint8)


def untouched_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A zero tensor on the CPU, in normal pages. Physical memory is allocated on the first write: unlike torch, numpy
    does not write zeros to pages that the system hands out as zeros."""
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(tuple(shape))


def drop_pages(tensor: torch.Tensor) -> int:
    """Give the physical memory of a tensor on the CPU back to the system, and return its bytes. The tensor keeps its
    address, and its values are zeros or undefined; pages that it shares with others stay. Linux only (DROPS_PAGES)."""
    if tensor.untyped_storage().filename is not None:  # the system takes pages of files back by itself
        return 0
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size: int = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - begin
    if size <= 0 or not tensor.is_contiguous() or _libc().madvise(begin, size, _MADV_DONTNEED):
        return 0
    return size


def offer_pages(tensors: Iterable[torch.Tensor]) -> None:
    """Let the system take the physical memory of contiguous tensors on the CPU when it needs some. They keep their
    addresses; their values are undefined. Writing to what was not taken costs no page faults."""
    if not DROPS_PAGES:
        return
    ranges: list[tuple[int, int]] = []  # neighbours are joined, since parts of a huge page would divide it
    for begin, size in sorted((tensor.data_ptr(), tensor.nbytes) for tensor in tensors):
        if ranges and begin - ranges[-1][1] <= _ALIGNED:
            ranges[-1] = (ranges[-1][0], begin + size)
        else:
            ranges.append((begin, begin + size))
    for begin, end in ranges:
        first = -(-begin // _HUGE_PAGE) * _HUGE_PAGE
        size = end // _HUGE_PAGE * _HUGE_PAGE - first
        if size > 0:
            _libc().madvise(first, size, _MADV_FREE)


def close_mappings() -> None:
    """Hand out nothing more from open mappings: each is then unmapped with its last tensor."""
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
        while _open and (len(_open) > _MAX_OPEN or _open[0].room < _SMALL):
            del _open[0]
        return taken
