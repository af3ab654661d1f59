"""The forward pass by the model's own modules: it supports every model and step."""

from __future__ import annotations

from contextlib import nullcontext
from typing import ClassVar, Self

import torch

from fastserve.engine.runner.forward.forward_pass import ForwardParts
from fastserve.engine.runner.packed_step import PackedStep
from fastserve.engine.transfers import to_device


class ModulesForward:
    name: ClassVar[str] = "modules"
    follows_description: ClassVar[bool] = False

    def __init__(self, parts: ForwardParts) -> None:
        self._parts = parts

    @classmethod
    def build(cls, parts: ForwardParts) -> Self:
        return cls(parts)

    def supports(self, step: PackedStep) -> str | None:
        return None

    def __call__(self, step: PackedStep) -> torch.Tensor:
        parts = self._parts
        input_ids, positions = to_device([step.input_ids, step.positions], parts.device)
        [rows] = to_device([step.logit_rows], parts.rows_device)
        if step.input_ids.min() < 0:
            parts.sampled_ids.fill_in(input_ids)
        adapters = nullcontext() if parts.adapters is None else parts.adapters.running(step.adapters, step.logit_rows)
        with torch.inference_mode(), parts.attention.running(step.metadata), adapters:
            # transformers accepts row numbers here, and computes the LM head for these rows only.
            logits: torch.Tensor = parts.model(
                input_ids=input_ids.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=rows,
            ).logits[0]
        return logits
