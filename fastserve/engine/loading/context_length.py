"""How long a sequence may be: what a model states, and what its rotary embedding means in a packed batch."""

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

    Scaling by linear, llama3 or yarn is a constant of the model. Beyond a length of theirs, `dynamic` (NTK) and
    `longrope` take the frequencies of the longest sequence in the batch for all of it: there a long request would
    change the answers of the short ones beside it, and keys in the cache would not fit newer ones. So the context ends
    there, which for `dynamic` is the length stated.
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
            # Settings that were given YaRN by hand, as model cards advise: the length stated is still the trained one.
            return int(original * (rope.get("factor") or 1.0))
    return stated


def _ropes(config: PretrainedConfig) -> Iterator[dict[str, Any]]:
    """The model's rope parameters; those of each kind of layer, where they differ."""
    whole = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    yield whole
    yield from (part for part in whole.values() if isinstance(part, dict))
