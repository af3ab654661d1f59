"""Restarts services that died, with exponential backoff, and rotates logs that grow too large."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from fastserve.errors import StartupError
from fastserve.launching.child import Child, describe_exit
from fastserve.launching.launch import mark_of
from fastserve.launching.log_files import rotate_in_use
from fastserve.launching.order import Order
from fastserve.launching.plan import ChildSpec
from fastserve.launching.probe import Probe
from fastserve.launching.processes import RunningService, end_services, find_services
from fastserve.launching.run_file import RunFile
from fastserve.observability.logging import Throttle
from fastserve.observability.private_files import reason

logger = logging.getLogger(__name__)

MIN_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0
STABLE_S = 300.0
"""Seconds of service after which the backoff starts again at its shortest pause."""
WARNING_INTERVAL_S = 60.0
ORDERLY = (0, -signal.SIGTERM, -signal.SIGINT, *((-signal.SIGALRM,) if os.name == "posix" else ()))
"""Exit codes of services that were ended on purpose. SIGALRM ends one that hangs after a second SIGTERM."""


class Pauses:
    """Backoff of one service: seconds to wait before each restart."""

    def __init__(self) -> None:
        self._next_s = MIN_PAUSE_S

    def next_s(self, served_s: float) -> float:
        """`served_s`: seconds that the service served before it died."""
        pause_s = MIN_PAUSE_S if served_s >= STABLE_S else self._next_s
        self._next_s = min(2 * pause_s, MAX_PAUSE_S)
        return pause_s


class Watched:
    """One service; `child` is None while it waits for its restart."""

    def __init__(self, child: Child, now_s: float) -> None:
        self.spec: ChildSpec = child.spec
        self.child: Child | None = child
        self.served_since_s: float | None = now_s
        self.starts_at_s = 0.0
        self.pauses = Pauses()


class Restarts:
    """Watches the services of a launch that serves. `step` is to be called at a short interval."""

    def __init__(
        self,
        order: Order,
        run_file: RunFile,
        children: list[Child],
        probe: Probe,
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`children` is updated at each restart and end of a service, and `on_change` is called after each update."""
        self._order = order
        self._run_file = run_file
        self._children = children
        self._probe = probe
        self._on_change = on_change
        self._clock = clock
        self._rotation_warnings = Throttle(WARNING_INTERVAL_S, clock)
        self._watched = [Watched(child, clock()) for child in children]

    @property
    def has_ended(self) -> bool:
        """Whether all services have ended for good."""
        return not self._watched

    def step(self) -> None:
        for watched in list(self._watched):
            if watched.child is None:
                self._start_again(watched)
            else:
                self._look(watched, watched.child)

    def rotate_logs(self, extra: Path) -> None:
        """Rotate the services' logs and `extra` if they have grown too large."""
        for log in (*(Path(watched.spec.log) for watched in self._watched), extra):
            try:
                if log.lstat().st_size > self._order.log_max_bytes:
                    rotate_in_use(log, self._order.log_keep)
            except FileNotFoundError:
                continue
            except OSError as error:
                if self._rotation_warnings.passes():
                    logger.warning("%s cannot be rotated: %s", log, reason(error))

    def _look(self, watched: Watched, child: Child) -> None:
        exit_code = child.process.poll()
        if exit_code is None:
            if watched.served_since_s is None and child.serves():
                watched.served_since_s = self._clock()
                logger.info("%s serves again at %s", child.spec.name, child.spec.address)
            return
        error = child.last_error()
        event = f"{child.spec.name} (process {child.process.pid}) {describe_exit(exit_code)}"
        watched.child = None
        self._children.remove(child)
        self._on_change()
        if exit_code in ORDERLY or self._is_stopped(watched.spec):
            logger.info("%s: it was ended on purpose, and is not started again", event)
            self._watched.remove(watched)
            return
        if error is not None:
            event = f"{event}: {error.rstrip('.')}"
        if self._order.restart:
            self._pause(watched, event)
        else:
            logger.error("%s. It is not started again (--no-restart).", event)
            self._watched.remove(watched)

    def _pause(self, watched: Watched, event: str) -> None:
        now_s = self._clock()
        served_s = 0.0 if watched.served_since_s is None else now_s - watched.served_since_s
        pause_s = watched.pauses.next_s(served_s)
        watched.served_since_s = None
        watched.starts_at_s = now_s + pause_s
        logger.error("%s. It is started again in %g s.", event, pause_s)

    def _start_again(self, watched: Watched) -> None:
        if self._is_stopped(watched.spec):
            logger.info("%s is being shut down, and is not started again", watched.spec.name)
            self._watched.remove(watched)
            return
        if self._clock() < watched.starts_at_s:
            return
        try:
            # An engine that outlived its worker would keep the memory that the next one needs.
            end_services(self._leftovers(watched.spec), grace_s=0.0)
            child = Child(watched.spec, mark_of(self._order, watched.spec), self._probe)
        except (OSError, StartupError) as error:
            why = error.message if isinstance(error, StartupError) else reason(error)
            self._pause(watched, f"{watched.spec.name} cannot be started: {why}")
            return
        watched.child = child
        self._children.append(child)
        self._on_change()
        logger.info("%s is started again (process %d)", watched.spec.name, child.process.pid)

    def _leftovers(self, spec: ChildSpec) -> list[RunningService]:
        mark = mark_of(self._order, spec)
        return [service for service in find_services(self._order.run_id) if service.mark == mark]

    def _is_stopped(self, spec: ChildSpec) -> bool:
        return spec.kind in self._run_file.read_stopped()
