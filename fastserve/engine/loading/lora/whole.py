"""Weights, or rows of them, that an adapter replaces."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastserve.engine.loading.checkpoint import StoredTensor
from fastserve.errors import StartupError


@dataclass(frozen=True, slots=True)
class Whole:
    """The adapter's tensor in place of the base model's."""

    stored: StoredTensor

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return self.stored.read()


@dataclass(frozen=True, slots=True)
class Rows:
    """The adapter's rows in place of some tokens' rows of an embedding or LM head."""

    stored: StoredTensor
    """(tokens, width)"""
    indices: tuple[int, ...]

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        outside = [index for index in self.indices if not 0 <= index < weight.shape[0]]
        if outside:
            raise StartupError(
                f"{self.stored.file.parent}: trainable_token_indices has the token {outside[0]}, and {name} of the "
                f"base model has {weight.shape[0]} rows: the adapter is of another model."
            )
        if self.stored.shape != (len(self.indices), *weight.shape[1:]):
            raise StartupError(
                f"{self.stored.file}: {self.stored.name} has the shape {self.stored.shape}, and "
                f"{len(self.indices)} rows of {name} have {(len(self.indices), *weight.shape[1:])}."
            )
        changed = weight.clone()
        changed[list(self.indices)] = self.stored.read().to(weight.dtype)
        return changed
