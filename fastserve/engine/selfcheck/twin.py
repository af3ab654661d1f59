"""A small twin of a model, to test whether the kernel's description of the model is complete.

A model can compute something between its modules that is not visible in them (scale the embeddings, clip, omit rotary
embedding in some layers). So before a model's steps are computed from a description, a twin of the same class and
settings, with small sizes and random weights, is computed by its own code and from its description. In float32, so that
rounding hides no difference.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from fastserve.engine.attention.paged import PagedAttention, attention_implementation
from fastserve.engine.devices.find import attention_backend
from fastserve.engine.loading.loader import LoadedModel, prepare
from fastserve.engine.loading.small_twin import make_small_twin
from fastserve.engine.runner.runner import ModelRunner
from fastserve.engine.selfcheck.verify import difference

_LENGTH = 64
_BLOCK_SIZE = 16
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
    model = make_small_twin(config)
    attention = PagedAttention(attention_backend)
    model.set_attn_implementation(attention_implementation())
    return prepare(model, attention, torch.float32)
