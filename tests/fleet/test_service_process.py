"""A service of a fleet as a process: started, started again, stopped, and ended with its parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator

import psutil
import pytest

from fastserve.fleet.service_process import Command, ServiceProcess, ServiceState
from tests.processes import is_alive

CONTROLLER = Command("fastserve.controller", ("--insecure",))


def until(holds: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def answers(state: ServiceState) -> bool:
    try:
        urllib.request.urlopen(f"{state.address}/health", timeout=2).close()
    except OSError:
        return False
    return True


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def service(clock: Clock) -> Iterator[ServiceProcess]:
    process = ServiceProcess("127.0.0.1", None, clock)
    yield process
    process.stop(5)


def pid_of(state: ServiceState) -> int:
    assert state.address is not None
    port = int(state.address.rpartition(":")[2])
    for process in psutil.Process().children(recursive=True):
        if f"--port={port}" in process.cmdline():
            return process.pid
    raise AssertionError("there is no such process")


def test_a_service_runs_once_and_its_command_may_change(service: ServiceProcess) -> None:
    state = service.run(CONTROLLER, 5)
    until(lambda: answers(service.state))
    assert service.run(CONTROLLER, 5) == state, "the same command again changes nothing"
    first = pid_of(state)
    changed = service.run(Command("fastserve.controller", ("--insecure", "--log-level=error")), 5)
    assert (changed.num_starts, changed.exit_code) == (2, 0), "it ended in order before the other began"
    assert not is_alive(first)
    until(lambda: answers(service.state))
    service.stop(5)
    assert service.state == ServiceState(None, False, 2, 0)


def test_one_that_dies_is_started_again_after_a_growing_pause(service: ServiceProcess, clock: Clock) -> None:
    broken = Command("fastserve.no_such_module", ())
    for number, pause_s in enumerate((1.0, 2.0, 4.0), start=1):
        assert service.run(broken, 5).num_starts == number
        until(lambda: not service.state.is_running)
        assert service.state.exit_code == 1
        clock.now_s += pause_s - 0.1
        assert service.run(broken, 5).num_starts == number, "too early"
        clock.now_s += 0.2
    # Another command does not wait for the pause of the broken one.
    assert service.run(CONTROLLER, 5).is_running


def test_a_killed_service_comes_back_and_leaves_no_process_of_its_group(service: ServiceProcess, clock: Clock) -> None:
    state = service.run(CONTROLLER, 5)
    until(lambda: answers(service.state))
    os.kill(pid_of(state), signal.SIGKILL)
    until(lambda: not service.state.is_running)
    assert service.state.exit_code == -signal.SIGKILL
    clock.now_s += 1.1
    service.run(CONTROLLER, 5)
    until(lambda: answers(service.state))


def test_a_wanted_port_is_taken_if_it_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        service = ServiceProcess("127.0.0.1", port)
        try:
            address = service.run(CONTROLLER, 5).address
            assert address is not None
            assert not address.endswith(f":{port}")
        finally:
            service.stop(5)


def test_a_service_ends_with_its_parent_however_that_dies() -> None:
    code = (
        "import time\n"
        "from fastserve.fleet.service_process import Command, ServiceProcess\n"
        "service = ServiceProcess('127.0.0.1', None)\n"
        "print(service.run(Command('fastserve.controller', ('--insecure',)), 5).address, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        state = ServiceState(parent.stdout.readline().strip(), True, 1, None)
        until(lambda: answers(state))
        child = pid_of(state)
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not is_alive(child))
