"""Wakes the engine's loop when a thread has finished something, so that the loop need not look again and again."""

from __future__ import annotations

import contextlib
import socket


class Wakeup:
    """A descriptor that becomes readable with `set`, from any thread."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        return self._reader.fileno()

    def set(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full, thus readable
            self._writer.send(b"\0")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)
