"""Traces of steps under load, for torch's tools (TensorBoard, HTA), Perfetto or chrome://tracing."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from fastserve.engine.devices.find import find_device
from fastserve.errors import ConflictError, FastserveError, InternalError

logger = logging.getLogger(__name__)

_MAX_WRITING_S = 600.0
"""Maximum time to start the profiler, or to write a trace."""


class StepProfiler:
    """Records steps and writes traces to `folder`. Each step is a "ProfilerStep#n" in the trace."""

    def __init__(self, folder: Path, announce: Callable[[float], None] = lambda max_silence_s: None) -> None:
        """`announce` is called before a long operation with its maximum duration in seconds."""
        self._folder = folder
        self._announce = announce
        self._profile: profile | None = None
        self._num_left = 0
        self._num_traces = 0
        self._path = folder
        """Path of the last trace, or of the one being recorded."""
        self._failure: FastserveError | None = ConflictError("There is no trace: no profile was started.")
        """Why there is no trace at `_path`; None when there is one."""

    def start(self, num_steps: int, num_warm_up_steps: int) -> str:
        """See calls.handling.Profiler. The warm-up steps, at least one, are not recorded."""
        if self._profile is not None:
            raise ConflictError(f"A profile is being recorded already: {self._path}.")
        self._announce(_MAX_WRITING_S)
        self._num_traces += 1
        name = f"fastserve-{os.getpid()}-{time.strftime('%Y%m%d-%H%M%S')}-{self._num_traces}.pt.trace.json.gz"
        path = (self._folder / name).resolve()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(exist_ok=False)
            path.unlink()
        except OSError as error:
            raise InternalError(
                f"Traces cannot be written to --profile-dir {self._folder}: {error.strerror}."
            ) from error
        activities = [ProfilerActivity.CPU]
        activity = find_device(None).profiler_activity
        if activity is not None:
            activities.append(activity)
        self._path, self._failure = path, ConflictError("There is no trace: no step was recorded.")
        self._num_left = num_warm_up_steps + num_steps
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=num_warm_up_steps - 1, warmup=1, active=num_steps, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._profile.start()
        logger.info("profile: %d steps will be recorded after %d others", num_steps, num_warm_up_steps)
        return str(path)

    def step_done(self) -> None:
        """Called after each step. No effect while no profile is being recorded."""
        if self._profile is not None:
            self._num_left -= 1
            self._profile.step()
            if not self._num_left:
                self.close()

    def stop(self) -> str:
        """See calls.handling.Profiler."""
        self.close()
        if self._failure is not None:
            raise self._failure
        return str(self._path)

    def close(self) -> None:
        """Write the steps recorded so far, if a profile is being recorded."""
        recording, self._profile = self._profile, None
        if recording is not None:
            recording.stop()

    def _write(self, recorded: profile) -> None:
        self._announce(_MAX_WRITING_S)
        try:
            recorded.export_chrome_trace(str(self._path))
        except (OSError, RuntimeError) as error:
            # A failed profile must not fail running requests.
            logger.exception("profile: %s cannot be written", self._path)
            self._failure = InternalError(f"The trace {self._path} could not be written: {error}.")
            return
        self._failure = None
        logger.info("profile: the trace is in %s", self._path)
