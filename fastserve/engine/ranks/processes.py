"""The processes of ranks 1, 2, ...: children of rank 0's engine process, which starts, watches and ends them.

When a rank dies or is stopped, this engine process ends too, with all others: the worker fails its requests with a
typed error, leaves dispatch, and starts the engine with all its ranks anew. No torch here: ranks start before it is
imported.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import msgspec
import psutil
import zmq

from fastserve.engine.contract import StartFailed
from fastserve.engine.memory import OUT_OF_MEMORY_EXIT_CODE
from fastserve.engine.ranks.messages import EndRank, RankCommand, RankEvent, RankSettings
from fastserve.engine.ranks.segment import Segment
from fastserve.engine.settings import EngineConfig
from fastserve.engine.socket_folder import SocketFolder
from fastserve.errors import StartupError

logger = logging.getLogger(__name__)

RANK_LOST_EXIT_CODE = 13
"""Exit code of rank 0's engine process when it ends because another rank is lost."""
MAX_START_SILENCE_S = 1800.0
"""Longest wait for another rank while the model loads: disks may be slow for one rank alone."""
MAX_STEP_SILENCE_S = 60.0
"""Longest wait for another rank once the model is ready; shorter in most steps (step_deadline.py)."""
CHECK_INTERVAL_S = 0.25
_STOPPED_CHECKS = 12
"""Checks in a row that find a process stopped, after which it is lost: 3 s."""
_END_TIMEOUT_S = 2.0


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


class OtherRanks:
    """Ranks 1 to N - 1, starting side by side with this process."""

    def __init__(self, config: EngineConfig, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Raises StartupError when this system cannot run several ranks."""
        if os.name == "nt":
            raise StartupError("--tp-size needs Linux or macOS: on Windows leave it out.")
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(RankEvent).decode
        self._sockets: list[zmq.Socket[bytes]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._is_serving = False
        self._loss: str | None = None
        self._end = threading.Event()
        self._folder = SocketFolder(os.environ)
        self.meeting_file = self._folder.path / "ranks"
        self.segment = Segment.create(config.tp_size)
        for rank in range(1, config.tp_size):
            self._start(rank, config, context)
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._watcher.start()

    def _start(self, rank: int, config: EngineConfig, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        socket = context.socket(zmq.PAIR)
        socket.set_hwm(0)
        endpoint = f"ipc://{self._folder.path / f'r{rank}'}"
        socket.bind(endpoint)
        self._sockets.append(socket)
        descriptor = self.segment.descriptor
        settings = RankSettings(rank, endpoint, descriptor, str(self.meeting_file), os.getpid(), config)
        self._processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "fastserve.engine.follower", msgspec.json.encode(settings).decode()],
                stdin=subprocess.DEVNULL,
                pass_fds=(descriptor,),
            )
        )

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def send(self, command: RankCommand, rank: int | None = None) -> None:
        """Send a command to each rank, or to one, without waiting."""
        message = self._encode(command)
        for socket in self._sockets if rank is None else [self._sockets[rank - 1]]:
            socket.send(message)

    def serving(self) -> None:
        """Call it once the model is ready: from now on this process ends when a rank is lost."""
        self._is_serving = True

    def reason_of_failed_start(self) -> str | None:
        """Message for the user when a rank could not start or was lost; None when none was."""
        for socket in self._sockets:
            # A rank that fails says why before it ends.
            with contextlib.suppress(zmq.Again):
                event: StartFailed = self._decode(socket.recv(zmq.NOBLOCK))
                return event.message
        return None if self._loss is None else f"The model could not be started: {self._loss}."

    def _watch(self) -> None:
        detectors = [StopDetector(process.pid) for process in self._processes]
        while not self._end.wait(CHECK_INTERVAL_S):
            for rank, (process, detector) in enumerate(zip(self._processes, detectors, strict=True), 1):
                code = process.poll()
                if code is not None:
                    return self._lose(f"rank {rank} (process {process.pid}) ended with {_described(code)}", code)
                if detector.is_lost():
                    return self._lose(f"rank {rank} (process {process.pid}) was stopped for 3 s", None)

    def _lose(self, reason: str, code: int | None) -> None:
        if self._end.is_set():
            return
        self._loss = reason
        self.segment.declare_lost()
        if not self._is_serving:
            return  # the main thread learns of it at its next exchange, and reports it
        logger.error("The engine ends, to be started again with all its ranks: %s.", reason)
        self._kill()
        os._exit(OUT_OF_MEMORY_EXIT_CODE if code == OUT_OF_MEMORY_EXIT_CODE else RANK_LOST_EXIT_CODE)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        """End all ranks and remove the folder. May be called twice. The segment is unmapped when this process ends."""
        if self._end.is_set():
            return
        self._end.set()
        self._watcher.join()
        if self._loss is None:
            self.send(EndRank())
            for process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_END_TIMEOUT_S)
        self._kill()
        for process in self._processes:
            process.wait()
        self._folder.close()


def _described(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


@contextlib.contextmanager
def other_ranks(config: EngineConfig, context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[OtherRanks | None]:
    """The other ranks of a model, None when one rank is all."""
    if config.tp_size == 1:
        yield None
        return
    ranks = OtherRanks(config, context)
    try:
        yield ranks
    finally:
        ranks.close()


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
