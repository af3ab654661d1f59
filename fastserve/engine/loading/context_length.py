"""The context length, and the length at which rotary frequencies change."""

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

    With `dynamic` (NTK) scaling it is the stated length: beyond it, the frequencies of all tokens change with each new
    one, so no KV cache holds them.
    """
    stated = _stated_length(config)
    if stated is None:
        return _UNSTATED
    switches = _switch_lengths(config, stated)
    if len(switches) > 1:
        logger.warning("Context of %d tokens instead of %d: LongRoPE differs by layer.", min(switches), stated)
        return min(switches)
    for rope in _ropes(config):
        factor = rope.get("factor") or 1.0
        if _kind(rope) == "yarn" and _original_length(rope, config, stated) == stated:
            # YaRN was added to config.json by hand, as model cards advise: the stated length is still the trained one.
            return int(stated * factor)
        if _kind(rope) == "dynamic" and factor > 1.0:
            logger.warning(
                "Context of %d tokens: beyond it, dynamic NTK scaling changes all keys with each new token.",
                stated,
            )
    return stated


def rope_switch_length(config: PretrainedConfig) -> int | None:
    """The length in tokens beyond which all tokens of a sequence have other rotary frequencies (LongRoPE's long
    factors); None: never within the context."""
    stated = _stated_length(config)
    switches = set() if stated is None else _switch_lengths(config, stated)
    return switches.pop() if len(switches) == 1 else None


def _stated_length(config: PretrainedConfig) -> int | None:
    values = (getattr(config, name, None) for name in _FIELDS)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _switch_lengths(config: PretrainedConfig, stated: int) -> set[int]:
    originals = {_original_length(rope, config, stated) for rope in _ropes(config) if _kind(rope) == "longrope"}
    return {original for original in originals if original < stated}


def _original_length(rope: dict[str, Any], config: PretrainedConfig, stated: int) -> int:
    original = rope.get("original_max_position_embeddings")
    return int(original or getattr(config, "original_max_position_embeddings", None) or stated)


def _kind(rope: dict[str, Any]) -> str | None:
    return rope.get("rope_type", rope.get("type"))


def _ropes(config: PretrainedConfig) -> Iterator[dict[str, Any]]:
    """The model's RoPE parameters; those of each kind of layer, if they differ."""
    whole = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    yield whole
    yield from (part for part in whole.values() if isinstance(part, dict))
