"""The processes of the ranks of one machine other than rank 0: started, watched, and each started again by itself.

Their parent is the worker, or on other machines than the first a process that only serves health checks: so a rank
outlives the loss of any other, with its weights. No torch here.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import msgspec

from fastserve.engine.ranks.gang_messages import GangRankSettings
from fastserve.engine.ranks.processes import CHECK_INTERVAL_S, RANK_LOST_EXIT_CODE, StopDetector
from fastserve.engine.settings import EngineConfig
from fastserve.engine.socket_folder import SocketFolder
from fastserve.engine.start_settings import settings_file

logger = logging.getLogger(__name__)

REFUSED_EXIT_CODE = 2
"""Exit code of a rank that must not join: starting it again would not help."""
_FIRST_PAUSE_S = 0.2
_MAX_PAUSE_S = 10.0
_END_TIMEOUT_S = 2.0


@dataclass(slots=True)
class _Rank:
    process: subprocess.Popen[bytes]
    detector: StopDetector
    pause_s: float = _FIRST_PAUSE_S
    start_s: float | None = None
    """When to start it again; None while it runs."""


class LocalRanks:
    """Must be closed."""

    def __init__(
        self,
        ranks: Iterable[int],
        config: EngineConfig,
        environ: dict[str, str],
        on_refused: Callable[[int], None] = lambda rank: None,
    ) -> None:
        """`on_refused`: called, in a thread, when rank 0 refuses one of them; its log says why."""
        self._environ = environ
        self._on_refused = on_refused
        self._end = threading.Event()
        self._folder = SocketFolder(environ)
        assert config.gang is not None
        self.gang = msgspec.structs.replace(config.gang, folder=str(self._folder.path))
        """The machines, with the folder where the ranks of this one meet."""
        self._config = replace(config, gang=self.gang)
        self._ranks = {rank: self._start(rank) for rank in ranks}
        self._watcher = threading.Thread(target=self._watch, name="local ranks", daemon=True)
        self._watcher.start()

    @property
    def pids(self) -> list[int]:
        return [rank.process.pid for rank in self._ranks.values()]

    def _start(self, rank: int) -> _Rank:
        settings = GangRankSettings(rank, os.getpid(), self._config)
        with settings_file(settings) as file:
            command = [sys.executable, "-m", "fastserve.engine.gang_follower"]
            process = subprocess.Popen(command, stdin=file, env=self._environ)
        return _Rank(process, StopDetector(process.pid))

    def _watch(self) -> None:
        while not self._end.wait(CHECK_INTERVAL_S):
            for number, rank in self._ranks.items():
                if rank.start_s is None:
                    self._check(number, rank)
                elif time.monotonic() >= rank.start_s:
                    self._ranks[number] = again = self._start(number)
                    again.pause_s = rank.pause_s

    def _check(self, number: int, rank: _Rank) -> None:
        code = rank.process.poll()
        if code is None:
            if rank.detector.is_lost():
                logger.error("rank %d (process %d) was stopped for 3 s and is killed", number, rank.process.pid)
                rank.process.kill()
            return
        if code == REFUSED_EXIT_CODE:
            logger.error("rank %d was refused and is not started again", number)
            self._end.set()
            self._on_refused(number)
            return
        # A rank that was killed, or has followed another's loss, has done nothing wrong itself.
        is_normal = code <= 0 or code == RANK_LOST_EXIT_CODE
        rank.pause_s = _FIRST_PAUSE_S if is_normal else min(2 * rank.pause_s, _MAX_PAUSE_S)
        rank.start_s = time.monotonic() + rank.pause_s
        logger.info("rank %d ended (code %d) and is started again in %.1f s", number, code, rank.pause_s)

    def end_restarts(self) -> None:
        """Start none again from now on."""
        self._end.set()

    def close(self, timeout_s: float = _END_TIMEOUT_S) -> None:
        """End the processes: those that rank 0 does not end within the time are killed. May be called twice."""
        self.end_restarts()
        if threading.current_thread() is not self._watcher:
            self._watcher.join()
        deadline = time.monotonic() + timeout_s
        for rank in self._ranks.values():
            try:
                rank.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.process.kill()
                rank.process.wait()
        self._folder.close()
