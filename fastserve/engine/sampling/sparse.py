"""Sparse changes of logits, for processors that change a few entries of each row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastserve.engine.devices.device import Arrays

Entries = tuple[int, Sequence[int] | npt.NDArray[Any], Sequence[float] | npt.NDArray[Any]]
"""Row, distinct token ids, and a number for each."""


def join_entries(parts: Iterable[Entries]) -> Arrays | None:
    """Rows, token ids and numbers of all entries, as arrays of the same length; None when there are none."""
    found = [part for part in parts if len(part[1])]
    if not found:
        return None
    return (
        np.repeat(np.array([row for row, _, _ in found]), [len(ids) for _, ids, _ in found]),
        np.concatenate([np.asarray(ids, dtype=np.int64) for _, ids, _ in found]),
        np.concatenate([np.asarray(numbers, dtype=np.float32) for _, _, numbers in found]),
    )
