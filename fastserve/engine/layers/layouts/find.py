"""Choice of the fastest layout for a dense weight."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from fastserve.engine.devices.find import device_of
from fastserve.engine.layers.layouts.layout import WeightLayout
from fastserve.engine.layers.layouts.onednn import OneDnnWeight
from fastserve.engine.layers.layouts.packed import GroupedWeight, split_rows
from fastserve.engine.layers.layouts.plain import PlainWeight


def is_mapped(weight: torch.Tensor) -> bool:
    """Whether the weight is memory-mapped from a file. Such a weight is not packed, since that would load it into
    memory."""
    return weight.device.type == "cpu" and weight.untyped_storage().filename is not None


def layout_of(weight: torch.Tensor) -> WeightLayout:
    """The fastest layout for this weight."""
    if is_mapped(weight) or not device_of(weight.device).packs_weights:
        return PlainWeight(weight)
    layouts = (OneDnnWeight, GroupedWeight) if _has_matrix_unit(weight.dtype) else (GroupedWeight, OneDnnWeight)
    return layouts[0].of(weight) or layouts[1].of(weight) or PlainWeight(weight)


@functools.cache
def _has_matrix_unit(dtype: torch.dtype) -> bool:
    if dtype is not torch.bfloat16:
        return False
    has_amx: bool = torch.cpu._is_amx_tile_supported()
    return has_amx


def joint_layout(weights: Sequence[torch.Tensor]) -> tuple[WeightLayout, list[WeightLayout]]:
    """One layout for the weights of layers with the same input, and each layer's part of it."""
    whole: WeightLayout | None = None
    packs = device_of(weights[0].device).packs_weights and not any(is_mapped(weight) for weight in weights)
    if packs and not _has_matrix_unit(weights[0].dtype):
        whole = GroupedWeight.joint(weights)
    if whole is None:
        whole = layout_of(torch.cat(list(weights)))
    return whole, split_rows(whole, weights)
