"""Random weights for capacity planning and tests: with the right shapes, made quickly, the same at each start."""

from __future__ import annotations

import zlib

import torch
from transformers import PreTrainedModel

from fastserve.engine.loading.formats.source import Source

_BLOCK = 999_983
"""Random numbers generated for a weight; a larger weight repeats them. A prime, so that no two rows are equal."""


def dummy_sources(model: PreTrainedModel) -> list[Source]:
    """A source of random values for each parameter. Parameters may be on the meta device."""
    spread = float(getattr(model.config.get_text_config(decoder=True), "initializer_range", None) or 0.02)
    return [_source(name, parameter, spread) for name, parameter in model.named_parameters()]


def _source(name: str, parameter: torch.nn.Parameter, spread: float) -> Source:
    shape, dtype = parameter.shape, parameter.dtype

    def make() -> torch.Tensor:
        if len(shape) == 1:
            return torch.zeros(shape, dtype=dtype) if name.endswith("bias") else torch.ones(shape, dtype=dtype)
        count = shape.numel()
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        block = torch.empty(min(count, _BLOCK)).normal_(0.0, spread, generator=generator).to(dtype)
        return block.repeat(-(-count // len(block)))[:count].view(shape)

    return Source(name, (), make, parameter.numel() * dtype.itemsize)
