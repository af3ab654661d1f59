"""config.json and generation_config.json of a GGUF file, from its metadata.

llama.cpp's code fixes some properties of an architecture (activations, the pattern of windows, scales of the largest
models), which no file states. They are constants here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from fastserve.errors import StartupError
from fastserve.gguf.file import Gguf
from fastserve.gguf.tokens import Vocabulary

Config = dict[str, Any]
_F32 = 0
_BF16 = 30
_GEMMA2_PATTERN, _GEMMA3_PATTERN = 2, 6
"""Every second layer of Gemma 2, and every sixth of Gemma 3, attends to the whole context."""
_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62
_MAX_ROUNDED_LOW_FREQ_FACTOR = 8
_NOT_NEEDED = {
    "attention.layer_norm_epsilon",
    "embedding_length_out",
    "pooling_type",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "vocab_size",
}
"""Keys that change no logit, or repeat what the tensors say."""
_WITH_EXPERTS = {"llama", "qwen2moe", "qwen3moe", "olmoe", "granitemoe"}
"""Architectures that are served with a mixture of experts; all but the first have one always."""
_SOFTMAX = 1
"""The gating function, in llama.cpp's numbers."""


def make_config(file: Gguf, vocabulary: Vocabulary) -> Config:
    """config.json. Raises StartupError when the metadata is incomplete, or describes a model that is not served."""
    if file.architecture not in ARCHITECTURES:
        raise refuse_architecture(file)
    keys = _Keys(file)
    try:
        config = {**_common(keys, vocabulary), **ARCHITECTURES[file.architecture](keys)}
        keys.refuse_unread()
        return config
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise StartupError(f"{file.file}: its metadata does not fit together: {error}. Download it again.") from error


def make_generation_config(file: Gguf, vocabulary: Vocabulary) -> Config:
    """generation_config.json: end tokens, and the publisher's sampling parameters if the file has any."""
    config: Config = {"eos_token_id": list(vocabulary.end_ids)}
    if vocabulary.bos_id is not None:
        config["bos_token_id"] = vocabulary.bos_id
    recommended = {
        name: file.scalar(f"general.sampling.{key}", float)
        for key, name in (("temp", "temperature"), ("top_k", "top_k"), ("top_p", "top_p"), ("min_p", "min_p"))
        if f"general.sampling.{key}" in file.metadata
    }
    if recommended:
        config |= {"do_sample": True, **{name: _rounded(value) for name, value in recommended.items()}}
    return config


def refuse_architecture(file: Gguf) -> StartupError:
    """The error for an architecture that is not served."""
    return StartupError(
        f"{file.file} holds a model of the architecture {file.architecture[:80]!r}; of GGUF files "
        f"{', '.join(sorted(ARCHITECTURES))} are served. Use the model's safetensors."
    )


_BOOLEANS = {"attention.causal", "rope.scaling.finetuned", "expert_weights_norm"}
_TEXTS = {"rope.scaling.type"}
_WHOLE_NUMBERS = ("_count", "_count_kv", "_length", "_func", "sliding_window")
_PATTERN_KEY = "attention.sliding_window_pattern"
"""A whole number, or true or false for each layer."""


class _Keys:
    """The metadata keys of the file's architecture, and its tensors."""

    def __init__(self, file: Gguf) -> None:
        self.file = file
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """A value. A list of equal values, one for each layer, counts as one; raises StartupError for other lists."""
        value = self.each_layer(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if isinstance(value, list):
            raise StartupError(
                f"{self.file.file}: {self.file.architecture}.{key} differs between layers, which is not served."
            )
        return _rounded(value) if isinstance(value, float) else value

    def each_layer(self, key: str, default: Any = None) -> Any:
        """A value, or a list of values, one for each layer."""
        self._read.add(key)
        name = f"{self.file.architecture}.{key}"
        value = self.file.metadata.get(name, default)
        if key != _PATTERN_KEY:
            for item in value if isinstance(value, list) else [value]:
                self.file.checked(name, item, _kind_of(key), default)
        return value

    def refuse_unread(self) -> None:
        """Refuse keys that nothing has read, unless they have a value that leaves the model as it is: a property that
        is left out would change every answer."""
        prefix = f"{self.file.architecture}."
        for name in sorted(self.file.metadata):
            key, value = name.removeprefix(prefix), self.file.metadata[name]
            if key == name or key in self._read | _NOT_NEEDED:
                continue
            if any(not _is_neutral(key, item) for item in (value if isinstance(value, list) else [value])):
                raise StartupError(
                    f"{self.file.file}: {name[:80]!r} is {str(value)[:80]!r}, which is not served for this "
                    "architecture. Use the model's safetensors."
                )

    def require(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise StartupError(
                f"{self.file.file} does not say {self.file.architecture}.{key}: it is no whole model. Download it "
                "again, or put the model's config.json and tokenizer beside it."
            )
        return value

    def count(self, key: str) -> int:
        """A positive whole number that every model has."""
        value = self.require(key)
        if type(value) is not int or value <= 0:
            raise StartupError(
                f"{self.file.file}: {self.file.architecture}.{key} is {repr(value)[:80]}, and must be a "
                "positive whole number. Download it again."
            )
        return value

    def has(self, tensor: str) -> bool:
        return tensor in self.file.tensors

    @property
    def head_dim(self) -> int:
        size = int(self.get("attention.key_length", self.require("embedding_length") // self.heads))
        if self.get("attention.value_length", size) != size:
            raise StartupError(f"{self.file.file}: keys and values of different lengths are not served.")
        return size

    @property
    def heads(self) -> int:
        return self.count("attention.head_count")

    def numbers(self, tensor: str) -> list[float]:
        """The values of a small float32 tensor."""
        found = self.file.tensors.get(tensor)
        if found is None:
            raise StartupError(f"{self.file.file} has no tensor {tensor}: it is no whole model. Download it again.")
        if found.type_id != _F32:
            raise StartupError(f"{found.file}: the tensor {tensor} is not in float32.")
        values = np.fromfile(found.file, np.dtype("<f4"), count=int(np.prod(found.shape)), offset=found.offset)
        if len(values) != int(np.prod(found.shape)):
            raise StartupError(f"{found.file} is cut off in the tensor {tensor}. Download it again.")
        return [_rounded(value) for value in values.tolist()]


def _kind_of(key: str) -> type:
    if key in _BOOLEANS:
        return bool
    if key in _TEXTS:
        return str
    return int if key.endswith(_WHOLE_NUMBERS) else float


def _is_neutral(key: str, value: Any) -> bool:
    return value in (0, "", "none") or (value == 1 and key.endswith(("scale", "factor")))


def _rounded(value: Any) -> Any:
    """A float32 in its shortest form: 1e-5, not 9.99999974e-06."""
    if not isinstance(value, float):
        return value
    short = float(f"{value:.7g}")
    try:
        return short if struct.pack("f", short) == struct.pack("f", value) else value
    except OverflowError:
        return value


def _common(keys: _Keys, vocabulary: Vocabulary) -> Config:
    if keys.get("expert_count") and keys.file.architecture not in _WITH_EXPERTS:
        raise StartupError(
            f"{keys.file.file} holds a mixture of experts, which is not served for the architecture "
            f"{keys.file.architecture}. Use the model's safetensors."
        )
    if keys.file.metadata.get("general.type", "model") != "model":
        raise StartupError(
            f"{keys.file.file} is no model, but of the type {str(keys.file.metadata['general.type'])[:80]!r}. Give the "
            "file of the model."
        )
    if not keys.has("token_embd.weight"):
        raise StartupError(f"{keys.file.file} has no tensor token_embd.weight: it is no whole model.")
    rows = keys.file.tensors["token_embd.weight"].shape[0]
    if len(vocabulary.texts) > rows:
        raise StartupError(
            f"{keys.file.file} has {len(vocabulary.texts)} tokens, and embeddings of {rows}: it is broken. Download it "
            "again."
        )
    if not keys.get("attention.causal", True):
        raise StartupError(
            f"{keys.file.file}: its attention is not causal ({keys.file.architecture}.attention.causal), so it "
            "generates no text."
        )
    types = {tensor.type_id for tensor in keys.file.tensors.values()}
    return {
        "vocab_size": keys.file.tensors["token_embd.weight"].shape[0],
        "hidden_size": keys.count("embedding_length"),
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": keys.heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", keys.heads),
        "rms_norm_eps": keys.require("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": keys.count("context_length"),
        "tie_word_embeddings": not keys.has("output.weight"),
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": list(vocabulary.end_ids),
        "pad_token_id": vocabulary.pad_id,
        # The training dtype, as far as a quantized file shows it.
        "dtype": "float32" if types == {_F32} else "bfloat16",
        "rope_parameters": _rope(keys),
    }


def _rope(keys: _Keys) -> Config:
    rope: Config = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", 10000.0)}
    # Old files have scale_linear; a factor without a type is linear.
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0.0)) or 1.0
    kind = keys.get("rope.scaling.type", "none" if factor == 1.0 else "linear")
    original = keys.get("rope.scaling.original_context_length", keys.require("context_length"))
    rotated = keys.get("rope.dimension_count", keys.head_dim)
    if rotated != keys.head_dim:
        rope["partial_rotary_factor"] = rotated / keys.head_dim
        if keys.file.architecture != "phi3":
            raise StartupError(f"{keys.file.file}: rotary positions of {rotated} of {keys.head_dim} are not served.")
    for tensor, makes in _ROPE_TENSORS.items():
        if not keys.has(tensor):
            continue
        if kind not in ("none", makes):
            raise StartupError(
                f"{keys.file.file}: rope.scaling.type {str(kind)[:80]!r} contradicts its tensor {tensor}. Download it "
                "again."
            )
        if keys.file.tensors[tensor].shape != (rotated // 2,):
            raise StartupError(
                f"{keys.file.file}: the tensor {tensor} has the shape {keys.file.tensors[tensor].shape}, and "
                f"{(rotated // 2,)} is needed."
            )
        kind = makes
    match kind:
        case "none":
            return rope
        case "linear":
            return rope | {"rope_type": "linear", "factor": factor}
        case "yarn":
            return rope | _yarn(keys, factor, original)
        case "llama3" if keys.has("rope_freqs.weight"):
            return rope | _llama3(keys.numbers("rope_freqs.weight"), rope["rope_theta"])
        case "longrope":
            return rope | _longrope(keys, original)
    raise StartupError(f"{keys.file.file}: rope.scaling.type {str(kind)[:80]!r} is not served.")


_ROPE_TENSORS = {
    "rope_factors_long.weight": "longrope",
    "rope_factors_short.weight": "longrope",
    "rope_freqs.weight": "llama3",
}
"""Tensors of divisors of the rotary frequencies, and the type of scaling that they make."""


def _yarn(keys: _Keys, factor: float, original: int) -> Config:
    rope: Config = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    own = keys.get("rope.scaling.attn_factor", 1.0)
    usual = 0.1 * float(np.log(factor)) + 1
    if own != 1.0:
        rope["attention_factor"] = own * usual
    stated = keys.get("rope.scaling.yarn_attn_factor", 1.0)
    if stated not in (1.0, -1.0) and abs(stated - usual) > 1e-4:
        raise StartupError(f"{keys.file.file}: rope.scaling.yarn_attn_factor {stated} is not served.")
    mixed = keys.get("rope.scaling.yarn_ext_factor", 1.0)
    if mixed not in (1.0, -1.0):
        raise StartupError(f"{keys.file.file}: rope.scaling.yarn_ext_factor {mixed} is not served.")
    for name in ("beta_fast", "beta_slow"):
        value = keys.get(f"rope.scaling.yarn_{name}")
        if value is not None:
            rope[name] = value
    return rope


def _longrope(keys: _Keys, original: int) -> Config:
    rope: Config = {
        "rope_type": "longrope",
        "long_factor": keys.numbers("rope_factors_long.weight"),
        "short_factor": keys.numbers("rope_factors_short.weight"),
        "original_max_position_embeddings": original,
        "factor": keys.require("context_length") / original,
    }
    attention_factor = keys.get("rope.scaling.attn_factor")
    return rope if attention_factor is None else rope | {"attention_factor": attention_factor}


def _llama3(divisors: list[float], theta: float) -> Config:
    """Parameters of Llama 3's RoPE scaling, from the divisor of each frequency.

    Between its ends, 1 and 1/factor, 1/divisor is linear in the frequency. Slope and offset give high_freq_factor and
    the original length for a low_freq_factor of 1. Multiples of the three are equivalent: the first is taken that is
    round.
    """
    values = np.array(divisors)
    if (values == 1).all():
        return {}
    frequencies = theta ** (-np.arange(len(values)) / len(values))
    factor = float(values.max())
    between = (values > 1) & (values < factor)
    rope: Config = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0}
    smooth = (1 / values[between] - 1 / factor) / (1 - 1 / factor)
    turns = frequencies / (2 * np.pi)
    if len(smooth) >= 2:
        slope, offset = np.polyfit(turns[between], smooth, 1)
        high = float(1 - 1 / offset)
        original = float(slope * (high - 1))
    else:
        # Too few frequencies for both: high_freq_factor is that of all published models.
        high = 4.0
        lowest = turns[values <= 1].min(initial=1.0)
        original = float((smooth[0] * (high - 1) + 1) / turns[between][0] if len(smooth) else high / lowest)
    for low in range(1, _MAX_ROUNDED_LOW_FREQ_FACTOR + 1):
        found = rope | {
            "low_freq_factor": float(low),
            "high_freq_factor": round(low * high, 2),
            "original_max_position_embeddings": round(low * original),
        }
        # Errors grow with positions: only those of float32 are left.
        if np.allclose(_llama3_divisors(found, frequencies), values, rtol=2e-6):
            return found
    raise StartupError("rope_freqs.weight holds a scaling of positions that is not Llama 3's, and is not served.")


def _llama3_divisors(rope: Config, frequencies: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    divisors: np.ndarray[Any, Any] = 1 / ((1 - smooth) / factor + smooth)
    return divisors


def _layer_types(keys: _Keys, pattern: int | None = None) -> list[str]:
    """Type of each layer where some attend to a window. `pattern`: period of layers that attend to the whole context,
    for files that do not state it."""
    layers = keys.require("block_count")
    stated = keys.each_layer("attention.sliding_window_pattern", pattern)
    if stated is None:
        raise StartupError(
            f"{keys.file.file} has a window of attention (attention.sliding_window), and does not say for which layers "
            "(attention.sliding_window_pattern). Use the model's safetensors."
        )
    if not isinstance(stated, list):
        stated = [(layer + 1) % stated != 0 for layer in range(layers)]
    if len(stated) != layers:
        raise StartupError(
            f"{keys.file.file}: attention.sliding_window_pattern has {len(stated)} entries, and the model {layers} "
            "layers. Download it again."
        )
    return ["sliding_attention" if slides else "full_attention" for slides in stated]


def _some_windows(keys: _Keys) -> Config:
    window = keys.get("attention.sliding_window")
    if not window:
        return {}
    return {"use_sliding_window": True, "sliding_window": window, "layer_types": _layer_types(keys)}


def _experts(keys: _Keys, *, normalized: bool) -> tuple[int, int]:
    """Number of experts, and how many of them compute each token. `normalized`: whether the architecture's code scales
    the weights of a token's experts so that they sum to 1. Raises StartupError for another kind of routing."""
    for key, served in (("expert_gating_func", _SOFTMAX), ("expert_weights_norm", normalized)):
        found = keys.get(key, served)
        if found != served:
            raise StartupError(
                f"{keys.file.file}: {keys.file.architecture}.{key} is {str(found)[:80]!r}, which is not served for "
                "this architecture. Use the model's safetensors."
            )
    num_experts, num_used = keys.count("expert_count"), keys.count("expert_used_count")
    if num_used > num_experts:
        raise StartupError(
            f"{keys.file.file}: {keys.file.architecture}.expert_used_count is {num_used}, and there are {num_experts} "
            "experts. Download it again."
        )
    return num_experts, num_used


def _qwen_experts(keys: _Keys, *, normalized: bool) -> Config:
    num_experts, num_used = _experts(keys, normalized=normalized)
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": num_used,
        "norm_topk_prob": normalized,
        # As llama.cpp reads files without the key.
        "moe_intermediate_size": keys.get("expert_feed_forward_length", keys.count("feed_forward_length") // num_used),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _mixtral(keys: _Keys) -> Config:
    num_experts, num_used = _experts(keys, normalized=True)
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "head_dim": keys.head_dim,
        "sliding_window": keys.get("attention.sliding_window") or None,
        "num_local_experts": num_experts,
        "num_experts_per_tok": num_used,
    }


def _llama(keys: _Keys) -> Config:
    if keys.get("expert_count"):
        return _mixtral(keys)
    window = keys.get("attention.sliding_window")
    if window:
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_act": "silu",
            "head_dim": keys.head_dim,
            "sliding_window": window,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "head_dim": keys.head_dim,
        "attention_bias": keys.has("blk.0.attn_q.bias"),
        "mlp_bias": keys.has("blk.0.ffn_up.bias"),
    }


def _mistral3(keys: _Keys) -> Config:
    """Ministral 3, or Mistral Small 3, which does not scale its queries by position."""
    beta = keys.get("attention.temperature_scale", 0.0)
    config = {
        "architectures": ["Ministral3ForCausalLM" if beta else "MistralForCausalLM"],
        "model_type": "ministral3" if beta else "mistral",
        "hidden_act": "silu",
        "head_dim": keys.head_dim,
        "sliding_window": None,
    }
    rope = _rope(keys)
    if rope["rope_type"] == "yarn":
        multiplier = keys.get("rope.scaling.yarn_log_multiplier")
        if multiplier:
            rope |= {"mscale": 1.0, "mscale_all_dim": multiplier}
    if beta:
        if rope["rope_type"] != "yarn":
            raise StartupError(
                f"{keys.file.file}: mistral3.attention.temperature_scale is {beta}, and there is no YaRN scaling of "
                "positions, whose original length it needs. Download it again."
            )
        rope["llama_4_scaling_beta"] = beta
    return config | {"rope_parameters": rope}


def _qwen2(keys: _Keys) -> Config:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "head_dim": keys.head_dim,
        **_some_windows(keys),
    }


def _qwen2moe(keys: _Keys) -> Config:
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "hidden_act": "silu",
        "head_dim": keys.head_dim,
        "qkv_bias": keys.has("blk.0.attn_q.bias"),
        "shared_expert_intermediate_size": keys.get(
            "expert_shared_feed_forward_length", keys.count("feed_forward_length")
        ),
        **_qwen_experts(keys, normalized=False),
    }


def _qwen3moe(keys: _Keys) -> Config:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_act": "silu",
        "head_dim": keys.head_dim,
        "attention_bias": keys.has("blk.0.attn_q.bias"),
        **_qwen_experts(keys, normalized=True),
    }


def _olmoe(keys: _Keys) -> Config:
    num_experts, num_used = _experts(keys, normalized=False)
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "hidden_act": "silu",
        "num_experts": num_experts,
        "num_experts_per_tok": num_used,
        "norm_topk_prob": False,
    }


def _qwen3(keys: _Keys) -> Config:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "head_dim": keys.head_dim,
        "attention_bias": keys.has("blk.0.attn_q.bias"),
        **_some_windows(keys),
    }


def _gemma(keys: _Keys) -> Config:
    return {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": keys.head_dim,
    }


def _gemma2(keys: _Keys) -> Config:
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": keys.head_dim,
        "query_pre_attn_scalar": _query_scale(keys, _GEMMA2_27B_LAYERS),
        "sliding_window": keys.get("attention.sliding_window", 4096),
        "layer_types": _layer_types(keys, _GEMMA2_PATTERN),
        "attn_logit_softcapping": keys.get("attn_logit_softcapping", 50.0) or None,
        "final_logit_softcapping": keys.get("final_logit_softcapping", 30.0) or None,
    }


def _gemma3(keys: _Keys) -> Config:
    whole = _rope(keys)
    local = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10000.0)}
    # Without a window, all layers attend to the whole context.
    window = keys.get("attention.sliding_window")
    types = _layer_types(keys, _GEMMA3_PATTERN) if window else ["full_attention"] * keys.require("block_count")
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": keys.head_dim,
        "query_pre_attn_scalar": _query_scale(keys, _GEMMA3_27B_LAYERS),
        "sliding_window": window or keys.require("context_length"),
        "layer_types": types,
        "rope_parameters": {"full_attention": whole, "sliding_attention": local},
        "attn_logit_softcapping": keys.get("attn_logit_softcapping") or None,
        "final_logit_softcapping": keys.get("final_logit_softcapping") or None,
    }


def _query_scale(keys: _Keys, layers_of_27b: int) -> int:
    """query_pre_attn_scalar: the head's size, except in the models of 27 billion parameters."""
    if keys.require("block_count") == layers_of_27b:
        return int(keys.require("embedding_length")) // keys.heads
    return keys.head_dim


def _phi3(keys: _Keys) -> Config:
    original = keys.get("rope.scaling.original_context_length", keys.require("context_length"))
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_act": "silu",
        "original_max_position_embeddings": original,
        "sliding_window": keys.get("attention.sliding_window") or None,
        "partial_rotary_factor": _rope(keys).get("partial_rotary_factor", 1.0),
    }


def _smollm3(keys: _Keys) -> Config:
    return {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "hidden_act": "silu",
        "head_dim": keys.head_dim,
        "no_rope_layer_interval": 4,
        "attention_bias": keys.has("blk.0.attn_q.bias"),
        "use_sliding_window": False,
    }


def _granite(keys: _Keys) -> Config:
    if not keys.get("rope.scaling.finetuned", True):
        raise StartupError(
            f"{keys.file.file}: Granite without rotary positions ({keys.file.architecture}.rope.scaling.finetuned) is "
            "not served."
        )
    return {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "hidden_act": "silu",
        "head_dim": keys.head_dim,
        "attention_bias": keys.has("blk.0.attn_q.bias"),
        "mlp_bias": keys.has("blk.0.ffn_up.bias"),
        "embedding_multiplier": keys.get("embedding_scale") or 1.0,
        "residual_multiplier": keys.get("residual_scale") or 1.0,
        "attention_multiplier": keys.get("attention.scale") or keys.head_dim**-0.5,
        "logits_scaling": keys.get("logit_scale") or 1.0,
    }


def _granitemoe(keys: _Keys) -> Config:
    num_experts, num_used = _experts(keys, normalized=True)
    shared = keys.get("expert_shared_feed_forward_length", 0)
    return {
        **_granite(keys),
        "architectures": ["GraniteMoeSharedForCausalLM" if shared else "GraniteMoeForCausalLM"],
        "model_type": "granitemoeshared" if shared else "granitemoe",
        "num_local_experts": num_experts,
        "num_experts_per_tok": num_used,
        **({"shared_intermediate_size": shared} if shared else {}),
    }


ARCHITECTURES: dict[str, Callable[[_Keys], Config]] = {
    "llama": _llama,
    "mistral3": _mistral3,
    "qwen2": _qwen2,
    "qwen2moe": _qwen2moe,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "olmoe": _olmoe,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "smollm3": _smollm3,
    "granite": _granite,
    "granitemoe": _granitemoe,
}
"""Architectures that are served from GGUF files, each with the keys of config.json that not all of them share."""
