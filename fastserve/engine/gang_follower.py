"""A rank other than 0 of a model, as a process: it joins rank 0, then does what it says.

Started by ranks/local_ranks.py as `python -m fastserve.engine.gang_follower`. When another rank is lost, it
keeps its weights and joins the next group. It ends at an EndRank, with its parent, and to be started again: when a rank
is lost before it has its weights or after they were set, and after any other error, which leaves its state in doubt.
"""

from __future__ import annotations

import logging
import os

from fastserve.distributed.gang import read_gang_keys
from fastserve.engine.follower import follow, run_rank_process
from fastserve.engine.memory import begin_loading, end_loading
from fastserve.engine.ranks.gang_link import GangLink, RefusedError
from fastserve.engine.ranks.gang_messages import GangRankSettings
from fastserve.engine.ranks.local_ranks import REFUSED_EXIT_CODE
from fastserve.engine.ranks.messages import CHANGES_WEIGHTS, RankCommand
from fastserve.engine.ranks.own_devices import use_own_devices
from fastserve.engine.ranks.processes import MAX_STEP_SILENCE_S, RANK_LOST_EXIT_CODE, SharedProgress
from fastserve.engine.ranks.same_settings import same_settings
from fastserve.engine.start_settings import read_settings
from fastserve.errors import EngineDeadError, FastserveError

logger = logging.getLogger("fastserve.engine")


def main() -> None:
    settings = read_settings(GangRankSettings)
    run_rank_process(settings.parent, settings.config.log_level, lambda: _join_and_follow(settings))


def _join_and_follow(settings: GangRankSettings) -> int:
    """Return the process's exit code."""
    config, gang = settings.config, settings.config.gang
    if gang is None:
        raise ValueError("the settings name no machines")
    use_own_devices(config, settings.rank - gang.local_ranks[0])
    link: GangLink | None = None
    try:
        link = GangLink(gang, settings.rank, read_gang_keys(os.environ), same_settings(config))
        begin_loading()
        member = _Member(settings, link)
        while True:
            code = member.be_in_a_group()
            if code is not None:
                return code
    except RefusedError as error:
        logger.error("%s", error.message)
        return REFUSED_EXIT_CODE
    except (FastserveError, RuntimeError, OSError, ImportError, MemoryError) as error:
        message = error.message if isinstance(error, FastserveError) else str(error)
        logger.exception("rank %d could not start: %s", settings.rank, message)
        if link is not None:
            link.fail(message)
        return 1


class _Member:
    """This rank in one group after the other."""

    def __init__(self, settings: GangRankSettings, link: GangLink) -> None:
        from fastserve.engine.kept_rank import KeptRank

        assert settings.config.gang is not None
        self._rank, self._config, self._gang = settings.rank, settings.config, settings.config.gang
        self._link = link
        self._keys = read_gang_keys(os.environ)
        self._kept = KeptRank(link.keep_weights)
        self._has_new_weights = False

    def be_in_a_group(self) -> int | None:
        """Join a group and follow rank 0 until that ends. Returns the process's exit code, or None when this rank has
        kept its weights for the next group."""
        try:
            code = self._join_and_follow()
            self._kept.close()
            return code
        except EngineDeadError as error:
            logger.info("rank %d leaves its group: %s", self._rank, error.message)
        if not self._kept.can_stay or self._has_new_weights:
            return RANK_LOST_EXIT_CODE
        self._kept.leave()
        return None

    def _join_and_follow(self) -> int:
        from fastserve.engine.build import build_rank
        from fastserve.engine.ranks.join import join_group
        from fastserve.engine.ranks.shared_memory import SharedMemoryCollectives
        from fastserve.engine.sampling.order import LOGITS_PROCESSORS

        link = self._link
        formed = link.wait_formed()
        joined = join_group(self._config, self._gang, self._rank, formed, self._keys, lambda: link.is_lost)
        collectives = self._kept.enter(joined)
        link.watch(collectives.abort)
        progress = link.note_progress
        if self._gang.is_one_machine and isinstance(collectives, SharedMemoryCollectives):
            progress = SharedProgress(collectives.segment, self._rank)
        model = build_rank(self._config, progress, LOGITS_PROCESSORS, collectives, self._kept.load)
        collectives.set_timeout(MAX_STEP_SILENCE_S)
        end_loading()
        return follow(collectives, model, self._receive)

    def _receive(self) -> RankCommand:
        command = self._link.receive()
        self._has_new_weights |= isinstance(command, CHANGES_WEIGHTS)
        return command


if __name__ == "__main__":
    main()
