"""The weights of one rank through the groups of ranks that it is in.

When another rank is lost, this one leaves the group and keeps its weights; the KV cache, and with it the prefix cache
and adapters on the device, belong to the group and are dropped. In the next group only ranks without weights load. Then
all allocate and check as at the first start, so a rank whose weights do not fit the others' serves nothing.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence

import torch

from fastserve.engine.build import LoadedRank, load_rank
from fastserve.engine.loading.streaming import Progress
from fastserve.engine.memory import begin_loading, return_freed_memory
from fastserve.engine.ranks.collectives import Collectives
from fastserve.engine.ranks.exchange_record import ExchangeRecord
from fastserve.engine.ranks.join import RankCollectives
from fastserve.engine.ranks.shared_memory import SharedMemoryCollectives
from fastserve.engine.settings import EngineConfig

logger = logging.getLogger(__name__)


class KeptRank:
    def __init__(self, on_loaded: Callable[[], None] = lambda: None) -> None:
        """`on_loaded`: called once, when this rank has weights that it can keep."""
        self._on_loaded = on_loaded
        self._collectives: RankCollectives | None = None
        self._loaded: LoadedRank | None = None
        self._record: ExchangeRecord | None = None
        self._progress: tuple[str, int, int] | None = None

    @property
    def can_stay(self) -> bool:
        """Whether this rank has weights that it can keep. Process groups of torch cannot be formed again reliably."""
        return self._loaded is not None

    def enter(self, joined: RankCollectives) -> RankCollectives:
        """Enter a group; return the collectives for this rank's layers, the same object in each group."""
        if isinstance(self._collectives, SharedMemoryCollectives) and isinstance(joined, SharedMemoryCollectives):
            self._collectives.enter(joined)
        else:
            self._collectives = joined
        return self._collectives

    def load(self, config: EngineConfig, progress: Progress, collectives: Collectives) -> LoadedRank:
        """This rank's weights, which are loaded if it has none. All ranks of the group call this together."""
        if not isinstance(collectives, SharedMemoryCollectives):
            return load_rank(config, progress, collectives)
        has_weights = collectives.all_gather(torch.tensor([self._loaded is not None])).tolist()
        if any(has_weights):
            self._share_record(collectives, has_weights)
        if self._loaded is not None:
            if self._progress is not None:
                progress(*self._progress)
            logger.info("rank %d has kept its weights", collectives.rank)
            return self._loaded
        self._loaded = self._load(config, progress, collectives)
        self._on_loaded()
        return self._loaded

    def _share_record(self, collectives: SharedMemoryCollectives, has_weights: Sequence[bool]) -> None:
        """Give the first record to the ranks without one."""
        is_giver = collectives.rank == has_weights.index(True)
        own = self._record.to_bytes() if is_giver and self._record is not None else torch.empty(0, dtype=torch.uint8)
        data = collectives.all_gather(own)
        if self._record is None:
            self._record = ExchangeRecord.from_bytes(data)

    def _load(self, config: EngineConfig, progress: Progress, collectives: SharedMemoryCollectives) -> LoadedRank:
        def note(what: str, done: int, total: int) -> None:
            self._progress = (what, done, total)
            progress(what, done, total)

        record = self._record or ExchangeRecord()
        with collectives.recorded(record):
            loaded = load_rank(config, note, collectives)
        record.require_end()
        self._record = record
        return loaded

    def leave(self) -> None:
        """Leave the group, which is lost. The caller has dropped everything that belongs to it."""
        collectives = self._collectives
        if isinstance(collectives, SharedMemoryCollectives):
            collectives.abort()
        self.close()
        # What the last group allocated is in frozen cycles.
        gc.unfreeze()
        gc.collect()
        return_freed_memory()
        begin_loading()

    def close(self) -> None:
        """Leave the group in order, at the end of the process. May be called twice."""
        if self._collectives is not None:
            self._collectives.close()
