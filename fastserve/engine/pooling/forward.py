"""Ways to compute the hidden states of a batch of texts: packed in one row, or as a padded batch by the model's own
code.

The packed way is used where it gives what the padded one gives, as a trial shows (`model.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from fastserve.engine.pooling.packed import PackedTexts, packed_attention

OWN_ATTENTION = "sdpa"
"""Attention of the padded way."""


@dataclass(frozen=True)
class TextBatch:
    """Texts as token ids, longest first."""

    token_ids: list[npt.NDArray[np.int32]]
    first_lengths: list[int]
    """Number of tokens of each text with token type 0."""

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.token_ids]


class HiddenStates(Protocol):
    """A way to compute hidden states."""

    name: str

    def __call__(self, batch: TextBatch) -> torch.Tensor:
        """(tokens of all texts, hidden)"""
        ...


class PackedHiddenStates:
    """All texts in one row, without padding but in attention."""

    name = "packed"

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        """`model`: the one below any head."""
        self._model = model
        self._device = device
        self._has_types = has_token_types(model)
        self._first_position = first_position(model)
        model.set_attn_implementation(packed_attention())

    def __call__(self, batch: TextBatch) -> torch.Tensor:
        texts = PackedTexts(batch.lengths, self._device)
        ids = torch.from_numpy(np.concatenate(batch.token_ids)).long().unsqueeze(0).to(self._device)
        fields: dict[str, Any] = {
            "input_ids": ids,
            # With a mask of tokens, transformers does not look for the texts in the row by their positions.
            "attention_mask": torch.ones_like(ids),
            "position_ids": texts.position_ids + self._first_position,
        }
        if self._has_types:
            types = [(np.arange(len(ids)) >= first).astype(np.int64) for ids, first in _typed(batch)]
            fields["token_type_ids"] = torch.from_numpy(np.concatenate(types)).unsqueeze(0).to(self._device)
        with texts.running():
            hidden: torch.Tensor = self._model(**fields).last_hidden_state
        return hidden[0]


class PaddedHiddenStates:
    """A padded batch, with the model's own attention."""

    name = "padded"

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self._model = model
        self._device = device
        model.set_attn_implementation(OWN_ATTENTION)

    def __call__(self, batch: TextBatch) -> torch.Tensor:
        fields = padded_fields(self._model, batch, self._device)
        hidden: torch.Tensor = self._model(**fields).last_hidden_state
        return hidden[fields["attention_mask"].bool()]


def padded_fields(model: PreTrainedModel, batch: TextBatch, device: torch.device) -> dict[str, torch.Tensor]:
    """Arguments of the model's forward pass for a padded batch."""
    lengths = batch.lengths
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    shape = (len(lengths), max(lengths))
    ids = np.full(shape, pad if isinstance(pad, int) and pad >= 0 else 0, np.int64)
    types, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, (own, first) in enumerate(_typed(batch)):
        ids[row, : len(own)], mask[row, : len(own)], types[row, first : len(own)] = own, 1, 1
    fields = {"input_ids": ids, "attention_mask": mask}
    if has_token_types(model):
        fields["token_type_ids"] = types
    return {name: torch.from_numpy(values).to(device) for name, values in fields.items()}


def has_token_types(model: PreTrainedModel) -> bool:
    """Whether the model has a token type for each of the two texts of a pair."""
    num_types = getattr(model.config.get_text_config(), "type_vocab_size", 0)
    return "token_type_ids" in inspect.signature(model.forward).parameters and num_types > 1


def first_position(model: PreTrainedModel) -> int:
    """The position of a text's first token: those of RoBERTa and its kin begin after that of padding."""
    for module in model.modules():
        if hasattr(type(module), "create_position_ids_from_inputs_embeds"):
            return int(module.padding_idx) + 1
    return 0


def pad_states(hidden: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """(tokens, hidden) -> (texts, longest, hidden), zeros for padding"""
    return torch.nn.utils.rnn.pad_sequence(hidden.split(list(lengths)), batch_first=True)


def _typed(batch: TextBatch) -> zip[tuple[npt.NDArray[np.int32], int]]:
    return zip(batch.token_ids, batch.first_lengths, strict=True)
