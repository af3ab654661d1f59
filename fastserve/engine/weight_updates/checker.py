"""Reads the weights that compute, and shows whether an update has written them all."""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch

from fastserve.engine.weight_messages import MAX_SHOWN_VALUES, WeightValues
from fastserve.engine.weight_updates.staging import WeightNames
from fastserve.errors import ConflictError, InvalidRequestError, WeightNotFoundError
from fastserve.observability.text import printable


class Weights(Protocol):
    """Whole weights by the model's names."""

    def names(self) -> list[str]: ...

    def get(self, name: str) -> torch.Tensor: ...

    def set(self, name: str, tensor: torch.Tensor) -> None: ...


class Checker:
    """A `WeightChecker`. Weights are whole, also where several ranks have their parts."""

    def __init__(self, weights: Weights, names: WeightNames) -> None:
        self._weights = weights
        self._names = names
        self._snapshot: dict[str, torch.Tensor] | None = None

    def values(self, name: str, num_rows: int) -> WeightValues:
        """The first rows of a weight, by its name in the checkpoint or in the model. Raises WeightNotFoundError, and
        InvalidRequestError for weights that the model keeps in another form, or too many values."""
        place = self._names.find(name)
        if place is None:
            raise WeightNotFoundError(f"The model has no weight {printable(name)}.", param="name")
        weight = self._weights.get(place.target)
        if place.pattern is not None:
            if place.stack is None:
                raise InvalidRequestError(f"{printable(name)} is a part of {place.target}: ask for that.", param="name")
            expert, part, parts = place.stack
            if expert >= weight.shape[0]:
                raise WeightNotFoundError(f"{place.target} has {weight.shape[0]} experts.", param="name")
            weight = weight[expert].chunk(parts)[part]
        rows = weight[:num_rows]
        if rows.numel() > MAX_SHOWN_VALUES:
            raise InvalidRequestError(
                f"{num_rows} rows of {printable(name)} have {rows.numel()} values, and one answer shows at most "
                f"{MAX_SHOWN_VALUES}: ask for fewer.",
                param="truncate_size",
            )
        dtype = str(weight.dtype).removeprefix("torch.")
        return WeightValues(name, dtype, tuple(weight.shape), rows.float().flatten().tolist())

    def checksum(self) -> str:
        """SHA-256 over the names and bytes of all weights, in the order of their names."""
        digest = hashlib.sha256()
        for name in sorted(self._weights.names()):
            digest.update(name.encode())
            weight = self._weights.get(name).detach().cpu().contiguous()
            digest.update(weight.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def snapshot(self) -> None:
        """Keep a copy of all weights in host memory, for `compare`."""
        self._snapshot = {name: self._weights.get(name).detach().cpu().clone() for name in self._weights.names()}

    def compare(self) -> list[str]:
        """Names of the weights that differ from the snapshot. Raises ConflictError when there is none."""
        if self._snapshot is None:
            raise ConflictError('There is no snapshot to compare with: take one with the action "snapshot".')
        return [name for name, old in self._snapshot.items() if not torch.equal(old, self._weights.get(name).cpu())]

    def randomize(self) -> None:
        """Replace all weights by random numbers."""
        generator = torch.Generator().manual_seed(torch.seed() % (1 << 62))
        for name in self._weights.names():
            weight = self._weights.get(name)
            self._weights.set(name, torch.randn(weight.shape, generator=generator).to(weight.device, weight.dtype))
