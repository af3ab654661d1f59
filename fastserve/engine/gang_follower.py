"""A rank other than 0 in a group of several machines: it joins rank 0 over the network, then does what it says.

Started by ranks/local_ranks.py as `python -m fastserve.engine.gang_follower SETTINGS`. It ends when any rank of the
group is lost, and is started again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path

import msgspec

from fastserve.distributed.gang import read_gang_keys
from fastserve.engine.follower import follow, run_rank_process
from fastserve.engine.memory import begin_loading, end_loading
from fastserve.engine.ranks.gang_link import GangLink, RefusedError
from fastserve.engine.ranks.gang_messages import GangRankSettings
from fastserve.engine.ranks.local_ranks import REFUSED_EXIT_CODE
from fastserve.engine.ranks.own_devices import use_own_devices
from fastserve.engine.ranks.processes import MAX_STEP_SILENCE_S, RANK_LOST_EXIT_CODE
from fastserve.engine.ranks.same_settings import same_settings
from fastserve.errors import EngineDeadError, FastserveError

logger = logging.getLogger("fastserve.engine")


def main() -> None:
    settings = msgspec.json.decode(sys.argv[1], type=GangRankSettings)
    run_rank_process(settings.parent, settings.config.log_level, lambda: _join_and_follow(settings))


def _join_and_follow(settings: GangRankSettings) -> int:
    """Return the process's exit code."""
    config, gang = settings.config, settings.config.gang
    if gang is None:
        raise ValueError("the settings name no machines")
    keys = read_gang_keys(os.environ)
    use_own_devices(config, settings.rank - gang.local_ranks[0])
    link: GangLink | None = None
    try:
        link = GangLink(gang, settings.rank, keys, same_settings(config))
        begin_loading()
        from fastserve.engine.build import build_rank
        from fastserve.engine.ranks.join import join_machines, uses_nccl
        from fastserve.engine.sampling.order import LOGITS_PROCESSORS

        collectives = join_machines(
            gang, settings.rank, link.wait_formed(), keys, Path(settings.folder), nccl=uses_nccl(config)
        )
        model = build_rank(config, link.note_progress, LOGITS_PROCESSORS, collectives)
        collectives.set_timeout(MAX_STEP_SILENCE_S)
    except RefusedError as error:
        logger.error("%s", error.message)
        return REFUSED_EXIT_CODE
    except EngineDeadError as error:
        logger.info("rank %d ends while it starts: %s", settings.rank, error.message)
        return RANK_LOST_EXIT_CODE
    except (FastserveError, RuntimeError, OSError, ImportError, MemoryError) as error:
        message = error.message if isinstance(error, FastserveError) else str(error)
        logger.exception("rank %d could not start: %s", settings.rank, message)
        if link is not None:
            link.fail(message)
        return 1
    end_loading()
    with contextlib.closing(collectives):
        return follow(collectives, model, link.receive)


if __name__ == "__main__":
    main()
