"""Output to the terminal. A closed terminal or pipe, or a full disk, never ends the program."""

from __future__ import annotations

import os
import time
from typing import TextIO

from fastserve.observability.lines import escape_controls


class Console:
    """Prints finished lines, and a progress line: rewritten in place on a terminal, else repeated every few seconds.

    No method raises. Control characters, and characters that the stream cannot encode, are written as escapes. After
    the first failed write nothing more is written.
    """

    REPEAT_S = 5.0
    REWRITE_S = 0.2

    def __init__(self, stream: TextIO | None) -> None:
        """`stream` is None if the process was started with it closed."""
        self._stream = stream
        self._rewrites = stream is not None and not stream.closed and stream.isatty()
        self._next_s = time.monotonic() + (0.0 if self._rewrites else self.REPEAT_S)

    def say(self, text: str) -> None:
        """Print one or more finished lines."""
        lines = "\n".join(escape_controls(line) for line in text.split("\n"))
        self._write(f"\r\x1b[K{lines}\n" if self._rewrites else f"{lines}\n")

    def show_progress(self, line: str) -> None:
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + (self.REWRITE_S if self._rewrites else self.REPEAT_S)
        line = escape_controls(line)
        self._write(f"\r\x1b[K{line[: self._width() - 1]}" if self._rewrites else f"{line}\n")

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80 if self._stream is not None else 80
        except (OSError, ValueError):
            return 80

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            encoding = self._stream.encoding or "utf-8"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()
        except (OSError, ValueError):
            _discard(self._stream)
            self._stream = None


def _discard(stream: TextIO) -> None:
    """Redirect a broken stream to the null device, as the interpreter flushes it once more at exit."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        return
