"""The parts of whole tensors that ranks hold, and the whole tensor from all parts."""

from __future__ import annotations

import torch

from fastserve.engine.loading.sharding import Shard, Sharding


def take(shard: Shard, whole: torch.Tensor) -> torch.Tensor:
    """One rank's part. A view where it is a single range."""
    parts = [whole.narrow(shard.dim, begin, end - begin) for begin, end in shard.ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=shard.dim)


def join(sharding: Sharding, parts: torch.Tensor) -> torch.Tensor:
    """The whole weight from all ranks' parts, concatenated in rank order."""
    if sharding.is_concatenation:
        return parts
    whole = parts.new_empty(sharding.whole)
    at = 0
    for begin, end in (pair for ranges in sharding.ranges for pair in ranges):
        whole.narrow(sharding.dim, begin, end - begin).copy_(parts.narrow(sharding.dim, at, end - begin))
        at += end - begin
    return whole
