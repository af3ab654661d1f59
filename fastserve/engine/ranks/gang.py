"""Rank 0's view of all other ranks. No torch here."""

from __future__ import annotations

import os

from fastserve.distributed.gang import Gang, read_gang_keys
from fastserve.distributed.keys import CurveKeys
from fastserve.engine.ranks.gang_hub import GangHub
from fastserve.engine.ranks.messages import CHANGES_WEIGHTS, RankCommand
from fastserve.engine.ranks.processes import Report
from fastserve.engine.ranks.same_settings import same_settings
from fastserve.engine.settings import EngineConfig


class GangRanks:
    """The ranks that join this one. Must be closed."""

    def __init__(self, config: EngineConfig, gang: Gang) -> None:
        """Raises StartupError when the port for the others cannot be bound."""
        self.gang = gang
        self.keys: CurveKeys | None = read_gang_keys(os.environ)
        self.hub = GangHub(gang, self.keys, same_settings(config))
        self.has_new_weights = False
        """Whether weights were set since they were loaded, so that a rank that loads now would have others."""

    def send(self, command: RankCommand, rank: int | None = None) -> None:
        """Send a command to each rank, or to one, without waiting."""
        if isinstance(command, CHANGES_WEIGHTS):
            self.has_new_weights = True
        self.hub.send(command, rank)

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
        """Leave the other ranks, which then wait for a new rank 0. May be called twice."""
        self.hub.close()
