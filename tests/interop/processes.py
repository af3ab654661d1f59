"""Services of fastserve and of FastChat as real processes."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.05)


class Service:
    """A process whose log has the address that it listens on. As a context manager it runs within the block."""

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        self._command = command
        self._log = log
        self._env = env

    def __enter__(self) -> Service:
        self.address = self._start(self._command)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """Start it after `kill`, with the same command on the same port."""
        self._start([*self._command, "--port", self.address.rpartition(":")[2]])

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def _start(self, command: Sequence[str]) -> str:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._env, cwd=self._log.parent
            )
        try:
            wait_until(
                lambda: self._listening_at() is not None or self.process.poll() is not None, "start", START_TIMEOUT_S
            )
        except AssertionError:
            self.kill()
            raise
        address = self._listening_at()
        assert address is not None, f"{command} ended with {self.process.returncode}:\n{self.log()[-3000:]}"
        return address

    def _listening_at(self) -> str | None:
        found = re.search(r"Uvicorn running on (http://\S+:\d+)", self.log())
        return None if found is None else found[1]
