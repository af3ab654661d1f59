"""The inputs of one forward pass: the new tokens of all sequences of a step, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastserve.engine.adapters.batch import AdapterBatch
from fastserve.engine.attention.metadata import AttentionMetadata


@dataclass(frozen=True, slots=True)
class PackedStep:
    input_ids: npt.NDArray[np.int64]
    """(tokens,); a negative id is the placeholder of one that the last step sampled (see sampled_ids.py)"""
    positions: npt.NDArray[np.int64]
    """(tokens,)"""
    logit_rows: npt.NDArray[np.int64]
    """(rows,) rows of the batch to compute logits for; at least one"""
    metadata: AttentionMetadata
    adapters: AdapterBatch | None = None
    """Rows with adapters; None: all are of the bare base model."""
