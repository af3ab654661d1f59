"""Key files: bounded reads, a warning if other users may read them, and a reload when they change."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import stat
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from fastserve.errors import StartupError

logger = logging.getLogger(__name__)

ValueT = TypeVar("ValueT")

POLL_INTERVAL_S = 1.0
MAX_FILE_BYTES = 1024 * 1024


def read_lines(path: str, flag: str) -> list[str]:
    """The lines of a key file without comments and empty lines; `flag` names the file in errors.

    Raises StartupError if the file cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise StartupError(f"{flag} {path} cannot be read: {reason}.") from error
    if len(content) > MAX_FILE_BYTES:
        raise StartupError(f"{flag} {path} is larger than {MAX_FILE_BYTES} bytes.")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def warn_if_readable(path: str, flag: str) -> None:
    """Log a warning if users other than the owner may read the file."""
    try:
        mode = stat.S_IMODE(Path(path).stat().st_mode)
    except OSError:
        return  # the read that follows reports the error
    if os.name == "posix" and mode & 0o077:
        logger.warning("%s %s can be read by other users (mode %04o): `chmod 600 %s`.", flag, path, mode, path)


class Reloadable(Generic[ValueT]):
    """A value read from a file, and read again when the file changes."""

    def __init__(self, read: Callable[[], ValueT], path: str | None, flag: str = "") -> None:
        """Calls `read`, which may raise StartupError. Without a `path` the value never changes."""
        self._read = read
        self._flag = flag
        self.path = path
        self._seen = self._signature()
        self.value = read()
        if path is not None:
            warn_if_readable(path, flag)

    def refresh(self, *, force: bool = False) -> None:
        """Read the file again if it has changed, or if `force`. If that fails, log it and keep the value.

        Blocks on the file system.
        """
        signature = self._signature()
        if self.path is None or (signature == self._seen and not force):
            return
        self._seen = signature
        try:
            value = self._read()
        except StartupError as error:
            logger.error("%s The keys read before stay valid.", error.message)
            return
        if value != self.value:
            self.value = value
            logger.info("%s %s has been read again.", self._flag, self.path)

    def _signature(self) -> tuple[int, ...] | None:
        if self.path is None:
            return None
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


@asynccontextmanager
async def reloading(*values: Reloadable[Any]) -> AsyncIterator[None]:
    """Inside the block, check the values' files for changes every second, and read them at once on SIGHUP."""
    watched = [value for value in values if value.path is not None]
    if not watched:
        yield
        return
    loop = asyncio.get_running_loop()
    hangup = asyncio.Event()
    has_signal = hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread()
    if has_signal:
        loop.add_signal_handler(signal.SIGHUP, hangup.set)
    task = asyncio.create_task(_watch(watched, hangup))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if has_signal:
            loop.remove_signal_handler(signal.SIGHUP)


async def _watch(values: list[Reloadable[Any]], hangup: asyncio.Event) -> None:
    while True:
        try:
            async with asyncio.timeout(POLL_INTERVAL_S):
                await hangup.wait()
        except TimeoutError:
            pass
        force = hangup.is_set()
        hangup.clear()
        for value in values:
            await asyncio.to_thread(value.refresh, force=force)
