"""Rank 0's view of all other ranks in a group of several machines. No torch here."""

from __future__ import annotations

import os
from pathlib import Path

from fastserve.distributed.gang import Gang, read_gang_keys
from fastserve.distributed.keys import CurveKeys
from fastserve.engine.ranks.gang_hub import GangHub
from fastserve.engine.ranks.local_ranks import LocalRanks
from fastserve.engine.ranks.messages import RankCommand
from fastserve.engine.ranks.processes import Report
from fastserve.engine.ranks.same_settings import same_settings
from fastserve.engine.settings import EngineConfig


class GangRanks:
    """The ranks on this machine, which it starts, and those of other machines, which join. Must be closed."""

    def __init__(self, config: EngineConfig, gang: Gang) -> None:
        """Raises StartupError when the port for the others cannot be bound."""
        self.gang = gang
        self.keys: CurveKeys | None = read_gang_keys(os.environ)
        self.hub = GangHub(gang, self.keys, same_settings(config))
        self._local = LocalRanks(gang.local_ranks[1:], config, dict(os.environ))

    @property
    def folder(self) -> Path:
        """Where the ranks of this machine meet."""
        return self._local.folder

    def send(self, command: RankCommand, rank: int | None = None) -> None:
        """Send a command to each rank, or to one, without waiting."""
        self.hub.send(command, rank)

    def serving(self) -> None:
        """Call it once the model is ready: from now on this process ends when a rank is lost."""
        self.hub.serving()

    def reason_of_failed_start(self) -> str | None:
        """Message for the user when a rank could not start; None when none failed."""
        return self.hub.reason_of_failed_start()

    def shared_progress(self, report: Report) -> Report:
        """A progress callback of loading on rank 0, which reports the progress of all ranks."""

        def progress(what: str, done: int, total: int) -> None:
            others_done, others_total = self.hub.progress()
            report(what, done + others_done, max(total * self.gang.size, total + others_total))

        return progress

    def close(self) -> None:
        """End all ranks. May be called twice."""
        self.hub.close()
        self._local.close()
