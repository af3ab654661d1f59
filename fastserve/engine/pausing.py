"""Pausing and resuming an engine: the state behind the calls `Pause` and `Resume`, for all engines."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Literal, Protocol

import msgspec

from fastserve.engine.contract import RequestOutput
from fastserve.errors import ConflictError

PauseMode = Literal["keep", "wait", "abort"]


class PauseState(msgspec.Struct, frozen=True):
    """The reply to `Pause` and `Resume`."""

    paused: bool
    num_running: int
    """Requests that have begun; they keep their blocks while paused."""
    num_waiting: int
    """Requests that have not begun; they stay in the queue while paused."""
    num_aborted: int = 0


class PausableScheduler(Protocol):
    """The part of a scheduler that pausing needs (see scheduler.Scheduler)."""

    @property
    def num_requests(self) -> int: ...

    @property
    def num_begun(self) -> int: ...

    @property
    def has_work(self) -> bool: ...

    def hold_new(self) -> None: ...

    def release_new(self) -> None: ...

    def abort_begun(self) -> list[RequestOutput]: ...


class Pausing:
    """Requests that have not begun are held in every mode, so that clients who come and go leave nothing behind."""

    def __init__(self, scheduler: PausableScheduler) -> None:
        self._scheduler = scheduler
        self._mode: PauseMode | None = None
        self._waiters: list[Future[PauseState]] = []
        self._num_holds = 0

    def hold(self) -> None:
        """Have requests that have not begun wait until `release`, whether the engine is paused or not."""
        self._num_holds += 1
        self._scheduler.hold_new()

    def release(self) -> None:
        self._num_holds -= 1
        self._release_new()

    @property
    def is_pausing(self) -> bool:
        """Requests that had begun are still being finished."""
        return self._mode == "wait" and self._scheduler.has_work

    @property
    def is_paused(self) -> bool:
        """No step may be computed."""
        return self._mode is not None and not self.is_pausing

    def pause(self, mode: PauseMode, send: Callable[[list[RequestOutput]], None]) -> Future[PauseState]:
        """Pause, or change the mode of a pause. The future is done once no step is computed any more; it fails with
        ConflictError when another call changes the mode before. `send` gets the last outputs of aborted requests.
        """
        if mode != "wait":
            self._fail_waiters()
        self._mode = mode
        self._scheduler.hold_new()
        aborted = self._scheduler.abort_begun() if mode == "abort" else []
        send(aborted)
        paused: Future[PauseState] = Future()
        if self.is_pausing:
            self._waiters.append(paused)
        else:
            paused.set_result(self._state(len(aborted)))
        return paused

    def resume(self) -> PauseState:
        """Resume. No effect when the engine is not paused."""
        self._fail_waiters()
        if self._mode is not None:
            self._mode = None
            self._release_new()
        return self._state()

    def update(self) -> None:
        """Complete pauses that are reached. Called after each step and after aborts."""
        if self._waiters and not self.is_pausing:
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                waiter.set_result(self._state())

    def _release_new(self) -> None:
        if self._mode is None and not self._num_holds:
            self._scheduler.release_new()

    def _fail_waiters(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.set_exception(
                ConflictError("Another call resumed the engine, or paused it in another mode, before all had finished.")
            )

    def _state(self, num_aborted: int = 0) -> PauseState:
        scheduler = self._scheduler
        return PauseState(
            self.is_paused, scheduler.num_begun, scheduler.num_requests - scheduler.num_begun, num_aborted
        )
