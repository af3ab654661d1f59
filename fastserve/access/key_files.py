"""Files that hold keys: read with bounds, looked at for who else may read them, and read again when they change."""

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
    """The lines of a file of keys, without comments and empty ones; `flag` names it in errors.

    Raises StartupError when the file cannot be read.
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
    """Log a warning when users other than the owner may read the file."""
    try:
        mode = stat.S_IMODE(Path(path).stat().st_mode)
    except OSError:
        return  # whoever reads it next says why it cannot be read
    if os.name == "posix" and mode & 0o077:
        logger.warning("%s %s can be read by other users (mode %04o): `chmod 600 %s`.", flag, path, mode, path)


class Reloadable(Generic[ValueT]):
    """A value that is read from a file, and again when the file has changed."""

    def __init__(self, read: Callable[[], ValueT], path: str | None, flag: str = "") -> None:
        """`read` raises StartupError, here too. Without a `path` the value stays as it is."""
        self._read = read
        self._flag = flag
        self.path = path
        self._seen = self._signature()
        self.value = read()
        if path is not None:
            warn_if_readable(path, flag)

    def refresh(self, *, force: bool = False) -> None:
        """Read the file again if it has changed, or in any case. What cannot be read changes nothing but the log.

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
    """For the time of the block, look at the values' files each second, and read them at once on SIGHUP."""
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
