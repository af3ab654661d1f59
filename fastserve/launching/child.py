"""One service as a child process: start it detached from the terminal, read its log, explain its exit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from fastserve.launching.log_files import tail
from fastserve.launching.plan import ChildSpec
from fastserve.launching.probe import Probe
from fastserve.launching.processes import Mark
from fastserve.launching.run_file import ListedService
from fastserve.observability.private_files import FOLDER_MODE, open_for_append

READY_LINE = "Uvicorn running on"


class Child:
    """A service that this process started."""

    def __init__(self, spec: ChildSpec, mark: Mark, probe: Probe) -> None:
        """Start it. Raises OSError when the log cannot be opened or the program cannot be run."""
        self.spec = spec
        self._probe = probe
        self._log = Path(spec.log)
        self._has_logged_ready = False
        self._log.parent.mkdir(parents=True, exist_ok=True, mode=FOLDER_MODE)
        log = open_for_append(self._log)
        try:
            self._log_start = os.fstat(log).st_size
            self.process = subprocess.Popen(
                spec.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**spec.env, **mark.environ()},
                **detached(),
            )
        finally:
            os.close(log)

    @property
    def listed(self) -> ListedService:
        return ListedService(self.spec.kind, self.spec.name, self.process.pid, self.spec.port, self.spec.log)

    def serves(self) -> bool:
        """Whether this service is ready: `/health` answers and its model is loaded.

        Another process may hold the port, so the log must have the ready line, or, where the log cannot be written (a
        full disk), the child's own socket must listen.
        """
        if not self._has_logged_ready:
            self._has_logged_ready = any(READY_LINE in line for line in tail(self._log, self._log_start))
        answer = self._probe.get(self.spec, "/health")
        if answer is None or _status(answer) == "loading":
            return False
        return self._has_logged_ready or self._listens()

    def _listens(self) -> bool:
        try:
            connections = psutil.Process(self.process.pid).net_connections("tcp")
        except (psutil.Error, OSError):
            return False
        return any(
            connection.status == psutil.CONN_LISTEN and connection.laddr.port == self.spec.port
            for connection in connections
        )

    def progress(self) -> str:
        """The message of the log's last line."""
        lines = tail(self._log, self._log_start)
        return _message(lines[-1]) if lines else "starting"

    def post_mortem(self, event: str) -> str:
        """Explanation of a failed launch: the cause, then the last lines of the log."""
        lines = tail(self._log, self._log_start)
        if not lines:
            return f"{self.spec.name} {event}; its log {self.spec.log} is empty."
        cause = self.last_error() or _message(lines[-1])
        shown = "\n".join(f"    {line}" for line in lines[-20:])
        return f"{self.spec.name} {event}: {cause}\nThe last lines of {self.spec.log}:\n{shown}"

    def last_error(self) -> str | None:
        """The message of the last error in its log, or None."""
        lines = tail(self._log, self._log_start)
        errors = [line for line in lines if "| ERROR |" in line or "| CRITICAL |" in line]
        return _message(errors[-1]) if errors else None


def _status(answer: bytes) -> object:
    """The `status` in a service's answer to `/health`, or None."""
    try:
        content = json.loads(answer)
    except ValueError:
        return None
    return content.get("status") if isinstance(content, dict) else None


def _message(line: str) -> str:
    """The message of a log line, without time, level and logger."""
    return line.split(" | ", 3)[-1].strip()


def detached() -> dict[str, Any]:
    """Popen arguments that detach a process from our terminal and let it outlive us."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def describe_exit(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was killed by signal {-exit_code}"
