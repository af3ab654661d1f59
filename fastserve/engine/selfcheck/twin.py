"""The small twin of a model (see loading/small_twin.py), ready to be computed by the engine.

What a model does between its modules (scale embeddings, clip), in some layers only (omit the rotary embedding) or
beyond a window shows within a few of the twin's tokens.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from fastserve.engine.attention.paged import PagedAttention, attention_implementation
from fastserve.engine.devices.find import attention_backend
from fastserve.engine.loading.loader import LoadedModel, prepare
from fastserve.engine.loading.reference import SHORT_LENGTH, Prompt, integers, near_and_far_prompts
from fastserve.engine.loading.small_config import VOCAB_SIZE
from fastserve.engine.loading.small_twin import TRIAL_ERRORS, make_small_twin
from fastserve.engine.runner.runner import ModelRunner
from fastserve.engine.selfcheck.compare import Capacity
from fastserve.errors import StartupError

logger = logging.getLogger(__name__)

_NEAR_LENGTHS = (41, 23, SHORT_LENGTH)
"""Longer than windows and than two blocks, and shorter than a window."""
_MAX_FAR_PROMPTS = 16
_BLOCK_SIZE = 16
_MAX_NOISE = 1e-3
"""A twin that enlarges rounding more than this shows nothing."""


class NoTwinError(Exception):
    """A model has no small twin; the message says why."""


@dataclass(frozen=True, slots=True)
class Twin:
    loaded: LoadedModel
    runner: ModelRunner
    capacity: Capacity
    has_all_kinds: bool
    """Whether it has a layer of each kind that the model has."""


def make_twin(model: LoadedModel, max_model_len: int) -> Twin:
    """The twin of a model that is served up to this length, on the model's device. Raises NoTwinError."""
    try:
        return _make(model, min(max_model_len, model.context_length))
    except (StartupError, *TRIAL_ERRORS) as error:
        raise NoTwinError(str(error) or type(error).__name__) from error


def _make(model: LoadedModel, max_model_len: int) -> Twin:
    config = model.model.config.get_text_config(decoder=True)
    kinds = model.reference.layer_kinds
    prompts = _prompts(config, max_model_len)
    small = make_small_twin(model.model, kinds)
    small.set_attn_implementation(attention_implementation())
    loaded = prepare(small.to(model.device), PagedAttention(attention_backend), torch.float32, prompts)
    if not loaded.reference.noise <= _MAX_NOISE:
        raise NoTwinError("it enlarges rounding too much")
    num_kinds = len(set(loaded.reference.layer_kinds))
    has_all_kinds = num_kinds >= len(set(kinds))
    if not has_all_kinds:
        logger.info("The small twin has %d of %d kinds of layers.", num_kinds, len(set(kinds)))
    num_blocks = sum(-(-len(prompt.token_ids) // _BLOCK_SIZE) for prompt in prompts)
    capacity = Capacity(_BLOCK_SIZE, num_blocks, len(prompts), max_model_len)
    runner = ModelRunner(
        loaded,
        num_blocks=num_blocks,
        block_size=_BLOCK_SIZE,
        max_num_seqs=len(prompts),
        max_model_len=max_model_len,
    )
    return Twin(loaded, runner, capacity, has_all_kinds)


def _prompts(config: PretrainedConfig, max_model_len: int) -> list[Prompt]:
    """Prompts around each integer of the config: where models begin to compute otherwise has many names."""
    far = sorted({value for _, value in integers(config.to_dict()) if value < max_model_len})
    return near_and_far_prompts(config, VOCAB_SIZE, max_model_len, _NEAR_LENGTHS, far[1 - _MAX_FAR_PROMPTS :])
