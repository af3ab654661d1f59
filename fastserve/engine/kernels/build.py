"""Compiles a kernel once for each machine and source, and keeps it in the user's cache.

A plain shared library behind a C interface, not a torch extension: it compiles in two seconds instead of forty, needs
no headers of torch, and fits every torch. It uses the OpenMP runtime that torch has loaded already.
"""

from __future__ import annotations

import ctypes
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

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_TIMEOUT_S = 120
DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""How the kernels are told of a dtype."""


def load_kernel(name: str) -> ctypes.CDLL | None:
    """The library made from `name`.cpp, or None (with a line in the log) where it cannot be built or loaded."""
    source = Path(__file__).with_name(f"{name}.cpp")
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if not found:
        logger.warning("No C++ compiler (g++, clang++) is installed: slower torch operations are used.")
        return None
    try:
        library = _cached(source, shlex.split(found))
        return ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        logger.warning("%s does not compile here, slower torch operations are used: %s", source.name, error.stderr)
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        logger.warning("%s cannot be used, slower torch operations are used instead: %s", source.name, error)
    return None


def _cached(source: Path, compiler: list[str]) -> Path:
    texts = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
    parts = [*texts, " ".join([*compiler, *_FLAGS]).encode(), _processor()]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "fastserve" / "kernels"
    library = folder / f"{source.stem}-{key[:20]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            subprocess.run(
                [*compiler, *_FLAGS, "-o", str(made), str(source)],
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
