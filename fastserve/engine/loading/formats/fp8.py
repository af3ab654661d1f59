"""8-bit floats with scales, in the format of DeepSeek, Qwen and Mistral: dequantized when loaded.

A weight (out, in), or (experts, out, in), in float8 has a tensor with the suffix `_scale_inv`, which despite its name
is a factor: one for each block of 128 x 128 (out / 128, in / 128), for each output (out, 1), or for the whole weight.
"""

from __future__ import annotations

from functools import partial

import torch

from fastserve.engine.loading.checkpoint import Tensors
from fastserve.engine.loading.formats.source import Settings, Source, plain_source, source_of
from fastserve.engine.loading.sharding import Shard
from fastserve.engine.settings import PackedCheckpoint


def sources(tensors: Tensors, settings: Settings, stated: PackedCheckpoint) -> list[Source]:
    rows, columns = settings.get("weight_block_size") or (128, 128)

    def make(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return scaled(weight.float(), scale.float(), (int(rows), int(columns)))

    found = []
    for name, tensor in tensors.items():
        scale = tensors.get(f"{name}_scale_inv")
        if scale is not None:
            found.append(source_of(name, (tensor, scale), make, partial(_divide, tensor.shape, scale.shape)))
        elif not name.endswith(("_scale_inv", "activation_scale", "input_scale")):
            found.append(plain_source(tensor))
    return found


def _divide(weight: tuple[int, ...], scale: tuple[int, ...], shard: Shard) -> list[Shard] | None:
    """The parts of weight and scales for some of the experts; all else is made of the whole weight."""
    if shard.whole != weight or shard.dim != 0 or len(weight) != 3 or scale[:1] != weight[:1]:
        return None
    return [shard, Shard(scale, 0, shard.ranges)]


def scaled(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """`weight` (..., out, in) times its scales, in place. Raises ValueError when their number is none of those that the
    format has."""
    if weight.dim() == 3 and scale.dim() > 0 and scale.shape[0] == len(weight):
        for expert, its_scale in zip(weight, scale, strict=True):
            scaled(expert, its_scale, block)
        return weight
    out, width = weight.shape[-2:]
    in_blocks = (-(-out // block[0]), -(-width // block[1]))
    if scale.shape == in_blocks:
        return spread(weight, scale, block)
    if scale.numel() == 1:
        return weight.mul_(scale.flatten())
    if scale.shape in ((out,), (out, 1)):
        return weight.mul_(scale.view(out, 1))
    raise ValueError(
        f"scales of the shape {tuple(scale.shape)} are neither one, nor one for each of {out} outputs, nor one "
        f"for each of {in_blocks[0]} x {in_blocks[1]} blocks"
    )


def spread(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Multiply each block of `weight` (out, in), in place, by its `scale` (row blocks, column blocks)."""
    rows, columns = block
    for at in range(scale.shape[0]):
        part = slice(at * rows, (at + 1) * rows)
        weight[part] *= scale[at].repeat_interleave(columns)[: weight.shape[1]]
    return weight
