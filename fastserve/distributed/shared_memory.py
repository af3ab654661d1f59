"""Whether this machine's shared memory is large enough for ranks that exchange tensors through it."""

from __future__ import annotations

import os

MIN_BYTES = 512 * 2**20
"""NCCL and torch's loaders take more than a container's default of 64 MiB; they fail with a bus error without it."""


def small_shared_memory(num_ranks: int, folder: str = "/dev/shm") -> str | None:
    """A warning with its remedy if `num_ranks` on this machine have too little shared memory, else None."""
    if num_ranks < 2 or not os.path.isdir(folder):
        return None
    status = os.statvfs(folder)
    size = status.f_frsize * status.f_blocks
    if size >= MIN_BYTES:
        return None
    return (
        f"{folder} has {size // 2**20} MiB, and {num_ranks} ranks on GPUs exchange tensors through it: they may end "
        "with 'Bus error: nonexistent physical address'. With docker add --shm-size=2g; in Kubernetes mount an "
        "emptyDir with medium: Memory and sizeLimit: 2Gi at /dev/shm."
    )
