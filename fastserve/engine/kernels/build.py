"""Compiles the kernels once for each machine and source, and keeps them in the user's cache.

A plain shared library behind a C interface, not a torch extension: it compiles in seconds instead of minutes, needs no
headers of torch, and fits every torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("cpu.cpp")
_FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-pthread",
    "-shared",
    "-fPIC",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
)
_TIMEOUT_S = 120
SCALARS = {torch.float32: "float", torch.bfloat16: "BFloat16", torch.float16: "_Float16"}
"""What the kernels call a dtype."""


@functools.cache
def cpu_library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for this machine's processors and a dtype, or None (with a line in the log) where they cannot be
    built. One library for each dtype: nobody waits for the compilation of what is not used."""
    library = build_library(dtype)
    if library is not None:
        library.set_threads(torch.get_num_threads())
    return library


def build_library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The same, looked for anew."""
    if dtype not in SCALARS:
        return None
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if not found:
        logger.warning("No C++ compiler (g++, clang++) is installed: slower torch operations are used.")
        return None
    try:
        return ctypes.CDLL(str(_cached(dtype, shlex.split(found))))
    except subprocess.CalledProcessError as error:
        logger.warning("%s does not compile here, slower torch operations are used: %s", _SOURCE.name, error.stderr)
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        logger.warning("%s cannot be used, slower torch operations are used instead: %s", _SOURCE.name, error)
    return None


def _cached(dtype: torch.dtype, compiler: list[str]) -> Path:
    texts = [path.read_bytes() for path in (_SOURCE, *sorted(_SOURCE.parent.glob("*.h")))]
    command = [*compiler, *_FLAGS, f"-DSCALAR={SCALARS[dtype]}"]
    parts = [*texts, " ".join(command).encode(), _processor()]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "fastserve" / "kernels"
    library = folder / f"{_SOURCE.stem}-{key[:20]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            subprocess.run(
                [*command, "-o", str(made), str(_SOURCE)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
            )
            # Two engines may build at the same time; whoever comes second replaces a file by an equal one.
            made.replace(library)
    return library


def _processor() -> bytes:
    """What -march=native depends on: a cache on a shared home must not serve another kind of machine."""
    try:
        with Path("/proc/cpuinfo").open("rb") as file:
            return b"".join(sorted({line for line in file if line.startswith((b"flags", b"Features", b"model name"))}))
    except OSError:
        return platform.processor().encode()
