"""A small twin of a model, to test whether the kernel's description of the model is complete.

A model can compute something between its modules that is not visible in them (scale the embeddings, clip, omit rotary
embedding in some layers). So before a model's steps are computed from a description, a twin of the same class and
settings, with small sizes and random weights, is computed by its own code and from its description. In float32, so that
rounding hides no difference.
"""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fastserve.engine.attention.paged import PagedAttention, attention_implementation
from fastserve.engine.devices.find import attention_backend
from fastserve.engine.loading.loader import LoadedModel, prepare
from fastserve.engine.runner.runner import ModelRunner
from fastserve.engine.selfcheck.verify import difference

_LENGTH = 64
_BLOCK_SIZE = 16
_MAX_LAYERS = 8
_TOLERANCE = 1e-3
"""Standard deviations of the logits, in float32."""
_CAUSES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError, OSError)


def twin_differs(config: PretrainedConfig, way: str) -> str | None:
    """The reason why a model of these settings must not be computed by the way of this name, or None."""
    try:
        loaded = _make_twin(config)
        runner = ModelRunner(loaded, num_blocks=8, block_size=_BLOCK_SIZE, max_num_seqs=4, max_model_len=_LENGTH)
        ways = runner.forward_passes
        found = next((found for found in ways.ways if found.name == way), None)
        if found is None:
            return f"its small twin: {ways.refusals[way]}"
        error = difference(
            loaded.reference, runner, found, block_size=_BLOCK_SIZE, num_blocks=8, max_num_seqs=4, max_model_len=_LENGTH
        )
    except _CAUSES as cause:
        return f"no small twin of it can be made: {cause}"
    if error is None or not error < _TOLERANCE:
        return "its small twin computes something else"
    return None


def _make_twin(config: PretrainedConfig) -> LoadedModel:
    small = _shrunk(config.get_text_config(decoder=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                # Parameters initialised to zeros or ones must matter too. Large enough that each changes the logits.
                parameter.add_(torch.randn_like(parameter) * 0.2)
    attention = PagedAttention(attention_backend)
    model.set_attn_implementation(attention_implementation())
    return prepare(model, attention, torch.float32)


def _shrunk(config: PretrainedConfig) -> PretrainedConfig:
    small = copy.deepcopy(config)
    kv_heads = getattr(config, "num_key_value_heads", None)
    small.num_hidden_layers = _num_layers(config)
    small.hidden_size, small.intermediate_size, small.vocab_size = 96, 160, 128
    small.num_attention_heads = 4
    if kv_heads is not None:
        small.num_key_value_heads = 4 if kv_heads == config.num_attention_heads else 2
    if getattr(config, "head_dim", None) is not None:
        small.head_dim = 32
    if getattr(config, "layer_types", None) is not None:
        small.layer_types = config.layer_types[: small.num_hidden_layers]
    if getattr(config, "sliding_window", None) is not None:
        small.sliding_window = 8
    small.pad_token_id = small.bos_token_id = small.eos_token_id = 0
    return small


def _num_layers(config: PretrainedConfig) -> int:
    """Enough layers to have one of each type."""
    types = getattr(config, "layer_types", None) or []
    needed = max((types.index(kind) + 1 for kind in set(types)), default=2)
    num_layers: int = config.num_hidden_layers
    return min(num_layers, max(2, min(needed, _MAX_LAYERS)))
