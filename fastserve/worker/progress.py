"""Reports the progress of loading: a bar on a terminal, else occasional log lines."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

from fastserve.engine.contract import LoadProgress

logger = logging.getLogger(__name__)

_INTERVAL_S = 5.0


def progress_reporter(stream: TextIO) -> Callable[[LoadProgress], None]:
    return ProgressBar(stream) if stream.isatty() else ProgressLines(time.monotonic)


class ProgressBar:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: tqdm[Any] | None = None

    def __call__(self, progress: LoadProgress) -> None:
        bar = self._bar
        if bar is None:
            bar = self._bar = tqdm(file=self._stream, unit="B", unit_scale=True, unit_divisor=1024)
        bar.total = progress.total
        bar.set_description(progress.what, refresh=False)
        bar.n = progress.done
        bar.refresh()
        if progress.done >= progress.total:
            bar.close()
            self._bar = None


class ProgressLines:
    """Logs a line at every 10 % and at least every five seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._what = ""
        self._tenths = 0
        self._reported_at = 0.0

    def __call__(self, progress: LoadProgress) -> None:
        tenths = 10 * progress.done // progress.total if progress.total else 10
        now = self._clock()
        if progress.what != self._what or tenths != self._tenths or now - self._reported_at >= _INTERVAL_S:
            share = 100 * progress.done / progress.total if progress.total else 100
            logger.info("%s: %.0f %% of %.1f MB", progress.what, share, progress.total / 1e6)
            self._what, self._tenths, self._reported_at = progress.what, tenths, now
