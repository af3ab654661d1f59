"""The context length: as the model states it, limited by its rotary embedding where batches are packed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len")
_UNSTATED = 2048


def context_length(config: PretrainedConfig) -> int:
    """The longest sequence in tokens, prompt and answer together, of a model with this (text) config.

    RoPE scaling by linear, llama3 or yarn is constant. `dynamic` (NTK) and `longrope`, beyond their original length,
    use the frequencies of the longest sequence for the whole batch: a long request would change the answers of short
    ones in the same batch, and keys in the KV cache would not match newer ones. So the context ends at that length,
    which for `dynamic` is the stated length.
    """
    stated = next((value for name in _FIELDS if isinstance(value := getattr(config, name, None), int) and value > 0), 0)
    if stated == 0:
        return _UNSTATED
    for rope in _ropes(config):
        kind = rope.get("rope_type", rope.get("type"))
        original = rope.get("original_max_position_embeddings")
        original = int(original or getattr(config, "original_max_position_embeddings", None) or stated)
        if kind == "longrope" and original < stated:
            logger.warning("Context of %d tokens instead of %d: LongRoPE's long form is not served.", original, stated)
            return original
        if kind == "yarn" and original == stated:
            # YaRN was added to config.json by hand, as model cards advise: the stated length is still the trained one.
            return int(original * (rope.get("factor") or 1.0))
    return stated


def _ropes(config: PretrainedConfig) -> Iterator[dict[str, Any]]:
    """The model's RoPE parameters; those of each kind of layer, if they differ."""
    whole = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    yield whole
    yield from (part for part in whole.values() if isinstance(part, dict))
