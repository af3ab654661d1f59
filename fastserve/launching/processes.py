"""Find and end the processes of launches, by marks in their environment.

Each process of a launch has the launch's id and its service in its environment, and child processes inherit them. So a
launch is found even if its log folder was deleted, its run file is broken or was never written, or its launcher was
killed; and an unrelated process with a recycled process id is never touched.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from fastserve.config import API_SERVER_PORT, CONTROLLER_PORT, WORKER_PORT
from fastserve.errors import StartupError
from fastserve.launching.run_file import RunFile, run_files_in

RUN_MARK = "FASTSERVE_RUN"
SERVICE_MARK = "FASTSERVE_SERVICE"
SUPERVISOR = "supervisor"
POLL_S = 0.05
ORPHAN_GRACE_S = 2.0
"""Seconds that child processes of a service have to end after the service itself."""
START_S = 0.02
"""Seconds until a new process surely has its program and environment (between fork and exec it has neither)."""
MAX_KILL_ROUNDS = 5
"""Rounds of killing, as processes may have been started meanwhile."""
DEFAULT_PORTS = {"controller": CONTROLLER_PORT, "model_worker": WORKER_PORT, "openai_api_server": API_SERVER_PORT}


@dataclass(frozen=True)
class Mark:
    """The launch and the service that a process belongs to, read from its environment."""

    run_id: str
    log_dir: str
    """Absolute path of the launch's log folder, which identifies the launch to the user."""
    server_port: int
    """Port of the launch's API server, by which users distinguish launches."""
    kind: str
    name: str
    port: int
    log: str
    drain_timeout_s: float = 30.0
    """Seconds that the service's requests may take to finish after SIGTERM."""

    def environ(self) -> dict[str, str]:
        service = {name: value for name, value in asdict(self).items() if name != "run_id"}
        return {RUN_MARK: self.run_id, SERVICE_MARK: json.dumps(service)}


@dataclass(frozen=True)
class RunningService:
    """A service of a launch with all of its processes."""

    mark: Mark
    leader: psutil.Process | None
    """The process that the launch started; None if it has ended but some of its children have not."""
    members: frozenset[psutil.Process]
    """All processes, including the leader."""

    @property
    def pid(self) -> int:
        return min(process.pid for process in self.members) if self.leader is None else self.leader.pid


def find_services(run_id: str | None = None) -> list[RunningService]:
    """The running services of all launches, or of one, that this user may see."""
    marked: dict[Mark, set[psutil.Process]] = {}
    sessions: dict[int, set[psutil.Process]] = {}
    for process in _others():
        mark = _read_mark(process)
        if mark is not None and run_id in (None, mark.run_id):
            marked.setdefault(mark, set()).add(process)
        session = _session(process)
        if session is not None:
            sessions.setdefault(session, set()).add(process)
    services = []
    for mark, members in marked.items():
        leader = next((process for process in members if _is_leader(process, members)), None)
        if leader is not None:
            # A child that was started with another environment is still in the session of its service.
            members |= sessions.get(leader.pid, set()) | (set() if sessions else set(leader.children(recursive=True)))
        services.append(RunningService(mark, leader, frozenset(members)))
    return services


def _others() -> Iterator[psutil.Process]:
    """All live processes except this one. Those that are just starting come last, when they have a program."""
    starting = []
    for process in psutil.process_iter():
        if process.pid == os.getpid() or not is_alive(process):
            continue
        if _is_starting(process):
            starting.append(process)
        else:
            yield process
    if starting:
        time.sleep(START_S)
    yield from starting


def _is_starting(process: psutil.Process) -> bool:
    """Whether its environment may still be missing: for an instant after `exec` the system shows an empty one."""
    try:
        return time.time() - process.create_time() < 1.0 and not process.environ()
    except (psutil.Error, OSError):
        return False


def _read_mark(process: psutil.Process) -> Mark | None:
    try:
        environ = process.environ()
    except (psutil.Error, OSError):
        return None
    run_id = environ.get(RUN_MARK)
    if run_id is None:
        return None
    if SERVICE_MARK not in environ:
        return _derive_mark(process, run_id)
    try:
        content = json.loads(environ[SERVICE_MARK])
        # A later version may have more fields.
        known = {name: content[name] for name in Mark.__dataclass_fields__ if name in content and name != "run_id"}
        return Mark(run_id=run_id, **known)
    except (ValueError, TypeError):
        return None


def _derive_mark(process: psutil.Process, run_id: str) -> Mark | None:
    """The mark of a service of an earlier version, which has only the launch's id in its environment."""
    try:
        words = process.cmdline()
        logs = [file.path for file in process.open_files() if file.fd == 1]
        # The log folder may be gone; its default was `logs` in the working directory.
        log = Path(logs[0]) if logs else Path(process.cwd()) / "logs" / "unknown.log"
    except (psutil.Error, OSError):
        return None
    module = words[2] if words[1:2] == ["-m"] and len(words) > 2 else ""
    kind = next((kind for kind in DEFAULT_PORTS if module.endswith(f".{kind}")), None)
    if kind is None:
        session = _session(process)
        if session is None or psutil.pid_exists(session):
            return None  # a child process, found by the session of its service
        kind = "model_worker"  # only workers start processes
    ports = [int(word.removeprefix("--port=")) for word in words if re.fullmatch(r"--port=\d+", word)]
    server_port = next((file.server_port for file in _run_files(log.parent) if file.run_id == run_id), 0)
    return Mark(run_id, str(log.parent), server_port, kind, kind, (ports or [DEFAULT_PORTS[kind]])[0], str(log))


def _run_files(log_dir: Path) -> list[RunFile]:
    try:
        return run_files_in(log_dir)
    except PermissionError:
        return []


def _session(process: psutil.Process) -> int | None:
    if os.name != "posix":
        return None
    try:
        return os.getsid(process.pid)
    except (ProcessLookupError, PermissionError):
        return None


def _is_leader(process: psutil.Process, members: set[psutil.Process]) -> bool:
    if os.name == "posix":
        return _session(process) == process.pid
    return not any(parent in members for parent in process.parents())


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # another user's, on some systems
        return True


def end_services(services: Sequence[RunningService], grace_s: float) -> set[RunningService]:
    """Send SIGTERM, wait for at most `grace_s`, then SIGKILL what is left. Returns the services that had to be killed.

    Raises StartupError if a process belongs to another user; the others are ended nevertheless.
    """
    denied: set[int] = set()
    for service in services:
        # A service ends its own children in order, so only orphans get SIGTERM directly.
        _signal(service.members if service.leader is None else [service.leader], "terminate", denied)
    leaders = {service: service.leader for service in services if service.leader is not None}
    _wait_gone(leaders.values(), grace_s, denied)
    late = {service for service, leader in leaders.items() if is_alive(leader)}
    _wait_gone(
        (process for service in services if service not in late for process in service.members), ORPHAN_GRACE_S, denied
    )
    marks = {service.mark for service in services}
    left = [process for service in services for process in service.members if is_alive(process)]
    for _ in range(MAX_KILL_ROUNDS):
        # Search again: processes may have started others since.
        left += [process for service in find_services() if service.mark in marks for process in service.members]
        if not left:
            break
        _signal(left, "kill", denied)
        _wait_gone(left, ORPHAN_GRACE_S, denied)
        left = [process for process in left if is_alive(process) and process.pid not in denied]
    if denied:
        numbers = ", ".join(map(str, sorted(denied)))
        raise StartupError(f"Process {numbers} belongs to another user: run the shutdown as that user.")
    return late


def end_run(run_id: str, grace_s: float) -> None:
    """End all processes of a launch: first its supervisor, which would restart the others."""
    end_services([service for service in find_services(run_id) if service.mark.kind == SUPERVISOR], grace_s)
    end_services(find_services(run_id), grace_s)


def _signal(processes: Iterable[psutil.Process], method: str, denied: set[int]) -> None:
    for process in processes:
        try:
            getattr(process, method)()
        except psutil.NoSuchProcess:
            continue
        except psutil.AccessDenied:
            denied.add(process.pid)


def _wait_gone(processes: Iterable[psutil.Process], timeout_s: float, denied: set[int]) -> None:
    waiting = list(processes)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        waiting = [process for process in waiting if process.pid not in denied and is_alive(process)]
        if not waiting:
            return
        time.sleep(POLL_S)


def absolute(folder: str, flag: str) -> Path:
    """Absolute path of `folder`, links resolved. Raises StartupError if the working directory was deleted."""
    try:
        return Path(folder).expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise StartupError(f"{flag} {folder}: the folder cannot be found ({error}): give its whole path.") from error
