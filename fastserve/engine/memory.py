"""Free memory of this process, and settings of the C library's allocator."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from fastserve.host_memory import memory_bounds

OUT_OF_MEMORY_EXIT_CODE = 12
"""Exit code of an engine process that ran out of memory in a step (ENOMEM's number)."""
_MALLOPT = {"trim_threshold": -1, "mmap_threshold": -3, "arena_max": -8}
"""Numbers of options in malloc.h."""


@dataclass(frozen=True, slots=True)
class FreeMemory:
    num_bytes: int
    where: str
    """Source of this bound, worded to end a sentence: "on the GPU cuda:0"."""


def free_host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> FreeMemory:
    """The tightest bound among those of machine, container and process."""
    tightest = min(memory_bounds(proc, cgroups), key=lambda bound: bound.free_bytes)
    return FreeMemory(max(0, tightest.free_bytes), tightest.where)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error or one of its causes means that memory ran out. torch has no class for it on CPUs."""
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
"""oneDNN's whole message when memory runs out; for unsupported operations its messages name a descriptor."""


def use_one_heap() -> None:
    """Use one heap for all threads; call it before others start. Each glibc heap reserves 64 MB of address space, which
    counts towards limits, and keeps what its thread has freed."""
    _set_malloc(arena_max=1)


def begin_loading() -> None:
    """Have the C library return large blocks to the system as soon as they are freed. By default glibc soon keeps them,
    and buffers that a checkpoint was read into stay between the weights for good. Smaller ones are used again, since
    each new page costs more than the work on it; `return_freed_memory` returns what is left of them."""
    _set_malloc(mmap_threshold=4 << 20, trim_threshold=16 << 20)


def end_loading() -> None:
    """Return freed memory to the system, and from now on keep what each step allocates and frees."""
    # Model and libraries live as long as the process. The garbage collector would stop a step for a fifth of a second
    # now and then to traverse them, and the end of the process for two seconds.
    gc.collect()
    gc.freeze()
    _set_malloc(mmap_threshold=32 << 20, trim_threshold=128 << 20)
    return_freed_memory()


def return_freed_memory() -> None:
    """Return the freed memory that the C library keeps to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _set_malloc(**sizes: int) -> None:
    """Options of glibc's mallopt; other C libraries have none, or others."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for name, size in sizes.items():
            mallopt(_MALLOPT[name], size)
