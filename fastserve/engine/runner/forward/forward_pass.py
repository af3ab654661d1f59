"""The contract of a way to compute the forward pass of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import torch
from transformers import PreTrainedModel

from fastserve.engine.attention.paged import PagedAttention
from fastserve.engine.layers.linear import Linear
from fastserve.engine.runner.packed_step import PackedStep
from fastserve.engine.runner.sampled_ids import SampledIds


class UnsupportedError(Exception):
    """A way cannot compute a model; the message says why."""


class AbsentError(UnsupportedError):
    """This machine does not have the way, whatever the model."""


@dataclass(frozen=True, slots=True)
class ForwardParts:
    """What forward passes are built from."""

    model: PreTrainedModel
    """Its KV cache is allocated."""
    attention: PagedAttention
    sampled_ids: SampledIds
    device: torch.device
    """Where token ids come from."""
    rows_device: torch.device
    """Where the numbers of logits' rows come from."""
    dtype: torch.dtype
    block_size: int
    max_num_seqs: int
    max_model_len: int

    def linears(self) -> list[Linear]:
        return [module for module in self.model.modules() if isinstance(module, Linear)]


class ForwardPass(Protocol):
    name: ClassVar[str]
    follows_description: ClassVar[bool]
    """Whether it computes from a description of the model and not with its modules: then a small twin of the model is
    compared at start too."""

    @classmethod
    def build(cls, parts: ForwardParts) -> Self:
        """Raises UnsupportedError for a model that it cannot compute on this device."""
        ...

    def supports(self, step: PackedStep) -> str | None:
        """Why it cannot compute this step; None when it can."""
        ...

    def __call__(self, step: PackedStep) -> torch.Tensor:
        """Logits (rows, vocabulary) of the rows asked for. They hold until the next step."""
        ...


def has_adapters(linears: list[Linear]) -> bool:
    """Whether a layer has something to add to its product, now."""
    return any(linear.delta is not None for linear in linears)
