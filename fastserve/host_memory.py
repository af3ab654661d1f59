"""Limits on this process's memory: of the machine, of its containers (cgroups), and of the process itself.

A container's limit does not show in the machine's figures, and a process that exceeds it is killed without warning. A
process limit (RLIMIT_AS, RLIMIT_DATA) counts memory that is allocated but not yet touched, such as the KV cache's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_NO_LIMIT = 1 << 60
"""Bytes: cgroup v1 reports about this number for "no limit"."""


@dataclass(frozen=True, slots=True)
class MemoryBound:
    free_bytes: int
    """Negative if more is used than the limit allows."""
    limit_bytes: int
    where: str
    """Origin of the limit, worded as the end of a sentence."""


def memory_bounds(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> list[MemoryBound]:
    machine = psutil.virtual_memory()
    return [
        MemoryBound(machine.available, machine.total, "on this machine"),
        *_cgroup_bounds(proc, cgroups),
        *_process_bounds(),
        *_commit_bounds(proc),
    ]


# ---- cgroups ----------------------------------------------------------------------------------------------------


def _cgroup_bounds(proc: Path, mount: Path) -> Iterator[MemoryBound]:
    """Limits of this process's cgroup and of all its parents, versions 1 and 2."""
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
    """The folders of a cgroup and its parents. In a container the path may be the host's while the mount is the
    cgroup's own folder; then only the mount exists."""
    own = mount / path.lstrip("/")
    folders = [own, *own.parents]
    return [folder for folder in folders[: folders.index(mount) + 1] if folder.is_dir()]


def _bound(folder: Path, limits: tuple[str, ...], usage: str, cache: tuple[str, ...]) -> Iterator[MemoryBound]:
    """Limit and free bytes of one cgroup. The page cache counts as free, as the kernel reclaims it when needed."""
    limit = min((_number(folder / name) for name in limits), default=_NO_LIMIT)
    if limit >= _NO_LIMIT:
        return
    stat = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    reclaimable = sum(int(stat.get(name, 0)) for name in cache)
    used = max(0, _number(folder / usage) - reclaimable)
    yield MemoryBound(limit - used, limit, f"under the limit of {limit / 1e9:.2f} GB of this container (cgroup)")


def _number(path: Path) -> int:
    text = _read(path).strip()
    return int(text) if text.isdigit() else _NO_LIMIT  # "max", or no such file


# ---- limits of the process and of the whole machine -------------------------------------------------------------


def _process_bounds() -> Iterator[MemoryBound]:
    try:
        import resource
    except ImportError:  # Windows has none
        return
    memory = psutil.Process().memory_info()
    for name, used in (("RLIMIT_AS", memory.vms), ("RLIMIT_DATA", getattr(memory, "data", 0))):
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit != resource.RLIM_INFINITY:
            yield MemoryBound(limit - used, limit, f"under this process's limit of {limit / 1e9:.2f} GB ({name})")


def _commit_bounds(proc: Path) -> Iterator[MemoryBound]:
    """The commit limit of Linux, which applies if overcommit is off (mode 2)."""
    if _read(proc / "sys" / "vm" / "overcommit_memory").strip() != "2":
        return
    info = {
        name: int(rest.split()[0]) * 1024
        for name, _, rest in (line.partition(":") for line in _read(proc / "meminfo").splitlines())
        if name in ("CommitLimit", "Committed_AS")
    }
    limit = info["CommitLimit"]
    yield MemoryBound(limit - info["Committed_AS"], limit, "on this machine, which does not overcommit memory")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
