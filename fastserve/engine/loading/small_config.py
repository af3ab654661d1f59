"""The configuration of a model's small twin: the same settings, with small sizes, short windows and fewer layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PretrainedConfig

VOCAB_SIZE = 128
_WINDOW = 8
_SOFTCAP = 2.0
"""Low enough to bend the twin's scores."""
_SIZES = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "ffn_dim": 160,
    "n_inner": 160,
    "ffn_hidden_size": 160,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "intermediate_size_mlp": 160,
    "word_embed_proj_dim": 96,
    "embedding_size": 96,
    "hidden_size_per_layer_input": 16,
    "vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "rotary_dim": 8,
    "num_experts": 16,
    "num_local_experts": 16,
    "n_routed_experts": 16,
    "moe_num_experts": 16,
    "num_experts_per_tok": 8,
    "head_dim": 32,
    "global_head_dim": 32,
    "attention_head_dim": 32,
    "kv_channels": 32,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
"""Upper bounds of settings, where a model has them."""
_HEADS = 4
_FIRST_COUNTS = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "num_hash_layers")
"""Settings that count the first layers of a kind."""
_LAST_COUNTS = ("num_kv_shared_layers",)
"""Settings that count the last layers of a kind."""
_LAYER_INDICES = ("mlp_only_layers", "global_attn_layers", "full_attn_layers", "dense_layers")
"""Lists of layer indices."""


def small_config(config: PretrainedConfig, layers: Sequence[int], *, shares_kv_heads: bool = False) -> PretrainedConfig:
    """A copy of a (text) config for a model of these of its layers. `shares_kv_heads`: with a single KV head where the
    model has fewer KV heads than heads."""
    small = copy.deepcopy(config)
    _keep_layers(config, small, layers)
    _shrink_heads(config, small, shares_kv_heads=shares_kv_heads)
    usual_names = {own: usual for usual, own in small.attribute_map.items() if usual in _SIZES}
    for own_name, value in list(vars(small).items()):
        name = usual_names.get(own_name, own_name)
        if name in _SIZES:
            setattr(small, name, _shrunk(value, _SIZES[name]))
        elif _is_window(name):
            setattr(small, name, _shrunk(value, _WINDOW))
        elif "softcap" in name and isinstance(value, int | float) and value > 0:
            setattr(small, name, _SOFTCAP)
    _shrink_latent_heads(config, small)
    _shrink_rotary_sections(config, small)
    small.pad_token_id = small.bos_token_id = small.eos_token_id = 0
    return small


def _shrunk(value: Any, size: int) -> Any:
    """An integer, or each of a list, limited to `size`."""
    if isinstance(value, list):
        return [_shrunk(item, size) for item in value]
    return min(value, size) if isinstance(value, int) and not isinstance(value, bool) else value


def _is_window(name: str) -> bool:
    return "attention_chunk" in name or ("window" in name and "layers" not in name and "pattern" not in name)


def _keep_layers(config: PretrainedConfig, small: PretrainedConfig, layers: Sequence[int]) -> None:
    """Settings by layer for the layers that are kept."""
    num_layers = config.num_hidden_layers
    if list(layers) != list(range(len(layers))):
        counts: list[tuple[tuple[str, ...], Callable[[int, int], bool]]] = [
            (_FIRST_COUNTS, lambda index, count: index < count),
            (_LAST_COUNTS, lambda index, count: index >= num_layers - count),
        ]
        for names, is_counted in counts:
            for name in names:
                if isinstance(value := getattr(config, name, None), int):
                    setattr(small, name, sum(is_counted(index, value) for index in layers))
        for name in _LAYER_INDICES:
            if isinstance(value := getattr(config, name, None), list):
                setattr(small, name, [new for new, index in enumerate(layers) if index in value])
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == num_layers:
            setattr(small, name, type(value)(value[index] for index in layers))
    small.num_hidden_layers = len(layers)


def _shrink_heads(config: PretrainedConfig, small: PretrainedConfig, *, shares_kv_heads: bool) -> None:
    """Fewer heads: with one key for each, for some of them, or for all, as in the model."""
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    small.num_attention_heads = _HEADS
    is_latent = hasattr(config, "qk_rope_head_dim")  # multi-head latent attention: keys of all heads from one vector
    if isinstance(kv_heads, int):
        fewer = 1 if shares_kv_heads else min(kv_heads, _HEADS // 2)
        small.num_key_value_heads = _HEADS if kv_heads == heads or is_latent else fewer


def _shrink_latent_heads(config: PretrainedConfig, small: PretrainedConfig) -> None:
    """With latent attention, a head's keys have a part that rotates and one that does not: sizes that are those of the
    part, or of both, stay so."""
    rotating, other = getattr(config, "qk_rope_head_dim", None), getattr(config, "qk_nope_head_dim", None)
    if rotating is None:
        return
    if "head_dim" in vars(config) and config.head_dim == rotating:
        small.head_dim = small.qk_rope_head_dim
    if other is not None and "qk_head_dim" in vars(config) and config.qk_head_dim == rotating + other:
        small.qk_head_dim = small.qk_rope_head_dim + small.qk_nope_head_dim


def _shrink_rotary_sections(config: PretrainedConfig, small: PretrainedConfig) -> None:
    """The parts of a head that rotate by different positions (mrope) must fill the smaller head."""
    rope = getattr(small, "rope_parameters", None)
    if isinstance(rope, dict) and isinstance(sections := rope.get("mrope_section"), list) and len(sections) == 3:
        half = (getattr(small, "head_dim", None) or small.hidden_size // _HEADS) // 2
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
