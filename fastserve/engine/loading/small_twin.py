"""A small twin of a model: of the same class and settings, with small sizes and random weights, to try out in float32
what a model of its architecture computes."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

_MAX_LAYERS = 8
_MAX_EXPERTS = 4
_EXPERT_NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts")
_EXPERT_WIDTHS = ("moe_intermediate_size", "shared_expert_intermediate_size")


def make_small_twin(config: PretrainedConfig, kv_heads: int | None = None) -> PreTrainedModel:
    """The twin of a model with these settings; `kv_heads`: of its 4 heads, by default 4 or 2 like the model. Raises
    errors of all kinds when the architecture does not allow these sizes."""
    small = shrink(config.get_text_config(decoder=True), kv_heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                # Parameters initialised to zeros or ones must matter too. Large enough that each changes the logits.
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval().requires_grad_(False)


def shrink(config: PretrainedConfig, kv_heads: int | None = None) -> PretrainedConfig:
    """The settings of the twin."""
    small = copy.deepcopy(config)
    own_kv_heads = getattr(config, "num_key_value_heads", None)
    small.num_hidden_layers = _num_layers(config)
    small.hidden_size, small.intermediate_size, small.vocab_size = 96, 160, 128
    small.num_attention_heads = 4
    is_latent = hasattr(config, "qk_rope_head_dim")  # multi-head latent attention: sizes of heads are its own
    if own_kv_heads is not None and is_latent:
        small.num_key_value_heads = 4
    elif own_kv_heads is not None:
        small.num_key_value_heads = kv_heads or (4 if own_kv_heads == config.num_attention_heads else 2)
    if getattr(config, "head_dim", None) is not None and not is_latent:
        small.head_dim = 32
    if getattr(config, "layer_types", None) is not None:
        small.layer_types = config.layer_types[: small.num_hidden_layers]
    if getattr(config, "sliding_window", None) is not None:
        small.sliding_window = 8
    if getattr(config, "rotary_dim", None) is not None:
        small.rotary_dim = 8
    _shrink_experts(small)
    small.pad_token_id = small.bos_token_id = small.eos_token_id = 0
    return small


def _shrink_experts(small: PretrainedConfig) -> None:
    for name in _EXPERT_NUMBERS:
        if isinstance(getattr(small, name, None), int):
            setattr(small, name, min(_MAX_EXPERTS, getattr(small, name)))
    for name in _EXPERT_WIDTHS:
        if isinstance(getattr(small, name, None), int):
            setattr(small, name, min(64, getattr(small, name)))
    if isinstance(getattr(small, "num_experts_per_tok", None), int):
        small.num_experts_per_tok = min(2, small.num_experts_per_tok)
    for name in ("n_group", "topk_group"):
        if isinstance(getattr(small, name, None), int):
            setattr(small, name, 1)


def _num_layers(config: PretrainedConfig) -> int:
    """Enough layers to have one of each type."""
    types = getattr(config, "layer_types", None) or []
    needed = max((types.index(kind) + 1 for kind in set(types)), default=2)
    num_layers: int = config.num_hidden_layers
    return min(num_layers, max(2, min(needed, _MAX_LAYERS)))
