"""A small twin of a model, which shows what an architecture computes before, or without, computing the model itself.

A twin is a model of the same class and settings with small sizes, random weights, windows and chunks of a few tokens,
and a layer of each kind that the model has. Its weights are float32, so that rounding hides no difference.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fastserve.engine.loading.layer_kinds import first_of_each_kind
from fastserve.engine.loading.small_config import small_config

TRIAL_ERRORS = (
    *(RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError),
    *(OSError, ArithmeticError, AssertionError, StrictDataclassError),
)
"""Exceptions that a model's code may raise with sizes that its authors never tried."""
_MAX_LAYERS = 8
_SPREAD = 0.2
"""Standard deviation that is added to each parameter: those that are initialised to zeros or ones must matter too."""


def make_small_twin(
    model: PreTrainedModel, kinds: Sequence[Hashable], *, shares_kv_heads: bool = False
) -> PreTrainedModel:
    """The twin of a model whose layers are of these kinds (see layer_kinds.py), on the CPU. `shares_kv_heads`: it has
    a single KV head. Raises TRIAL_ERRORS when the architecture does not allow these sizes."""
    config = model.config.get_text_config(decoder=True)
    small = small_config(config, _layers(config, kinds), shares_kv_heads=shares_kv_heads)
    cls = type(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed also prepares GPUs, which takes longer
        if isinstance(small, cls.config_class):
            twin: PreTrainedModel = cls._from_config(small, dtype=torch.float32)
        elif type(small) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            # Not left to AutoModelForCausalLM: to list all classes it knows in its error, it imports them.
            raise ValueError(f"transformers has no model for {type(small).__name__} alone")
        else:  # the text model of a composite one
            twin = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(torch.randn_like(parameter) * _SPREAD)
    return twin.eval().requires_grad_(False)


def _layers(config: PretrainedConfig, kinds: Sequence[Hashable]) -> list[int]:
    """Indices of the layers that the twin has: the first ones, up to one of each kind, or one of each kind alone."""
    first = first_of_each_kind(kinds)
    needed = max([2, *(index + 1 for index in first)])
    if needed <= _MAX_LAYERS:
        return list(range(min(needed, config.num_hidden_layers)))
    return first[:_MAX_LAYERS]
