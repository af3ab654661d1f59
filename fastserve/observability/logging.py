"""Logging: one format on standard error for our own lines and uvicorn's (`time | level | logger | message`)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from logging.handlers import TimedRotatingFileHandler
from pathlib import Path

from fastserve.errors import StartupError

FORMAT = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"


def setup_logging(level: str, file_name: str | None = None, environ: Mapping[str, str] | None = None) -> None:
    """Send everything to standard error, and, where LOGDIR names a folder (as for FastChat), also to `file_name`.log
    in it, a new one each day. Called once, by an entry. Raises StartupError when that file cannot be written."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    folder = (environ or {}).get("LOGDIR")
    if folder and file_name:
        path = Path(folder) / f"{file_name}.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(TimedRotatingFileHandler(path, when="D", utc=True, encoding="utf-8"))
        except OSError as error:
            raise StartupError(f"LOGDIR={folder}: {path} cannot be written ({error.strerror}).") from error
    logging.basicConfig(level=level.upper(), format=FORMAT, datefmt="%Y-%m-%d %H:%M:%S", handlers=handlers, force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # The line that says where a service listens is what people and launchers wait for: no level hides it.
    logging.getLogger("fastserve.serving").setLevel(min(logging.INFO, logging.getLevelName(level.upper())))
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


class Throttle:
    """Lets a log line through once in a while, however often its cause comes."""

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
