"""A launch as the supervisor runs it: either all services start and serve, or all started ones are ended."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from fastserve.errors import StartupError
from fastserve.launching.child import Child, describe_exit
from fastserve.launching.order import Order
from fastserve.launching.plan import ChildSpec
from fastserve.launching.probe import Probe
from fastserve.launching.processes import POLL_S, Mark, end_services, find_services
from fastserve.launching.run_file import ListedService, RunFile
from fastserve.observability.private_files import reason

REGISTRATION_TIMEOUT_S = 30.0
LAUNCH_GRACE_S = 3.0
"""Seconds between SIGTERM and SIGKILL for services of a failed launch: they have no requests to finish."""


class Launch:
    """The services of one launch, as a context manager: an exception inside the block ends all of them.

    `say` is called with each finished line, `show_progress` at every poll with a line that replaces the last one, and
    `check` raises if the launch was cancelled.
    """

    def __init__(
        self,
        order: Order,
        run_file: RunFile,
        own: ListedService,
        probe: Probe,
        say: Callable[[str], None],
        show_progress: Callable[[str], None],
        check: Callable[[], None],
    ) -> None:
        """`own`: the entry of this process in the run file."""
        self._order = order
        self._run_file = run_file
        self._own = own
        self._probe = probe
        self._say = say
        self._show_progress = show_progress
        self._check = check
        self.children: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or not self.children:
            return
        self._say(f"Taking down what was started: {', '.join(child.spec.name for child in self.children)}")
        end_services(find_services(self._order.run_id), LAUNCH_GRACE_S)
        for child in self.children:
            child.process.poll()  # reaps it
        self.children.clear()
        self.remove_run_file()

    def run(self) -> None:
        """Start all services; return when they serve, each worker is registered, and the API server is ready.

        Raises StartupError if that fails.
        """
        services = self._order.services
        controller = self.start(services.controller)
        # A model takes longer to load than a controller to start, and a worker announces itself until it is heard.
        workers = [self.start(spec) for spec in services.workers]
        self._wait_serving([controller])
        self._wait_serving([*workers, self.start(services.server)])
        expected = self._order.num_registered
        timeout_s = min(self._order.wait_timeout_s, REGISTRATION_TIMEOUT_S)
        if not self._wait_for(lambda: self._count_registered() >= expected, timeout_s):
            raise StartupError(
                f"All services run, but after {timeout_s:g} s not all of the {expected} workers have registered with "
                f"the controller; their logs in {self._order.log_dir} say why."
            )
        server = services.server
        if expected and not self._wait_for(lambda: self._probe.get(server, "/ready") is not None, timeout_s):
            raise StartupError(
                f"All services run, but after {timeout_s:g} s the API server knows of no worker; its log {server.log} "
                "says why."
            )

    def start(self, spec: ChildSpec) -> Child:
        """Start one service. Raises StartupError if the log cannot be written or the program cannot be run."""
        self._check()
        try:
            child = Child(spec, mark_of(self._order, spec), self._probe)
        except OSError as error:
            raise StartupError(f"{spec.name} cannot be started: {error.filename or ''} {reason(error)}.") from error
        self.children.append(child)
        self.write_run_file()
        return child

    def write_run_file(self) -> None:
        """List the running processes. If the file cannot be written (a full disk), the launch goes on without it."""
        try:
            self._run_file.write([self._own, *(child.listed for child in self.children)])
        except OSError as error:
            self._say(f"{self._run_file.path} cannot be written ({reason(error)}): the services run without it.")

    def remove_run_file(self) -> None:
        try:
            self._run_file.remove()
        except OSError as error:
            self._say(f"{self._run_file.path} cannot be removed ({reason(error)}).")

    def _wait_serving(self, children: Sequence[Child]) -> None:
        """Wait until `children` serve. Raises StartupError if any service dies or the time is up."""
        started = time.monotonic()
        waiting = list(children)
        timeout_s = self._order.wait_timeout_s
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

    def _wait_for(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until `condition` holds; return False after `timeout_s`. Raises as `_wait_serving` does."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            self._check_children()
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def _check_children(self) -> None:
        self._check()
        for child in self.children:
            exit_code = child.process.poll()
            if exit_code is not None:
                raise StartupError(child.post_mortem(describe_exit(exit_code)))

    def _count_registered(self) -> int:
        body = self._probe.get(self._order.services.controller, "/ready", self._order.controller_headers)
        try:
            return 0 if body is None else int(json.loads(body)["workers"])
        except (ValueError, KeyError, TypeError):
            return 0


def mark_of(order: Order, spec: ChildSpec) -> Mark:
    return Mark(
        order.run_id, order.log_dir, order.server_port, spec.kind, spec.name, spec.port, spec.log, spec.drain_timeout_s
    )
