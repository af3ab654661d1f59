"""Builds a model without weights: modules, buffers and shapes, to be filled weight by weight."""

from __future__ import annotations

import logging
import re
import threading
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from fastserve.errors import StartupError

logger = logging.getLogger(__name__)
building = threading.Lock()
"""Held while classes of torch are changed for the whole process, to build a model without weights."""


def build_skeleton(
    config: PretrainedConfig, dtype: torch.dtype, attention: str, *, trust_remote_code: bool
) -> PreTrainedModel:
    """The model of `config` with its parameters on the meta device, each in its final dtype.

    Buffers are on the CPU, with the values that the model's own code gives them: those that no checkpoint has (RoPE
    frequencies) need no loading. Where other parts of a composite need a package that is not installed, the model is
    its language model alone, and has the config of that part.
    """
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # quantized checkpoints are read by formats/
    try:
        return _build(config, dtype, attention, trust_remote_code=trust_remote_code)
    except ImportError as error:
        text_config = config.get_text_config(decoder=True)
        if text_config is config or type(text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise
        cause = str(error).strip().partition("\n")[0]
        logger.warning("%s is served by its language model alone: %s", config.model_type, cause)
        return _build(text_config, dtype, attention, trust_remote_code=trust_remote_code)


def _build(config: PretrainedConfig, dtype: torch.dtype, attention: str, *, trust_remote_code: bool) -> PreTrainedModel:
    _drop_impossible_padding(config)
    config.return_dict = True  # outputs are read by name
    with building:
        with init_empty_weights(include_buffers=False), no_init_weights():
            model: PreTrainedModel = auto_class(config).from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
            )
        # Within the lock: another thread that builds a model may have this switched off for all classes.
        model.tie_weights()
    _keep_in_float32(model, dtype)
    return model.eval().requires_grad_(False)


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that makes the model: one that generates text, or failing that text from images and
    text, whose language model is served."""
    is_composite = (
        type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    )
    return AutoModelForImageTextToText if is_composite else AutoModelForCausalLM


def _drop_impossible_padding(config: PretrainedConfig) -> None:
    """Embeddings refuse a padding token that is not in the vocabulary. Nothing is padded here, so none is needed."""
    text_config = config.get_text_config(decoder=True)
    pad, vocab_size = getattr(text_config, "pad_token_id", None), getattr(text_config, "vocab_size", None)
    if not isinstance(pad, int) or not isinstance(vocab_size, int) or not -vocab_size <= pad < vocab_size:
        text_config.pad_token_id = None


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keep the parameters in float32 that the model's class lists as such (some norms, routers)."""
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
    """Set the model's generation defaults from its generation_config.json, if any. Raises StartupError if
    unreadable."""
    if not (folder / "generation_config.json").is_file():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise StartupError(f"{folder / 'generation_config.json'} cannot be read: {str(error).rstrip('.')}.") from error
