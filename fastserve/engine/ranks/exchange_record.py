"""The results of the exchanges between ranks while they loaded a model.

They have the same bits on all ranks. So a rank that replaces a lost one loads by itself: it takes the results from the
record of a rank that has kept its weights, in the same order, and comes to the same layers, scales and reference logits
as the rank that it replaces.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from safetensors.torch import load, save

from fastserve.errors import StartupError

_DIFFERENT = (
    "This rank has loaded another model than the other ranks, which have kept theirs: its files were changed. Start "
    "all ranks again."
)


class ExchangeRecord:
    """Filled by the first ranks, or read by one that comes later."""

    def __init__(self, results: list[torch.Tensor] | None = None) -> None:
        """`results`: to be read; None: an empty record, to be filled."""
        self._results: list[torch.Tensor] = [] if results is None else results
        self._next: int | None = None if results is None else 0

    def result(self, exchange: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The result of the next exchange, which is made only where it is not recorded yet."""
        if self._next is None:
            found = exchange()
            self._results.append(found.cpu().clone())
            return found
        if self._next == len(self._results):
            raise StartupError(_DIFFERENT)
        self._next += 1
        return self._results[self._next - 1].clone()

    def require_end(self) -> None:
        """Raises StartupError when results are left, which the ranks before have exchanged."""
        if self._next is not None and self._next < len(self._results):
            raise StartupError(_DIFFERENT)

    def to_bytes(self) -> torch.Tensor:
        """One tensor of bytes, from which `from_bytes` makes the record."""
        data = save({str(index): result.contiguous() for index, result in enumerate(self._results)})
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    @classmethod
    def from_bytes(cls, data: torch.Tensor) -> ExchangeRecord:
        """A record to be read."""
        by_index = load(data.numpy().tobytes())
        return cls([by_index[str(index)] for index in range(len(by_index))])
