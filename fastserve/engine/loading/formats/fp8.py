"""8-bit floats with scales for blocks of 128 x 128 (format of DeepSeek and Qwen): dequantized when loaded.

A layer (out, in) has `weight` float8 (out, in) and `weight_scale_inv` (out / 128, in / 128), which despite its name is
a factor.
"""

from __future__ import annotations

import torch

from fastserve.engine.loading.checkpoint import Tensors
from fastserve.engine.loading.formats.source import Settings, Source, plain_source, source_of
from fastserve.engine.settings import PackedCheckpoint


def sources(tensors: Tensors, settings: Settings, stated: PackedCheckpoint) -> list[Source]:
    block = tuple(settings.get("weight_block_size") or (128, 128))

    def make(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return spread(weight.float(), scale.float(), (block[0], block[1]))

    found = []
    for name, tensor in tensors.items():
        scale = tensors.get(f"{name}_scale_inv")
        if name.endswith(".weight") and scale is not None:
            found.append(source_of(name, (tensor, scale), make))
        elif not name.endswith((".weight_scale_inv", ".activation_scale", ".input_scale")):
            found.append(plain_source(tensor))
    return found


def spread(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Multiply each block of `weight` (out, in), in place, by its `scale` (row blocks, column blocks)."""
    rows, columns = block
    for at in range(scale.shape[0]):
        part = slice(at * rows, (at + 1) * rows)
        weight[part] *= scale[at].repeat_interleave(columns)[: weight.shape[1]]
    return weight
