"""Services as processes: start them detached, wait until they serve, end them, and remember them in run files.

A service is a session of its own, so it outlives the launcher and the terminal, and everything that it starts can be
found again. Each launch has one run file in the log folder; the shutdown command works from these files alone. A
service is known by its process id and start time, and its processes carry the launch's id in their environment, so
that a stranger who got a recycled process id is never touched.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import psutil

from fastserve.errors import StartupError

RUN_MARK = "FASTSERVE_RUN"
READY_LINE = "Uvicorn running on"
POLL_S = 0.05
LAUNCH_GRACE_S = 3.0
"""What the services of a failed launch get between SIGTERM and SIGKILL: they have no requests to finish."""
ORPHAN_GRACE_S = 2.0
"""What the processes that a service started get after the service itself has ended."""
START_TIME_TOLERANCE_S = 2.0
"""The system derives start times from the wall clock, which may have been adjusted since."""
TAIL_BYTES = 65536


@dataclass(frozen=True)
class ChildSpec:
    """A service to be started."""

    kind: str
    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    """The whole environment. It may hold API keys, so it is never shown."""
    log: Path
    host: str
    """Where the service answers, as seen from this machine."""
    port: int

    @property
    def address(self) -> str:
        return http_address(self.host, self.port)


@dataclass(frozen=True)
class Service:
    """A service that was started, as the run file lists it."""

    kind: str
    name: str
    pid: int
    started_s: float
    """Start time of the process as the system tells it, in seconds since the epoch."""
    port: int
    log: str


@dataclass(frozen=True)
class Run:
    """One launch, as its run file tells it."""

    run_id: str
    server_port: int
    services: tuple[Service, ...]


def http_address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


# ---- run files --------------------------------------------------------------------------------------------------


def run_file(log_dir: Path, run: Run) -> Path:
    return log_dir / f"fastserve-{run.server_port}-{run.run_id}.pid.json"


def write_run(log_dir: Path, run: Run) -> None:
    """Replace the run file in one step; a run without services has none."""
    path = run_file(log_dir, run)
    if not run.services:
        path.unlink(missing_ok=True)
        return
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(asdict(run), indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


def read_runs(log_dir: Path) -> list[Run]:
    """The launches whose run files stand in `log_dir`. Raises StartupError for a file that cannot be read."""
    runs = []
    for path in sorted(log_dir.glob("fastserve-*.pid.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            services = tuple(Service(**service) for service in content["services"])
            runs.append(Run(content["run_id"], content["server_port"], services))
        except FileNotFoundError:
            continue  # another shutdown has just removed it
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StartupError(f"{path} is not a run file that can be read ({error}): remove it.") from error
    return runs


# ---- the processes of a service ---------------------------------------------------------------------------------


def _mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(RUN_MARK)
    except psutil.Error:
        return None


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def leader(run: Run, service: Service) -> psutil.Process | None:
    """The service's own process if it still runs; never another process with its number."""
    try:
        process = psutil.Process(service.pid)
        known = abs(process.create_time() - service.started_s) <= START_TIME_TOLERANCE_S
        return process if _is_alive(process) and (known or _mark(process) == run.run_id) else None
    except psutil.NoSuchProcess:
        return None


def members(run: Run, service: Service) -> set[psutil.Process]:
    """The service's process and what it started (a worker's engine), as far as they still run."""
    head = leader(run, service)
    if sys.platform == "win32":
        return set() if head is None else {head, *head.children(recursive=True)}
    found = set()
    for process in psutil.process_iter():
        try:
            in_session = os.getsid(process.pid) == service.pid
        except (ProcessLookupError, PermissionError):
            continue
        # Without its leader, a session with this number may be a stranger's: then the mark has to tell.
        if in_session and _is_alive(process) and (head is not None or _mark(process) == run.run_id):
            found.add(process)
    return found


def end_services(run: Run, services: Sequence[Service], grace_s: float) -> set[Service]:
    """SIGTERM, wait for at most `grace_s`, then SIGKILL for all that is left. Returns those that had to be killed."""
    processes = {service: members(run, service) for service in services}
    heads = {service: leader(run, service) for service in services}
    for service in services:
        head = heads[service]
        # A service ends its own processes in good order; only orphans are told directly.
        _signal(processes[service] if head is None else [head], "terminate")
    _wait_gone((head for head in heads.values() if head is not None), grace_s)
    late = {service for service, head in heads.items() if head is not None and _is_alive(head)}
    for service in services:
        processes[service] |= members(run, service)
    _wait_gone(
        (process for service in services if service not in late for process in processes[service]), ORPHAN_GRACE_S
    )
    left = [process for group in processes.values() for process in group if _is_alive(process)]
    _signal(left, "kill")
    _wait_gone(left, ORPHAN_GRACE_S)
    return late


def _signal(processes: Iterable[psutil.Process], method: str) -> None:
    for process in processes:
        try:
            getattr(process, method)()
        except psutil.NoSuchProcess:
            continue


def _wait_gone(processes: Iterable[psutil.Process], timeout_s: float) -> None:
    waiting = list(processes)
    deadline = time.monotonic() + timeout_s
    while (waiting := [process for process in waiting if _is_alive(process)]) and time.monotonic() < deadline:
        time.sleep(POLL_S)


# ---- ports and logs ---------------------------------------------------------------------------------------------


def port_problem(host: str, port: int) -> str | None:
    """Why a service could not listen there, or None. Binds as the services do, and lets go at once."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        return f"the host name {host} cannot be resolved ({error.strerror})"
    missing = f"this machine has no address {host}"
    bound = 0
    for family, _, _, _, address in found:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            if os.name == "posix":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                sock.bind(address)
                bound += 1
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return "the port is in use by another program"
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    return str(error.strerror)
    return None if bound else missing


def tail(path: Path) -> list[str]:
    """The last lines of a log, without empty ones; a progress bar's rewrites count as lines."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def http_get(host: str, port: int, path: str, headers: Mapping[str, str] | None = None) -> bytes | None:
    """The body that a service answers with status 200; None for anything else."""
    # http.client and not urllib: a proxy in the environment must not stand between us and our own machine.
    connection = http.client.HTTPConnection(host, port, timeout=1.0)
    try:
        connection.request("GET", path, headers=headers or {})
        response = connection.getresponse()
        return response.read() if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


# ---- a launch ---------------------------------------------------------------------------------------------------


class Child:
    """A service that this process has started and waits for."""

    def __init__(self, spec: ChildSpec, run_id: str) -> None:
        """Start it. Raises OSError when the log cannot be opened or the program cannot be run."""
        self.spec = spec
        # Truncated once, then only appended to: a log that is rotated or emptied while the service runs stays sound.
        with spec.log.open("wb"):
            pass
        with spec.log.open("ab") as log:
            self.process = subprocess.Popen(
                spec.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**spec.env, RUN_MARK: run_id},
                **_detached(),
            )
        self.service = Service(
            spec.kind, spec.name, self.process.pid, _start_time_s(self.process.pid), spec.port, str(spec.log.resolve())
        )

    def serves(self) -> bool:
        says_so = any(READY_LINE in line for line in tail(self.spec.log))
        return says_so and http_get(self.spec.host, self.spec.port, "/health") is not None

    def progress(self) -> str:
        """The message of the log's last line."""
        lines = tail(self.spec.log)
        return lines[-1].rsplit(" | ", 1)[-1] if lines else "starting"

    def post_mortem(self, what: str) -> str:
        """Why the launch ends because of this service: cause first, then the end of its log."""
        lines = tail(self.spec.log)
        if not lines:
            return f"{self.spec.name} {what}; its log {self.spec.log} is empty."
        errors = [line for line in lines if "| ERROR |" in line or "| CRITICAL |" in line]
        cause = (errors or lines)[-1].rsplit(" | ", 1)[-1].strip()
        shown = "\n".join(f"    {line}" for line in lines[-20:])
        return f"{self.spec.name} {what}: {cause}\nThe last lines of {self.spec.log}:\n{shown}"


def _detached() -> dict[str, Any]:
    """Arguments of Popen that free a process from our terminal and from our own end."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def _start_time_s(pid: int) -> float:
    return psutil.Process(pid).create_time()


def _ending(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    return f"was killed by {signal.Signals(-exit_code).name}"


class Stopped(Exception):
    """The person at the terminal, or the system, wants the launch to end."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


class StopSignals:
    """Notes Ctrl-C and SIGTERM inside a block; `check` answers them, where nothing is half done."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def check(self) -> None:
        """Raises Stopped when one of the signals has come."""
        if self._received is not None:
            raise Stopped(self._received)


class Launch:
    """The services of one launch. Leaving the block by an exception takes down all that it started.

    `say` gets each finished line, `show_progress` is called at every look with a line that replaces the one before.
    """

    def __init__(
        self,
        log_dir: Path,
        server_port: int,
        stop_signals: StopSignals,
        say: Callable[[str], None],
        show_progress: Callable[[str], None],
    ) -> None:
        self._log_dir = log_dir
        self._run = Run(uuid.uuid4().hex[:12], server_port, ())
        self._stop_signals = stop_signals
        self._say = say
        self._show_progress = show_progress
        self._children: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or not self._children:
            return
        names = ", ".join(child.spec.name for child in self._children)
        self._say(f"Taking down what was started: {names}")
        end_services(self._run, self._run.services, LAUNCH_GRACE_S)
        for child in self._children:
            child.process.poll()  # reaps it
        write_run(self._log_dir, Run(self._run.run_id, self._run.server_port, ()))

    def start(self, spec: ChildSpec) -> Child:
        """Raises StartupError when the log cannot be written or the program cannot be run."""
        self._stop_signals.check()
        try:
            child = Child(spec, self._run.run_id)
            self._children.append(child)
            self._run = Run(self._run.run_id, self._run.server_port, (*self._run.services, child.service))
            write_run(self._log_dir, self._run)
        except OSError as error:
            raise StartupError(f"{spec.name} cannot be started: {error}") from error
        return child

    def wait_ready(self, children: Sequence[Child], timeout_s: float) -> None:
        """Wait until each of them serves.

        Raises StartupError when any service of the launch dies or time is up, and Stopped after a stop signal.
        """
        started = time.monotonic()
        waiting = list(children)
        while True:
            self._check_children()
            elapsed_s = time.monotonic() - started
            for child in [child for child in waiting if child.serves()]:
                waiting.remove(child)
                self._say(f"{child.spec.name} is ready at {child.spec.address} ({elapsed_s:.1f} s)")
            if not waiting:
                return
            if elapsed_s > timeout_s:
                raise StartupError(waiting[0].post_mortem(f"did not serve within {timeout_s:g} s (--wait-timeout-s)"))
            states = "; ".join(f"{child.spec.name}: {child.progress()}" for child in waiting)
            self._show_progress(f"waiting {elapsed_s:.0f} s for {states}")
            time.sleep(POLL_S)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until `condition` holds; False when it does not in time. Raises as `wait_ready` does."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            self._check_children()
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def _check_children(self) -> None:
        self._stop_signals.check()
        for child in self._children:
            exit_code = child.process.poll()
            if exit_code is not None:
                raise StartupError(child.post_mortem(_ending(exit_code)))
