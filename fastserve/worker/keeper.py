"""Keeps the engine running: starts it, restarts it when it dies, and gives up after too many restarts."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastserve.engine.contract import Engine, EngineInfo, LoadProgress
from fastserve.errors import EngineDeadError, ModelLoadingError, ServiceError, StartupError

logger = logging.getLogger(__name__)

_MIN_RETRY_AFTER_S = 1.0
_MAX_RETRY_AFTER_S = 60.0


@dataclass(frozen=True)
class RestartPolicy:
    """At most `attempts` restarts within `window_s`. The pause before each doubles, from `first_pause_s`."""

    attempts: int = 5
    window_s: float = 300.0
    first_pause_s: float = 0.5
    max_pause_s: float = 30.0


class EngineKeeper:
    def __init__(
        self,
        engine: Engine,
        on_progress: Callable[[LoadProgress], None],
        clock: Callable[[], float],
        policy: RestartPolicy,
    ) -> None:
        self.engine = engine
        self.ready = False
        self.gave_up = False
        """The engine died too often, or a critical task of the worker failed; the process should end."""
        self._reason: str | None = None
        """Cause of the engine's last death; None if it never died."""
        self._progress: LoadProgress | None = None
        self._loading_since = clock()
        self._on_progress = on_progress
        self._clock = clock
        self._policy = policy

    async def start(self) -> EngineInfo:
        """Start the engine for the first time. Raises StartupError."""
        info = await self._start_engine()
        self.ready = True
        return info

    def require_ready(self) -> None:
        """Raises ModelLoadingError or EngineDeadError while the engine is not ready."""
        if not self.ready:
            raise self.unavailable()

    def unavailable(self) -> ServiceError:
        """The error for requests while the engine is not ready, with the time after which to retry."""
        if self._reason is None:
            return ModelLoadingError("The model is being loaded. Try again soon.", retry_after_s=self._remaining_s())
        error = EngineDeadError(f"{self._reason} It is being started again; try again soon.")
        error.retry_after_s = self._remaining_s()
        return error

    def _remaining_s(self) -> float:
        """Estimated time until the engine is ready, from the progress of loading."""
        progress = self._progress
        if progress is None or not progress.done:
            return 2 * _MIN_RETRY_AFTER_S
        elapsed_s = self._clock() - self._loading_since
        remaining_s = elapsed_s * (progress.total - progress.done) / progress.done
        return min(_MAX_RETRY_AFTER_S, max(_MIN_RETRY_AFTER_S, remaining_s))

    async def _start_engine(self) -> EngineInfo:
        self._progress, self._loading_since = None, self._clock()

        def note(progress: LoadProgress) -> None:
            if self._progress is not None and progress.what != self._progress.what:
                self._loading_since = self._clock()
            self._progress = progress
            self._on_progress(progress)

        return await self.engine.start(note)

    async def watch(self, on_change: Callable[[], Awaitable[None]]) -> None:
        """Restart the engine whenever it dies; return after giving up. `on_change` is called when `ready` changes."""
        starts: deque[float] = deque()
        while True:
            self._reason = await self.engine.wait_dead()
            self.ready = False
            logger.error("the engine died: %s", self._reason)
            await on_change()
            if not await self._start_again(starts):
                self.gave_up = True
                return
            self.ready = True
            logger.info("the engine is ready again")
            await on_change()

    async def _start_again(self, starts: deque[float]) -> bool:
        while True:
            now = self._clock()
            while starts and now - starts[0] > self._policy.window_s:
                starts.popleft()
            if len(starts) >= self._policy.attempts:
                logger.error("the engine died again after %d restarts; giving up", len(starts))
                return False
            await asyncio.sleep(min(self._policy.first_pause_s * 2 ** len(starts), self._policy.max_pause_s))
            starts.append(now)
            logger.info("starting the engine again (attempt %d)", len(starts))
            try:
                await self._start_engine()
            except StartupError as error:
                logger.error("the engine did not start: %s", error.message)
            except Exception:  # such as no memory for a process: the next attempt may succeed
                logger.exception("the engine did not start")
            else:
                return True
