"""Empty the prefix cache."""

from __future__ import annotations

import msgspec

from fastserve.engine.calls.handling import CallContext, CallHandler
from fastserve.engine.contract import Call


class PrefixCacheReset(msgspec.Struct, frozen=True):
    num_blocks: int
    """Blocks removed from the prefix cache."""
    num_preempted: int
    """Running requests that are recomputed."""


class ResetPrefixCache(Call[PrefixCacheReset], frozen=True):
    """Remove all blocks from the prefix cache. Running requests go on with the blocks that they hold."""

    reset_running_requests: bool = False
    """Preempt running requests too: they keep their tokens, whose KV cache is recomputed."""


def _reset(call: ResetPrefixCache, context: CallContext) -> PrefixCacheReset:
    done = context.scheduler.reset_prefix_cache(reset_running_requests=call.reset_running_requests)
    return PrefixCacheReset(done.num_blocks, done.num_preempted)


HANDLERS = (CallHandler(ResetPrefixCache, _reset),)
