"""Logging: one format on standard error for our lines and uvicorn's (`time | level | logger | message`)."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from logging.handlers import TimedRotatingFileHandler
from pathlib import Path

from fastserve.errors import StartupError
from fastserve.observability.lines import escape_controls
from fastserve.observability.private_files import FOLDER_MODE, open_for_append, reason

FORMAT = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
MAX_LOG_DAYS = 14
"""Days that files in LOGDIR are kept."""


class OneLineFormatter(logging.Formatter):
    """Writes each record as one line, with control characters from outside input escaped. A traceback follows on
    indented lines, so that none of them can look like a record."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escape_controls(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:
        text = super().formatException(ei)  # type: ignore[arg-type]
        return "\n".join("    " + escape_controls(line) for line in text.split("\n"))


class PrivateDailyFile(TimedRotatingFileHandler):
    """A log file that only its owner can read; renamed to NAME.DATE each day, and removed after `MAX_LOG_DAYS`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, when="D", utc=True, encoding="utf-8", backupCount=MAX_LOG_DAYS)

    def _open(self) -> io.TextIOWrapper:
        return open(open_for_append(Path(self.baseFilename)), "a", encoding="utf-8", errors="backslashreplace")


def setup_logging(level: str, file_name: str | None = None, environ: Mapping[str, str] | None = None) -> None:
    """Log to standard error and, if LOGDIR names a folder (as for FastChat), to `file_name`.log in it, rotated daily.

    Called once, by an entry point. Raises StartupError if that file cannot be written."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    folder = (environ or {}).get("LOGDIR")
    if folder and file_name:
        path = Path(folder) / f"{file_name}.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=FOLDER_MODE)
            _remove_old(path.parent)
            handlers.append(PrivateDailyFile(path))
        except OSError as error:
            raise StartupError(f"LOGDIR={folder}: {path} cannot be written ({reason(error)}).") from error
    logging.basicConfig(level=level.upper(), handlers=handlers, force=True)
    for handler in handlers:
        handler.setFormatter(OneLineFormatter(FORMAT, datefmt="%Y-%m-%d %H:%M:%S"))
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # Users and launchers wait for the line "Uvicorn running on", so no level hides it.
    logging.getLogger("fastserve.serving").setLevel(min(logging.INFO, logging.getLevelName(level.upper())))
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def _remove_old(folder: Path) -> None:
    """Remove old logs of workers: each start of a worker has a new file name, so daily rotation misses them."""
    oldest_s = time.time() - MAX_LOG_DAYS * 86400
    for name in os.listdir(folder):
        if re.fullmatch(r"model_worker_[0-9a-f]{8}\.log(\.[\d_-]+)?", name):
            with suppress(OSError):  # removed by another worker, or owned by another user
                if (folder / name).stat().st_mtime < oldest_s:
                    (folder / name).unlink()


class Throttle:
    """Limits a log line to one per `interval_s`."""

    def __init__(self, interval_s: float, clock: Callable[[], float]) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._next_at = float("-inf")

    def passes(self) -> bool:
        now = self._clock()
        if now < self._next_at:
            return False
        self._next_at = now + self._interval_s
        return True
