"""One service as a child process that is started again when it dies, with a growing pause."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fastserve.serving.listen import url_of

FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0
_MAX_PORT_TRIES = 50
_PORTS_END = 65536
STABLE_S = 60.0
"""A process that ran for so long begins with the first pause again."""


@dataclass(frozen=True)
class Command:
    """A module with its flags, without the address that it listens on."""

    module: str
    flags: tuple[str, ...]
    environ: tuple[tuple[str, str], ...] = ()
    """Additional environment variables. They may hold keys."""
    is_worker: bool = False
    """Whether it takes `--worker-address`."""


@dataclass(frozen=True)
class ServiceState:
    address: str | None
    is_running: bool
    num_starts: int
    exit_code: int | None
    """Exit code of the last process that ended."""


class ServiceProcess:
    """Not thread-safe. `run` is called again and again: it starts what should run and does not."""

    def __init__(self, host: str, port: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        """`host`: this machine's address for the others; `port`: the wanted one, another is taken if it is not free."""
        self._host = host
        self._wanted_port = port
        self._clock = clock
        self._command: Command | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._reserved: range | None = None
        self._num_starts = 0
        self._exit_code: int | None = None
        self._pause_s = FIRST_PAUSE_S
        self._started_at = 0.0
        self._next_start_at = 0.0

    def run(self, command: Command, stop_timeout_s: float) -> ServiceState:
        """Start the service if it does not run; if it runs with another command, stop it first."""
        if self._command != command:
            self.stop(stop_timeout_s)
            self._command, self._pause_s, self._next_start_at = command, FIRST_PAUSE_S, 0.0
        self._collect()
        if self._process is None and self._clock() >= self._next_start_at:
            self._start(command)
        return self.state

    def reserve(self, num_ports: int) -> tuple[str, int]:
        """The address of this machine, and the first of as many consecutive ports, on which the service will listen.
        They were free when this was first called."""
        if self._reserved is None or len(self._reserved) != num_ports:
            self._reserved = _free_ports(self._host, num_ports)
        return self._host, self._reserved[0]

    @property
    def state(self) -> ServiceState:
        self._collect()
        is_running = self._process is not None
        address = url_of(self._host, self._port) if is_running else None
        return ServiceState(address, is_running, self._num_starts, self._exit_code)

    def stop(self, timeout_s: float) -> None:
        """End the process: SIGTERM, which drains it, and SIGKILL after `timeout_s`. Its whole process group ends."""
        process, self._process, self._command = self._process, None, None
        if process is None:
            return
        try:
            process.send_signal(signal.SIGTERM)
            self._exit_code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _kill_group(process)
            self._exit_code = process.wait()

    def _collect(self) -> None:
        process = self._process
        if process is None or process.poll() is None:
            return
        _kill_group(process)
        self._process, self._exit_code = None, process.returncode
        now = self._clock()
        if now - self._started_at >= STABLE_S:
            self._pause_s = FIRST_PAUSE_S
        self._next_start_at = now + self._pause_s
        self._pause_s = min(MAX_PAUSE_S, 2 * self._pause_s)

    def _start(self, command: Command) -> None:
        self._port = self._reserved[0] if self._reserved else _free_port(self._host, self._wanted_port)
        words = [command.module, *command.flags, f"--host={self._host}", f"--port={self._port}"]
        if command.is_worker:
            words.append(f"--worker-address={url_of(self._host, self._port)}")
        self._process = _spawn(words, {**os.environ, **dict(command.environ)})
        self._num_starts += 1
        self._started_at = self._clock()


def _spawn(words: Sequence[str], environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a child of this process in a process group of its own.

    A thread that waits for it does so, because the child gets its signal when the thread that started it ends.
    """
    made: list[subprocess.Popen[bytes] | OSError] = []
    is_made = threading.Event()

    def run() -> None:
        command = [sys.executable, "-m", "fastserve.fleet.child", str(os.getpid()), *words]
        try:
            process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            made.append(error)
            is_made.set()
            return
        made.append(process)
        is_made.set()
        while process.poll() is None:
            time.sleep(0.2)

    threading.Thread(target=run, name="parent of a service", daemon=True).start()
    is_made.wait()
    (result,) = made
    if isinstance(result, OSError):
        raise result
    return result


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _free_ports(host: str, count: int) -> range:
    for _ in range(_MAX_PORT_TRIES):
        first = _free_port(host, None)
        if first + count <= _PORTS_END and all(_free_port(host, port) == port for port in range(first, first + count)):
            return range(first, first + count)
    raise OSError(f"{host} has no {count} consecutive free ports")


def _free_port(host: str, wanted: int | None) -> int:
    for port in (wanted, 0) if wanted else (0,):
        try:
            with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
                found: int = sock.getsockname()[1]
                return found
        except OSError:
            if not port:
                raise
    raise AssertionError("unreachable")
