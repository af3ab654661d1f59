"""Messages between rank 0, which schedules and samples, and the other ranks, over ZeroMQ as msgpack. No torch here."""

from __future__ import annotations

import msgspec

from fastserve.engine.plan import StepPlan
from fastserve.engine.weight_messages import GroupSettings, WeightSource


class ExecuteStep(msgspec.Struct, frozen=True, tag=True):
    plan: StepPlan
    sampled: dict[int, list[int]]
    """Tokens that rank 0 sampled in the step before, by sequence id."""


class ReadWeight(msgspec.Struct, frozen=True, tag=True):
    """Take part in reading a whole weight."""

    name: str


class WriteWeight(msgspec.Struct, frozen=True, tag=True):
    """Keep this rank's part of a new weight."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class AdapterPart(msgspec.Struct, frozen=True, array_like=True):
    """One rank's part of an adapter (see engine/adapters/reading.py)."""

    tiles: bytes
    first_tile: list[int]
    rank_groups: list[int]


class PlaceAdapter(msgspec.Struct, frozen=True, tag=True):
    """Put an adapter on the device, before the next step."""

    slot: int
    block_ids: list[int]
    part: AdapterPart
    """That of the rank to which it is sent."""


class ClearAdapter(msgspec.Struct, frozen=True, tag=True):
    """Forget the adapter of a slot, before the next step."""

    slot: int


class JoinGroup(msgspec.Struct, frozen=True, tag=True):
    """Join a trainer's process group, in a thread."""

    settings: GroupSettings


class LeaveGroup(msgspec.Struct, frozen=True, tag=True):
    name: str


class ReceiveWeights(msgspec.Struct, frozen=True, tag=True):
    """Receive new weights, in a thread, beside those that compute."""

    source: WeightSource


class CommitWeights(msgspec.Struct, frozen=True, tag=True):
    """Put them in place, if every rank has received them: all ranks say so to each other."""


class DiscardWeights(msgspec.Struct, frozen=True, tag=True):
    """Forget what has been received."""


class EndRank(msgspec.Struct, frozen=True, tag=True):
    pass


WeightCommand = JoinGroup | LeaveGroup | ReceiveWeights | CommitWeights | DiscardWeights
RankCommand = ExecuteStep | ReadWeight | WriteWeight | PlaceAdapter | ClearAdapter | WeightCommand | EndRank
CHANGES_WEIGHTS = (WriteWeight, JoinGroup, ReceiveWeights, CommitWeights)
"""Commands after which a rank that loads the model's files has other weights than the rest, or misses a trainer's
group that the rest are in. Weights may be written while they are received."""
