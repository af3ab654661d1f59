"""The supervisor of a launch, started by the launcher as `python -m fastserve.supervisor`.

It reads an order from its standard input, starts the services as its children, and reports on its standard output until
all of them serve. Then it stays, restarts services that died, and rotates logs. It has no terminal, so closing the
launcher's terminal does not affect it:

- before all services serve, the end of its standard input (the launcher is gone) or a SIGTERM cancels the launch;
- after that, a SIGTERM ends only the supervisor. Services run on without it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from fastserve.errors import StartupError
from fastserve.launching.launch import Launch
from fastserve.launching.order import Report, read_order
from fastserve.launching.probe import Probe
from fastserve.launching.processes import SUPERVISOR
from fastserve.launching.restarts import Restarts
from fastserve.launching.run_file import ListedService, RunFile
from fastserve.observability.logging import setup_logging
from fastserve.observability.private_files import reason

logger = logging.getLogger("fastserve.supervisor")

POLL_INTERVAL_S = 0.25
POLLS_PER_ROTATION = 4
MAX_ORDER_BYTES = 64 << 20


class LaunchCancelledError(Exception):
    """The launcher is gone, or the supervisor got a signal."""


class Supervisor:
    def __init__(self, log: Path) -> None:
        """`log`: the file that this process's standard error goes to."""
        self._log = log
        self._stop = threading.Event()
        self._launcher_is_gone = threading.Event()

    def note_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()

    def run(self, text: bytes) -> None:
        order = read_order(text)
        threading.Thread(target=self._watch_launcher, daemon=True).start()
        run_file = RunFile(Path(order.log_dir), order.server_port, order.run_id)
        own = ListedService(SUPERVISOR, SUPERVISOR, os.getpid(), 0, str(self._log))
        probe = Probe(order.client_certificate)
        launch = Launch(order, run_file, own, probe, self._say, self._show_progress, self._check)
        try:
            with launch:
                launch.run()
                self._check()
        except StartupError as error:
            logger.error(error.message.split("\n")[0])
            self._report(Report("failed", error.message))
            return
        except LaunchCancelledError:
            logger.info("The launch was cancelled.")
            self._report(Report("failed", "The launch was ended from outside: its supervisor got SIGTERM."))
            return
        logger.info("All services serve.")
        self._report(Report("ready"))
        _detach_from_launcher()
        restarts = Restarts(order, run_file, launch.children, probe, launch.write_run_file)
        self._watch(restarts, launch)

    def _watch(self, restarts: Restarts, launch: Launch) -> None:
        num_polls = 0
        while not self._stop.wait(POLL_INTERVAL_S):
            try:
                restarts.step()
                num_polls += 1
                if num_polls % POLLS_PER_ROTATION == 0:
                    restarts.rotate_logs(self._log)
            except OSError as error:
                # Try again at the next poll: the supervisor must not end because of it.
                logger.error("%s", reason(error))
            if restarts.has_ended:
                logger.info("All services have ended, and so does their supervisor.")
                launch.remove_run_file()
                return
        logger.info("The supervisor ends; services that run go on without it.")

    def _watch_launcher(self) -> None:
        while os.read(0, 4096):
            continue
        self._launcher_is_gone.set()

    def _check(self) -> None:
        if self._stop.is_set() or self._launcher_is_gone.is_set():
            raise LaunchCancelledError

    def _say(self, line: str) -> None:
        logger.info(line)
        self._report(Report("line", line))

    def _show_progress(self, line: str) -> None:
        self._report(Report("progress", line))

    def _report(self, report: Report) -> None:
        try:
            os.write(1, (report.to_json() + "\n").encode())
        except OSError:
            self._launcher_is_gone.set()


def _detach_from_launcher() -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def main() -> None:
    if len(sys.argv) != 2 or sys.stdin is None or sys.stdin.isatty():
        sys.exit("The supervisor is started by `python -m fastserve.launcher`.")
    supervisor = Supervisor(Path(sys.argv[1]))
    # A signal with a handler is reset to its default in child processes, while an ignored one stays ignored: shell
    # scripts start background commands with SIGINT ignored.
    signal.signal(signal.SIGTERM, supervisor.note_stop)
    signal.signal(signal.SIGINT, supervisor.note_stop)
    if os.name == "posix":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # If ignored, there would be no exit codes, and every crash would look like an orderly exit.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
    setup_logging("info")
    line = sys.stdin.buffer.readline(MAX_ORDER_BYTES)
    if line.endswith(b"\n"):
        supervisor.run(line)


if __name__ == "__main__":
    main()
