"""The launcher's side of a launch: start a supervisor with the order, show its reports, and clean up after a failed
launch."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Self

from fastserve.errors import StartupError
from fastserve.launching.child import detached
from fastserve.launching.console import Console
from fastserve.launching.launch import LAUNCH_GRACE_S
from fastserve.launching.order import Order, Report, read_report
from fastserve.launching.processes import ORPHAN_GRACE_S, POLL_S, SUPERVISOR, Mark, end_run
from fastserve.launching.run_file import RunFile
from fastserve.observability.private_files import open_for_append, reason

CANCEL_TIMEOUT_S = LAUNCH_GRACE_S + 3 * ORPHAN_GRACE_S
"""Seconds that the supervisor has to end what it started; after that the launcher does it."""


class Stopped(Exception):
    """The launch was ended by a signal, from the terminal or the system."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


class StopSignals:
    """Records SIGINT, SIGTERM and SIGHUP inside a block, unless this process was started with them ignored."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM) + ((signal.SIGHUP,) if os.name == "posix" else ())

    def __init__(self) -> None:
        self.received: int | None = None
        self.count = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in self.NUMBERS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def raise_if_received(self) -> None:
        """Raises Stopped if a signal came."""
        if self.received is not None:
            raise Stopped(self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        self.count += 1


def follow(supervisor: SupervisorProcess, console: Console, signals: StopSignals) -> None:
    """Return when all services serve.

    Raises StartupError if one fails, and Stopped after a signal; all started processes have ended by then.
    """
    order = supervisor.order
    is_ready = False
    try:
        with supervisor:
            failure = _relay(supervisor, console, signals)
            is_ready = failure is None
        if failure is not None:
            raise failure
    finally:
        if not is_ready:
            # The supervisor may be dead or stuck, so end every process of the launch here.
            end_run(order.run_id, 0.0 if signals.count > 1 else LAUNCH_GRACE_S)
            _remove(RunFile(Path(order.log_dir), order.server_port, order.run_id))


def _remove(run_file: RunFile) -> None:
    try:
        run_file.remove()
    except OSError:
        return  # the folder is not writable, and nothing depends on the file


def _relay(supervisor: SupervisorProcess, console: Console, signals: StopSignals) -> Exception | None:
    """Show reports until the launch has succeeded (returns None) or failed (returns the reason)."""
    deadline: float | None = None
    while True:
        if signals.received is not None and deadline is None:
            supervisor.cancel()
            deadline = time.monotonic() + CANCEL_TIMEOUT_S
        if signals.count > 1 or (deadline is not None and time.monotonic() > deadline):
            return Stopped(signals.received or signal.SIGTERM)
        try:
            report = supervisor.reports.get(timeout=POLL_S)
        except queue.Empty:
            continue
        if report is None:
            if signals.received is not None:
                return Stopped(signals.received)
            return StartupError(
                f"The launch has ended early: its supervisor is gone. Its log {supervisor.log} says more."
            )
        if report.kind == "line":
            console.say(report.text)
        elif report.kind == "progress":
            console.show_progress(report.text)
        elif report.kind == "failed":
            return StartupError(report.text) if signals.received is None else Stopped(signals.received)
        elif signals.received is None:
            return None


class SupervisorProcess:
    """The supervisor's process, until the launch has succeeded or failed."""

    def __init__(self, order: Order, environ: Mapping[str, str], log: Path) -> None:
        """Start it with `environ`; its log is `log`. Raises StartupError."""
        self.order = order
        self.log = log
        self.reports: queue.SimpleQueue[Report | None] = queue.SimpleQueue()
        """Reports of the supervisor, then None when it has ended."""
        mark = Mark(order.run_id, order.log_dir, order.server_port, SUPERVISOR, SUPERVISOR, 0, str(log))
        try:
            descriptor = open_for_append(log)
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "fastserve.supervisor", str(log)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=descriptor,
                    env={**environ, **mark.environ()},
                    **detached(),
                )
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StartupError(f"The supervisor cannot be started: {error.filename or ''} {reason(error)}.") from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin: IO[bytes] = self._process.stdin
        self._reader = threading.Thread(target=self._read, args=[self._process.stdout], daemon=True)
        self._reader.start()
        try:
            self._stdin.write((order.to_json() + "\n").encode())
            self._stdin.flush()
        except OSError:
            return  # the supervisor has ended; the reader thread reports that

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Cancel the launch, unless it has succeeded, by closing the supervisor's standard input."""
        try:
            self._stdin.close()
        except OSError:
            return  # the supervisor has ended, and part of the order is still in the buffer

    def _read(self, stream: IO[bytes]) -> None:
        try:
            for line in stream:
                self.reports.put(read_report(line))
        finally:
            self.reports.put(None)
            self._process.wait()
