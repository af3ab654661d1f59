"""`--profile-steps N`: a trace of N steps under load, for torch's tools (TensorBoard, HTA), Perfetto or chrome://tracing."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from fastserve.engine.devices.find import find_device

logger = logging.getLogger(__name__)

_WARM_UP_STEPS = 10
"""Steps that are not recorded: first ones compile and allocate what later ones find ready."""


class StepProfiler:
    """Records `num_steps` steps and writes them into `folder`. Each is a "ProfilerStep#n" in the trace."""

    def __init__(self, num_steps: int, folder: Path) -> None:
        self._num_steps = num_steps
        self._folder = folder
        self._left = _WARM_UP_STEPS + num_steps
        activities = [ProfilerActivity.CPU]
        activity = find_device(None).profiler_activity
        if activity is not None:
            activities.append(activity)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=_WARM_UP_STEPS - 1, warmup=1, active=num_steps, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._profile.start()
        logger.info("profile: %d steps will be recorded after %d others", num_steps, _WARM_UP_STEPS)

    def step_done(self) -> None:
        """To be called after each step. Once the trace is written, it does nothing."""
        if self._left:
            self._left -= 1
            self._profile.step()
            if not self._left:
                self._profile.stop()

    def close(self) -> None:
        """Write what has been recorded when fewer steps ran than were asked for."""
        if self._left:
            self._left = 0
            self._profile.stop()

    def _write(self, recorded: profile) -> None:
        path = (self._folder / f"fastserve-{os.getpid()}-{time.strftime('%Y%m%d-%H%M%S')}.pt.trace.json.gz").resolve()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(path))
        except (OSError, RuntimeError):
            # Whatever a profile was good for, the requests that run are worth more.
            logger.exception("profile: %s cannot be written", path)
            return
        logger.info("profile: the trace of %d steps is in %s", self._num_steps, path)
