"""How fast workers are, compared with each other."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from fastserve.protocol import WorkerStatus


def relative_speeds(statuses: Mapping[str, WorkerStatus]) -> dict[str, float]:
    """Speed by address. A measured worker's is its tokens per second over the mean of the measured ones that it shares
    models with (directly or through others), so 1 is an average worker; one that is not measured keeps the speed that
    it claims (FastChat's workers all claim 1).
    """
    speeds = {address: max(0.0, status.speed) for address, status in statuses.items()}
    for group in _groups(statuses):
        measured = {address: rate for address in group if (rate := statuses[address].tokens_per_s)}
        if measured:
            mean = fmean(measured.values())
            speeds.update({address: rate / mean for address, rate in measured.items()})
    return speeds


def _groups(statuses: Mapping[str, WorkerStatus]) -> list[list[str]]:
    """Addresses, grouped so that two workers that serve a common model are always in the same group.

    One scale for a whole group keeps each worker's speed a single number, whichever of its models is asked for.
    """
    groups: list[tuple[set[str], list[str]]] = []
    for address, status in statuses.items():
        models, members = set(status.model_names), [address]
        separate = []
        for other_models, other_members in groups:
            if models.isdisjoint(other_models):
                separate.append((other_models, other_members))
            else:
                models |= other_models
                members += other_members
        groups = [*separate, (models, members)]
    return [members for _, members in groups]
