"""A model without weights: modules, buffers and shapes, for weights that arrive one by one."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from fastserve.errors import StartupError


def build_skeleton(
    config: PretrainedConfig, dtype: torch.dtype, attention: str, *, trust_remote_code: bool
) -> PreTrainedModel:
    """The model of `config` with its parameters on the meta device, each in the dtype that it is to have.

    Buffers are on the CPU and hold what the model's own code puts there: those that no checkpoint has (frequencies of
    rotary positions) are right from the start.
    """
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # how the checkpoint is packed is our matter (formats/)
    with init_empty_weights(include_buffers=False), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    _keep_in_float32(model, dtype)
    return model.eval().requires_grad_(False)


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """What the model's class says must not be rounded (norms of T5's kind, routers)."""
    patterns = list(getattr(model, "_keep_in_fp32_modules_strict", None) or [])
    if dtype is torch.float16:
        patterns += getattr(model, "_keep_in_fp32_modules", None) or []
    if dtype is torch.float32 or not patterns:
        return
    kept = re.compile("|".join(rf"(?:^|\.){pattern.replace('*', '.*')}(?:\.|$)" for pattern in patterns))
    for name, parameter in model.named_parameters():
        if kept.search(name):
            parameter.data = parameter.data.float()


def read_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Give the model the defaults of its generation_config.json, where there is one. Raises StartupError."""
    if not (folder / "generation_config.json").is_file():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise StartupError(f"{folder / 'generation_config.json'} cannot be read: {error}") from error
