"""Relative speeds of workers.

The relative speed of a measured worker is its tokens per second divided by the mean of its group: the measured workers
that it shares models with, directly or through others. So 1 is an average worker. A worker that is not measured keeps
the speed that it claims (FastChat's workers all claim 1). With one mean for the group, a worker has the same speed for
all of its models.

Running sums are kept, so the cost of a heartbeat does not depend on the number of workers. A change of the mean changes
all speeds of the group: small groups are rescaled at once, large ones at most every RESCALE_S, and only for a change of
RESCALE_CHANGE.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

SMALL_GROUP = 32
RESCALE_S = 1.0
RESCALE_CHANGE = 0.01
"""Relative change of a large group's mean from which on the group is rescaled."""


@dataclass(slots=True, eq=False)
class _Group:
    """Workers that share models, directly or through others."""

    models: set[str]
    members: dict[str, None] = field(default_factory=dict)
    total: float = 0.0
    """Sum of the measured members' tokens per second."""
    num_measured: int = 0
    scale: float | None = None
    """Mean that the members' relative speeds were last computed with; None: no member is measured."""
    scaled_at: float = float("-inf")
    may_split: bool = False
    """A member has left that may have been the only one to connect two models."""

    @property
    def mean(self) -> float | None:
        return self.total / self.num_measured if self.num_measured and self.total > 0 else None


@dataclass(slots=True)
class _Member:
    models: tuple[str, ...]
    rate: float
    """Tokens per second; 0: not measured."""
    claimed: float
    group: _Group


class WorkerSpeeds:
    def __init__(self) -> None:
        self._members: dict[str, _Member] = {}
        self._group_of: dict[str, _Group] = {}
        """By model name."""

    def speed(self, address: str) -> float:
        member = self._members[address]
        scale = member.group.scale
        return member.rate / scale if member.rate and scale else member.claimed

    def set(
        self, address: str, models: Collection[str], tokens_per_s: float | None, claimed: float, now: float
    ) -> Iterable[str]:
        """Add or update a worker; returns the workers, including this one, whose speed has changed."""
        rate, names = tokens_per_s or 0.0, tuple(models)
        member = self._members.get(address)
        if member is not None and member.models == names:
            if member.rate == rate and member.claimed == claimed:
                return self._rescale(member.group, now) or ()
            _subtract(member)
            member.rate, member.claimed = rate, claimed
            _add(member)
            return self._rescale(member.group, now) or (address,)
        changed = [] if member is None else list(self.remove(address, now))
        group = self._join(names)
        member = self._members[address] = _Member(names, rate, claimed, group)
        group.members[address] = None
        _add(member)
        return [*changed, *(self._rescale(group, now) or (address,))]

    def remove(self, address: str, now: float) -> Iterable[str]:
        """Remove a worker; returns the workers whose speed has changed."""
        member = self._members.pop(address, None)
        if member is None:
            return ()
        group = member.group
        _subtract(member)
        del group.members[address]
        if not group.members:
            for name in group.models:
                del self._group_of[name]
            return ()
        # A worker with one model connects no models.
        group.may_split = group.may_split or len(member.models) > 1
        return self._rescale(group, now) or ()

    def _join(self, models: Collection[str]) -> _Group:
        """Merge all groups that have one of these models; returns the merged group."""
        groups = {id(group): group for name in models if (group := self._group_of.get(name)) is not None}
        ordered = sorted(groups.values(), key=lambda group: len(group.members), reverse=True)
        largest = ordered[0] if ordered else _Group(set())
        for group in ordered[1:]:
            for address in group.members:
                self._members[address].group = largest
            largest.members.update(group.members)
            largest.total += group.total
            largest.num_measured += group.num_measured
            largest.may_split = largest.may_split or group.may_split
            largest.scaled_at = float("-inf")
            for name in group.models:
                self._group_of[name] = largest
            largest.models |= group.models
        for name in models:
            if name not in largest.models:
                largest.models.add(name)
                self._group_of[name] = largest
        return largest

    def _rescale(self, group: _Group, now: float) -> list[str] | None:
        """Recompute the group's scale if that is due; returns its members then (all speeds change), else None."""
        mean = group.mean
        is_small = len(group.members) <= SMALL_GROUP
        if not is_small and now - group.scaled_at < RESCALE_S:
            return None
        if group.may_split:
            return self._split(group, now)
        if mean == group.scale:
            return None
        is_close = mean is not None and group.scale is not None and abs(mean / group.scale - 1) < RESCALE_CHANGE
        if is_close and not is_small:
            return None
        # Summed again: thousands of changes leave rounding errors in a running sum.
        rates = [rate for address in group.members if (rate := self._members[address].rate)]
        group.total, group.num_measured = sum(rates), len(rates)
        group.scale, group.scaled_at = group.mean, now
        return list(group.members)

    def _split(self, group: _Group, now: float) -> list[str]:
        """Rebuild the groups of these members."""
        for name in group.models:
            del self._group_of[name]
        members = {address: self._members[address] for address in group.members}
        fresh: dict[int, _Group] = {}
        for address, member in members.items():
            member.group = self._join(member.models)
            member.group.members[address] = None
            _add(member)
        for member in members.values():
            fresh[id(member.group)] = member.group
        for part in fresh.values():
            part.scale, part.scaled_at = part.mean, now
        return list(members)


def _add(member: _Member) -> None:
    if member.rate:
        member.group.total += member.rate
        member.group.num_measured += 1


def _subtract(member: _Member) -> None:
    if member.rate:
        member.group.total -= member.rate
        member.group.num_measured -= 1
