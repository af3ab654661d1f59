"""The contract of a way to compute the forward pass of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import torch
from transformers import PreTrainedModel

from fastserve.engine.adapters.memory import AdapterMemory
from fastserve.engine.attention.paged import PagedAttention
from fastserve.engine.runner.packed_step import PackedStep
from fastserve.engine.runner.sampled_ids import SampledIds


class UnsupportedError(Exception):
    """A way cannot compute a model; the message is the reason."""


class AbsentError(UnsupportedError):
    """This machine does not have the way, whatever the model."""


@dataclass(frozen=True, slots=True)
class ForwardParts:
    """Inputs from which forward passes are built."""

    model: PreTrainedModel
    attention: PagedAttention
    """The model's attention, with its KV cache allocated."""
    sampled_ids: SampledIds
    device: torch.device
    """Device of the token ids."""
    rows_device: torch.device
    """Device of the row numbers of logits."""
    dtype: torch.dtype
    block_size: int
    max_num_seqs: int
    max_model_len: int
    adapters: AdapterMemory | None = None
    """Adapters on the device; None: the model has none."""


class ForwardPass(Protocol):
    name: ClassVar[str]
    follows_description: ClassVar[bool]
    """Whether it computes from a description of the model instead of its modules: then it is checked at start on a
    small twin of the model too."""

    @classmethod
    def build(cls, parts: ForwardParts) -> Self:
        """Build it for a model. Raises UnsupportedError for a model that it cannot compute on this device."""
        ...

    def supports(self, step: PackedStep) -> str | None:
        """The reason why it cannot compute this step; None when it can."""
        ...

    def __call__(self, step: PackedStep) -> torch.Tensor:
        """Logits (rows, vocabulary) of the step's logit rows, valid until the next step."""
        ...
