"""Logging: one format on standard error for our own lines and uvicorn's (`time | level | logger | message`)."""

from __future__ import annotations

import logging
import sys

FORMAT = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"


def setup_logging(level: str) -> None:
    """Send everything to standard error. Called once, by an entry."""
    logging.basicConfig(level=level.upper(), format=FORMAT, datefmt="%Y-%m-%d %H:%M:%S", stream=sys.stderr, force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # The line that says where a service listens is what people and launchers wait for: no level hides it.
    logging.getLogger("fastserve.serving").setLevel(min(logging.INFO, logging.getLevelName(level.upper())))
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
