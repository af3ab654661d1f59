"""The parameters of a batch of rows on the device. A batch seldom changes from one step to the next, so they stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fastserve.engine.contract import SamplingParams
from fastserve.engine.sampling import bias
from fastserve.engine.transfers import to_device


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of the batch."""

    numbers: list[int]
    index: torch.Tensor | None
    """The same on the device; None: all rows of the batch, in order."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of a tensor (rows of the batch, ...)."""
        return tensor if self.index is None else tensor[self.index]


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are drawn from at once and alike. The columns are (rows, 1) in float32."""

    rows: Rows
    temperature: torch.Tensor
    is_filtered: bool
    has_typical: bool
    top_k: torch.Tensor
    """The whole vocabulary where it is off."""
    top_p: torch.Tensor
    min_p: torch.Tensor
    typical_p: torch.Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    params: list[SamplingParams]
    vocabulary: int
    changing: list[int]
    """Rows whose logits may be changed by bias, bans and penalties."""
    groups: list[Group]
    """Of all rows that are not greedy."""
    telling: Rows
    """Rows that want logprobs,"""
    counts: list[int]
    """and how many likeliest tokens each."""

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocabulary: int, most_rows: int, device: torch.device) -> Batch:
        """`most_rows` of a group."""
        drawn = [index for index, one in enumerate(params) if one.temperature > 0 and one.top_k != 1]
        parts = []
        for is_filtered in (False, True):
            some = [index for index in drawn if _is_filtered(params[index]) is is_filtered]
            parts += [(is_filtered, some[begin : begin + most_rows]) for begin in range(0, len(some), most_rows)]
        telling = [index for index, one in enumerate(params) if one.logprobs is not None]
        indices = [np.array(rows, dtype=np.int64) for rows in (telling, *(rows for _, rows in parts))]
        columns = [_columns([params[row] for row in rows], vocabulary) for _, rows in parts]
        moved = to_device([*indices, *columns], device)

        def rows_of(numbers: list[int], index: torch.Tensor) -> Rows:
            return Rows(numbers, None if len(numbers) == len(params) else index)

        return cls(
            list(params),
            vocabulary,
            [index for index, one in enumerate(params) if bias.concerns(one) or one.has_penalties],
            [
                Group(
                    rows_of(rows, index),
                    column[0],
                    is_filtered,
                    any(params[row].typical_p < 1.0 for row in rows),
                    *column[1:],
                )
                for (is_filtered, rows), index, column in zip(
                    parts, moved[1 : 1 + len(parts)], moved[1 + len(parts) :], strict=True
                )
            ],
            rows_of(telling, moved[0]),
            [params[row].logprobs or 0 for row in telling],
        )


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0 or params.typical_p < 1.0


def _columns(params: Sequence[SamplingParams], vocabulary: int) -> npt.NDArray[np.float32]:
    """(5, rows, 1) in the order of Group's columns."""
    values = [(one.temperature, one.top_k or vocabulary, one.top_p, one.min_p, one.typical_p) for one in params]
    return np.ascontiguousarray(np.array(values, dtype=np.float32).T)[:, :, None]
