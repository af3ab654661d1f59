"""Messages between rank 0 and the ranks of other processes that join it over the network. No torch here."""

from __future__ import annotations

import msgspec

from fastserve.engine.ranks.messages import RankCommand
from fastserve.engine.settings import EngineConfig


class GangRankSettings(msgspec.Struct, frozen=True):
    """Sent to a rank other than 0 when its process starts (start_settings.py)."""

    rank: int
    parent: int
    """Process id of the process that has started it."""
    config: EngineConfig


class Join(msgspec.Struct, frozen=True, tag=True):
    """Sent again and again until rank 0 answers with Formed or Refused."""

    rank: int
    settings: dict[str, str]
    """What must be the same on all ranks (same_settings.py)."""
    ip: str
    """Of its machine; where the relays of the machines reach it."""
    pid: int = 0
    """Process id of the rank; rank 0 watches those on its own machine."""
    left_generation: int = 0
    """The last group that it was in, which it has left; 0: none."""


class Beat(msgspec.Struct, frozen=True, tag=True):
    """Sign of life, in both directions."""

    num_bytes_done: int = 0
    """Of this rank's weights."""
    num_bytes: int = 0


class RankFailed(msgspec.Struct, frozen=True, tag=True):
    """This rank cannot start."""

    message: str


class Formed(msgspec.Struct, frozen=True, tag=True):
    """All ranks have joined."""

    generation: int
    """Larger than in any group before."""
    ips: tuple[str, ...]
    """By rank."""
    pid: int = 0
    """Process id of rank 0, which the ranks on its machine watch."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """This rank must not join; it ends."""

    message: str


class Lost(msgspec.Struct, frozen=True, tag=True):
    """Another rank is lost, and with it the group; this one joins again."""

    reason: str


ToRank0 = Join | Beat | RankFailed
FromRank0 = Formed | Refused | Lost | Beat | RankCommand
