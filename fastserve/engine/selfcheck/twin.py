"""A small twin of a model, which shows what the model computes where the model itself cannot be asked.

A twin is a model of the same class and settings with small sizes, random weights, windows and chunks of a few tokens,
and a layer of each kind that the model has. It is computed by its own code and by the engine, in float32, so that
rounding hides no difference: what a model does between its modules (scale embeddings, clip), in some layers only (omit
the rotary embedding) or beyond a window shows within a few tokens.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fastserve.engine.attention.paged import PagedAttention, attention_implementation
from fastserve.engine.devices.find import attention_backend
from fastserve.engine.loading.layer_kinds import first_of_each_kind
from fastserve.engine.loading.loader import LoadedModel, prepare
from fastserve.engine.loading.reference import SHORT_LENGTH, Prompt, integers, near_and_far_prompts
from fastserve.engine.runner.runner import ModelRunner
from fastserve.engine.selfcheck.compare import Capacity
from fastserve.engine.selfcheck.small_config import VOCAB_SIZE, small_config
from fastserve.errors import StartupError

logger = logging.getLogger(__name__)

TRIAL_ERRORS = (
    *(RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError),
    *(OSError, ArithmeticError, AssertionError, StrictDataclassError),
)
"""What a model's code may raise with sizes that its authors never tried."""
_NEAR_LENGTHS = (41, 23, SHORT_LENGTH)
"""Longer than windows and than two blocks, and shorter than a window."""
_MAX_FAR_PROMPTS = 16
_BLOCK_SIZE = 16
_MAX_LAYERS = 8
_SPREAD = 0.2
"""Standard deviation that is added to each parameter: those that are initialised to zeros or ones must matter too."""
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


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within the block, torch computes in one thread: on the matrices of a twin, more of them wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _make(model: LoadedModel, max_model_len: int) -> Twin:
    config = model.model.config.get_text_config(decoder=True)
    kinds = model.reference.layer_kinds
    layers = _layers(config, first_of_each_kind(kinds))
    prompts = _prompts(config, max_model_len)
    loaded = _load(model, small_config(config, layers), max_model_len, prompts)
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


def _layers(config: PretrainedConfig, first: Sequence[int]) -> list[int]:
    """Indices of the layers that the twin has: the first ones, up to one of each kind, or one of each kind alone."""
    needed = max([2, *(index + 1 for index in first)])
    if needed <= _MAX_LAYERS:
        return list(range(min(needed, config.num_hidden_layers)))
    return list(first)[:_MAX_LAYERS]


def _prompts(config: PretrainedConfig, max_model_len: int) -> list[Prompt]:
    """Prompts around each integer of the config: where models begin to compute otherwise has many names."""
    far = sorted({value for _, value in integers(config.to_dict()) if value < max_model_len})
    return near_and_far_prompts(config, VOCAB_SIZE, max_model_len, _NEAR_LENGTHS, far[1 - _MAX_FAR_PROMPTS :])


def _load(original: LoadedModel, small: PretrainedConfig, max_model_len: int, prompts: Sequence[Prompt]) -> LoadedModel:
    cls = type(original.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if isinstance(small, cls.config_class):
            model: PreTrainedModel = cls._from_config(small, dtype=torch.float32)
        elif type(small) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            # Not left to AutoModelForCausalLM: to list all classes it knows in its error, it imports them.
            raise ValueError(f"transformers has no model for {type(small).__name__} alone")
        else:  # the text model of a composite one
            model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * _SPREAD)
    model.set_attn_implementation(attention_implementation())
    return prepare(model.to(original.device), PagedAttention(attention_backend), torch.float32, prompts)
