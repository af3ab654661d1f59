"""Compiles the kernels once for each machine and source, and keeps them in the user's cache (or see cache_folder.py).

A plain shared library behind a C interface, not a torch extension: it compiles in seconds instead of minutes, needs no
headers of torch, and fits every torch.
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
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastserve.engine.cache_folder import FOLDERS, make_private

if TYPE_CHECKING:
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
SCALARS = {"float32": "float", "bfloat16": "BFloat16", "float16": "_Float16"}
"""C++ types of the kernels, by dtype."""
_libraries: dict[str, ctypes.CDLL | None] = {}
_sharing: list[int] = []
"""Stack of torch's numbers of threads to restore."""
_building = {name: threading.Lock() for name in SCALARS}


def build_ahead(*names: str) -> None:
    """Start building the libraries of these dtypes in the background, while the engine imports and loads."""
    for name in dict.fromkeys(names):
        threading.Thread(target=_cached_library, args=(name,), daemon=True).start()


def cpu_library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels of a dtype for this machine's processors, or None (with a line in the log) where they cannot be
    built. One library for each dtype, so that only those in use are compiled."""
    import torch

    library = _cached_library(str(dtype).removeprefix("torch."))
    if library is not None and not _sharing:
        library.set_threads(torch.get_num_threads())
    return library


@contextmanager
def work_is_shared() -> Iterator[None]:
    """For code whose threads share work: torch uses one thread in each, and the kernels' team is unchanged."""
    import torch

    threads = torch.get_num_threads()
    _sharing.append(threads)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(_sharing.pop())


@contextmanager
def one_thread() -> Iterator[None]:
    """For products of small matrices, where threads wait for each other: torch uses one thread, and so do the kernels
    that this thread calls."""
    import torch

    try:
        with work_is_shared():
            work_alone()
            yield
    finally:
        work_together()
        for library in _loaded():
            library.set_threads(torch.get_num_threads())  # for those that were loaded within the block


def _cached_library(name: str) -> ctypes.CDLL | None:
    if name not in SCALARS:
        return None
    with _building[name]:
        if name not in _libraries:
            _libraries[name] = build_library(name)
    return _libraries[name]


def work_alone() -> None:
    """Make kernels that this thread calls run without the team, for threads that share work."""
    for library in _loaded():
        library.work_alone(1)


def work_together() -> None:
    """Undo `work_alone`."""
    for library in _loaded():
        library.work_alone(0)


def _loaded() -> list[ctypes.CDLL]:
    return [library for library in list(_libraries.values()) if library is not None]


def build_library(name: str) -> ctypes.CDLL | None:
    """Build the library of a dtype, or load it from the cache on disk."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if not found or shutil.which(shlex.split(found)[0]) is None:
        logger.warning("No C++ compiler (g++, clang++) is found: slower torch operations are used.")
        return None
    try:
        return _build(name, shlex.split(found))
    except subprocess.CalledProcessError as error:
        logger.warning("%s does not compile here, slower torch operations are used: %s", _SOURCE.name, error.stderr)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        logger.warning("%s cannot be used, slower torch operations are used instead: %s", _SOURCE.name, error)
    return None


def _build(name: str, compiler: list[str]) -> ctypes.CDLL:
    """Build or load a library in the first folder where that works. Raises OSError if it works in none."""
    troubles: list[str] = []
    for find_folder in FOLDERS:
        try:
            folder = make_private(make_private(find_folder()) / "kernels")
            library = ctypes.CDLL(str(_cached(name, compiler, folder)))
        except OSError as error:
            troubles.append(str(error))
            continue
        if troubles:
            logger.warning(
                "The CPU kernels are kept in %s, since the user's cache cannot be used: %s", folder, troubles[0]
            )
        return library
    raise OSError("; ".join(troubles))


def _cached(name: str, compiler: list[str], folder: Path) -> Path:
    texts = [path.read_bytes() for path in (_SOURCE, *sorted(_SOURCE.parent.glob("*.h")))]
    command = [*compiler, *_FLAGS, f"-DSCALAR={SCALARS[name]}"]
    parts = [*texts, " ".join(command).encode(), _processor()]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()
    library = folder / f"{_SOURCE.stem}-{key[:20]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            subprocess.run(
                [*command, "-o", str(made), str(_SOURCE)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
            )
            # Two engines may build at the same time: the second replaces the file by an equal one.
            made.replace(library)
    return library


def _processor() -> bytes:
    """Processor features that -march=native depends on: machines of different kinds may share a home folder."""
    try:
        with Path("/proc/cpuinfo").open("rb") as file:
            return b"".join(sorted({line for line in file if line.startswith((b"flags", b"Features", b"model name"))}))
    except OSError:
        return platform.processor().encode()
