"""What ranks share: how long they wait, how a process that is stopped is noticed, and progress. No torch here."""

from __future__ import annotations

from collections.abc import Callable

import psutil

from fastserve.engine.ranks.segment import Segment

RANK_LOST_EXIT_CODE = 13
"""Exit code of a rank's process that ends because another rank is lost."""
MAX_START_SILENCE_S = 1800.0
"""Longest wait for another rank while the model loads: disks may be slow for one rank alone."""
MAX_STEP_SILENCE_S = 60.0
"""Longest wait for another rank once the model is ready; shorter in most steps (step_deadline.py)."""
CHECK_INTERVAL_S = 0.25
_STOPPED_CHECKS = 12
"""Checks in a row that find a process stopped, after which it is lost: 3 s."""


class StopDetector:
    """Notices a process that is stopped (SIGSTOP), and so neither answers nor ends.

    Checks are counted, not time: when this process was stopped too, that counts as one check.
    """

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._checks = 0

    def is_lost(self) -> bool:
        """Call it every CHECK_INTERVAL_S."""
        try:
            is_stopped = self._process.status() == psutil.STATUS_STOPPED
        except psutil.NoSuchProcess:
            return False  # it has ended, which is noticed elsewhere
        self._checks = self._checks + 1 if is_stopped else 0
        return self._checks >= _STOPPED_CHECKS


Report = Callable[[str, int, int], None]


class SharedProgress:
    """A progress callback of loading, which notes this rank's progress and reports that of all ranks."""

    def __init__(self, segment: Segment, rank: int, report: Report | None = None) -> None:
        self._segment = segment
        self._rank = rank
        self._report = report
        self._what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        self._what = what
        self._segment.set_progress(self._rank, done, total)
        self.update()

    def update(self) -> None:
        """Report once more, as other ranks have gone on."""
        if self._report is not None:
            self._report(self._what, *self._segment.progress())
