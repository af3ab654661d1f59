"""From hidden states to what a text is answered with: pooled vectors, or a classifier's logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from fastserve.engine.pooling.forward import TextBatch, pad_states, padded_fields
from fastserve.engine.settings import DenseOptions, PoolingMode, PoolingOptions
from fastserve.errors import StartupError


class VectorHead:
    """sentence-transformers' Pooling and Dense modules, on packed hidden states."""

    def __init__(self, settings: PoolingOptions, hidden_size: int, device: torch.device) -> None:
        """Raises StartupError."""
        self._modes = settings.modes
        self._pools_prompt = settings.pools_prompt
        self.width = hidden_size * len(settings.modes)
        layers = []
        for dense in settings.dense:
            if dense.in_features != self.width:
                raise StartupError(
                    f"{dense.folder}: in_features of this Dense module is {dense.in_features}, but its input has "
                    f"{self.width}."
                )
            layers += [_load_dense(dense), make_activation(dense.activation)]
            self.width = dense.out_features
        self._dense = torch.nn.Sequential(*layers).to(device).requires_grad_(False)

    def __call__(self, hidden: torch.Tensor, lengths: Sequence[int], prompt_lengths: Sequence[int]) -> torch.Tensor:
        """(tokens, hidden) -> (texts, width), float32. `prompt_lengths`: leading tokens of each text that are its
        prompt."""
        hidden = hidden.float()
        if not self._pools_prompt and any(prompt_lengths):
            firsts = [min(prompt, length - 1) for prompt, length in zip(prompt_lengths, lengths, strict=True)]
            keep = torch.cat([torch.arange(n) >= first for n, first in zip(lengths, firsts, strict=True)])
            hidden = hidden[keep.to(hidden.device)]
            lengths = [length - first for length, first in zip(lengths, firsts, strict=True)]
        sizes = torch.tensor(lengths, device=hidden.device)
        pooled = [_pool(hidden, sizes, mode) for mode in self._modes]
        vectors: torch.Tensor = self._dense(pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=-1))
        return vectors


def _pool(hidden: torch.Tensor, sizes: torch.Tensor, mode: PoolingMode) -> torch.Tensor:
    """(tokens, hidden) -> (texts, hidden)"""
    ends = sizes.cumsum(0)
    if mode == "cls":
        return hidden[ends - sizes]
    if mode == "last":
        return hidden[ends - 1]
    if mode == "max":
        return _reduce(hidden, sizes, "max")
    if mode == "mean":
        return _reduce(hidden, sizes, "mean")
    if mode == "mean_sqrt_len":
        return _reduce(hidden, sizes, "sum") / sizes.unsqueeze(1).sqrt()
    begins = torch.repeat_interleave(ends - sizes, sizes)
    weights = (torch.arange(len(hidden), device=hidden.device) - begins + 1).float().unsqueeze(1)
    return _reduce(hidden * weights, sizes, "sum") / _reduce(weights, sizes, "sum")


def _reduce(values: torch.Tensor, sizes: torch.Tensor, how: str) -> torch.Tensor:
    reduced: torch.Tensor = torch.segment_reduce(values, how, lengths=sizes, unsafe=True)
    return reduced


def make_activation(name: str) -> torch.nn.Module:
    """A module of torch.nn by its name. Raises StartupError for anything else."""
    found = getattr(torch.nn, name, None)
    if isinstance(found, type) and issubclass(found, torch.nn.Module):
        try:
            made: torch.nn.Module = found()
            return made
        except TypeError:
            pass
    raise StartupError(
        f"The activation function torch.nn.{name} cannot be used: it is no activation without arguments."
    )


def _load_dense(settings: DenseOptions) -> torch.nn.Linear:
    linear = torch.nn.Linear(settings.in_features, settings.out_features, bias=settings.has_bias)
    try:
        linear.load_state_dict(
            {name.removeprefix("linear."): value.float() for name, value in _weights(Path(settings.folder)).items()}
        )
    except (OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        cause = str(error).strip().replace("\n", " ")
        raise StartupError(f"The weights of the Dense module in {settings.folder} cannot be read: {cause}.") from error
    return linear


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / "model.safetensors").is_file():
        found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
        return found
    found = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    return found


class ClassifierHead:
    """The head of transformers' model for sequence classification, by its own code: the model below the head is
    replaced by the hidden states that are there already."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self._model = model
        self._device = device
        self.width: int = model.config.num_labels

    def __call__(self, hidden: torch.Tensor, batch: TextBatch) -> torch.Tensor:
        """(tokens, hidden) -> (texts, labels), float32 logits"""
        base, padded = self._model.base_model, pad_states(hidden, batch.lengths)
        pooler: Any = getattr(base, "pooler", None)
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=padded, pooler_output=None if pooler is None else pooler(padded)
        )
        own = base.forward
        base.forward = lambda *_, **__: output
        try:
            logits: torch.Tensor = self._model(**padded_fields(self._model, batch, self._device)).logits
        finally:
            base.forward = own
        return logits.float()
