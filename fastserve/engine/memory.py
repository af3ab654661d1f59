"""How much memory this process may still take: the least of what machine, container and its own limits leave.

A container's limit is not to be seen in the machine's figures, and who goes past it is killed without a word. A limit
of the process (RLIMIT_AS, RLIMIT_DATA) counts pages that are promised and not yet touched, such as the KV cache's.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

OUT_OF_MEMORY_EXIT_CODE = 12
"""Of an engine process that found no memory in a step (ENOMEM's number)."""
_MALLOPT = {"trim_threshold": -1, "mmap_threshold": -3, "arena_max": -8}
"""Numbers of options in malloc.h."""
_NO_LIMIT = 1 << 60
"""cgroup v1 says "no limit" by a number of about this size."""


@dataclass(frozen=True, slots=True)
class FreeMemory:
    num_bytes: int
    where: str
    """What sets this bound, in words that end a sentence."""


def free_host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> FreeMemory:
    bounds = [
        FreeMemory(psutil.virtual_memory().available, "on this machine"),
        *_cgroup_bounds(proc, cgroups),
        *_process_bounds(),
        *_commit_bounds(proc),
    ]
    least = min(bounds, key=lambda bound: bound.num_bytes)
    return FreeMemory(max(0, least.num_bytes), least.where)


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


# ---- cgroups ----------------------------------------------------------------------------------------------------


def _cgroup_bounds(proc: Path, mount: Path) -> Iterator[FreeMemory]:
    """Of the group that this process is in and of all groups around it, version 1 and 2."""
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for folder in _groups(mount, path) + _groups(mount / "unified", path):
                yield from _bound(
                    folder, ("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")
                )
        elif "memory" in controllers.split(","):
            for folder in _groups(mount / "memory", path):
                yield from _bound(
                    folder,
                    ("memory.limit_in_bytes",),
                    "memory.usage_in_bytes",
                    ("total_inactive_file", "total_active_file"),
                )


def _groups(mount: Path, path: str) -> list[Path]:
    """The folders of a group and those around it. In a container the path may be the host's, and the mount the group's
    own folder: then only the mount is there."""
    own = mount / path.lstrip("/")
    folders = [own, *own.parents]
    return [folder for folder in folders[: folders.index(mount) + 1] if folder.is_dir()]


def _bound(folder: Path, limits: tuple[str, ...], usage: str, cache: tuple[str, ...]) -> Iterator[FreeMemory]:
    """Free is what the limit leaves, and the pages of files among what is used: these go when memory is wanted."""
    limit = min((_number(folder / name) for name in limits), default=_NO_LIMIT)
    if limit >= _NO_LIMIT:
        return
    stat = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    reclaimable = sum(int(stat.get(name, 0)) for name in cache)
    used = max(0, _number(folder / usage) - reclaimable)
    yield FreeMemory(limit - used, f"under the limit of {limit / 1e9:.2f} GB of this container (cgroup)")


def _number(path: Path) -> int:
    text = _read(path).strip()
    return int(text) if text.isdigit() else _NO_LIMIT  # "max", or not there


# ---- limits of the process and of the whole machine -------------------------------------------------------------


def _process_bounds() -> Iterator[FreeMemory]:
    try:
        import resource
    except ImportError:  # Windows has none
        return
    memory = psutil.Process().memory_info()
    for name, used in (("RLIMIT_AS", memory.vms), ("RLIMIT_DATA", getattr(memory, "data", 0))):
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit != resource.RLIM_INFINITY:
            yield FreeMemory(limit - used, f"under this process's limit of {limit / 1e9:.2f} GB ({name})")


def _commit_bounds(proc: Path) -> Iterator[FreeMemory]:
    """Linux with overcommitment off refuses to promise more than it has."""
    if _read(proc / "sys" / "vm" / "overcommit_memory").strip() != "2":
        return
    info = {
        name: int(rest.split()[0]) * 1024
        for name, _, rest in (line.partition(":") for line in _read(proc / "meminfo").splitlines())
        if name in ("CommitLimit", "Committed_AS")
    }
    yield FreeMemory(info["CommitLimit"] - info["Committed_AS"], "on this machine, which does not overcommit memory")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


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
