"""How much memory this process may still take, and how the C library keeps and returns it."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from fastserve.host_memory import memory_bounds

OUT_OF_MEMORY_EXIT_CODE = 12
"""Of an engine process that found no memory in a step (ENOMEM's number)."""
_MALLOPT = {"trim_threshold": -1, "mmap_threshold": -3, "arena_max": -8}
"""Numbers of options in malloc.h."""


@dataclass(frozen=True, slots=True)
class FreeMemory:
    num_bytes: int
    where: str
    """What sets this bound, in words that end a sentence."""


def free_host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> FreeMemory:
    """The least of what machine, container and limits of the process leave."""
    least = min(memory_bounds(proc, cgroups), key=lambda bound: bound.free_bytes)
    return FreeMemory(max(0, least.free_bytes), least.where)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this, or what it came from, says that there is no memory. On a CPU torch knows no class for it."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    text = str(error).lower()
    if isinstance(error, RuntimeError | OSError | ImportError) and (
        text in _NO_MEMORY_WHOLE or any(words in text for words in _NO_MEMORY)
    ):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


_NO_MEMORY = (
    "not enough memory",  # torch on a CPU
    "out of memory",  # torch.OutOfMemoryError of CUDA and XPU; oneDNN
    "cannot allocate memory",  # the C library
    "can't allocate memory",
    "failed to map segment",  # the loader of shared libraries
    "std::bad_alloc",
    "unable to mmap",  # torch and safetensors reading files
    "can't start new thread",  # a thread's stack is memory too
)
_NO_MEMORY_WHOLE = ("could not create a primitive", "could not execute a primitive")
"""oneDNN's words, which it has for nothing else: what it does not support it says of a descriptor."""


def use_one_heap() -> None:
    """For all threads, to be said before there are others. Each heap of glibc's reserves 64 MB of addresses, which
    limits on them count, and keeps what its thread has freed."""
    _set_malloc(arena_max=1)


def begin_loading() -> None:
    """Have the C library give large blocks back to the system as soon as they are freed. Left alone, glibc soon keeps
    them for later, and what a checkpoint was read into lies between the weights for good."""
    _set_malloc(mmap_threshold=1 << 18)


def end_loading() -> None:
    """Give back what was freed, and keep from now on what each step takes and frees again."""
    _set_malloc(mmap_threshold=32 << 20, trim_threshold=128 << 20)
    return_freed_memory()


def return_freed_memory() -> None:
    """Give the system back what the C library keeps of freed memory."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _set_malloc(**sizes: int) -> None:
    """Options of glibc's mallopt; other C libraries have none, or others."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for name, size in sizes.items():
            mallopt(_MALLOPT[name], size)
