"""Entries of the logits that a transform changes, collected on the host, so that a batch needs one transfer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Columns = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""Row, token id and a number of each entry."""


@dataclass(frozen=True, slots=True)
class Entries:
    """No entry (row, token id) stands twice in it. On the device."""

    rows: torch.Tensor
    token_ids: torch.Tensor
    numbers: torch.Tensor

    @property
    def at(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As an index of the logits."""
        return self.rows, self.token_ids


def columns(
    parts: Iterable[tuple[int, Sequence[int] | npt.NDArray[Any], Sequence[float] | npt.NDArray[Any]]],
) -> Columns:
    """Join the (row, token ids, numbers) of several rows."""
    found = list(parts)
    rows = [np.full(len(ids), row, dtype=np.int64) for row, ids, _ in found]
    token_ids = [np.asarray(ids, dtype=np.int64) for _, ids, _ in found]
    numbers = [np.asarray(values, dtype=np.float32) for _, _, values in found]
    return (
        np.concatenate(rows or [np.empty(0, dtype=np.int64)]),
        np.concatenate(token_ids or [np.empty(0, dtype=np.int64)]),
        np.concatenate(numbers or [np.empty(0, dtype=np.float32)]),
    )
