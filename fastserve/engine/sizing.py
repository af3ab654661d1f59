"""Sizes that fit the memory: the KV cache takes what the largest step and the engine's own state leave. When a model is
on several devices, each holds the KV cache of its own layers, and the device with the least memory sets the number of
blocks.

All sizes are upper bounds computed in advance: an engine at its limits, with every block in use and its largest step
running, stays within the memory that was free when it started. Otherwise it would be killed under load.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from fastserve.engine.attention.backend import StepSize
from fastserve.engine.devices.device import Device
from fastserve.engine.devices.find import device_of
from fastserve.engine.loading.loader import LoadedModel
from fastserve.engine.memory import FreeMemory
from fastserve.engine.plan import MAX_EXTRA_LOGITS
from fastserve.engine.sampling.sampler import SLICE_ENTRIES
from fastserve.engine.settings import EngineConfig
from fastserve.errors import StartupError

logger = logging.getLogger(__name__)

_FIXED_BYTES = 96 << 20
"""Thread stacks, compiled matrix products and message buffers, which grow after the start whatever the sizes."""
_BYTES_PER_SAMPLED_ENTRY = 48
"""For each entry of the logits that the sampler sorts at once."""
_BYTES_PER_QUEUED_TOKEN = 52
"""For each token of a waiting or running sequence: its id in two Python lists, and in the runner's table."""
_BYTES_PER_CACHED_TOKEN = 150
"""For each token in the KV cache: its share of the block's key in the prefix cache, and of the n-gram index."""
_BYTES_PER_BLOCK = 600
_NO_BOUND = 1 << 60
"""Tokens: more than any device holds."""


@dataclass(frozen=True, slots=True)
class Sizes:
    max_model_len: int
    num_blocks: int
    max_num_batched_tokens: int


@dataclass(slots=True)
class _DeviceMemory:
    """Memory of one device in bytes, for the KV cache of its layers."""

    device: Device
    free: FreeMemory
    allowed: int
    """Bytes of the free memory that may be used."""
    per_token: int
    """KV cache of one token."""
    others: int = 0
    """Bytes for everything but weights and KV cache."""

    def tokens_in(self, num_bytes: int) -> int:
        """Number of tokens whose KV cache fits `num_bytes`. A device without layers sets no bound."""
        return max(0, num_bytes) // self.per_token if self.per_token else _NO_BOUND

    def max_tokens(self) -> int:
        """Number of tokens whose KV cache fits this device."""
        num_bytes = min(self.allowed - self.others, int(self.allowed * self.device.kv_cache_share))
        return self.tokens_in(num_bytes) if num_bytes > 0 else 0


def find_sizes(config: EngineConfig, models: Sequence[LoadedModel], num_ranks: int = 1) -> Sizes:
    """Sizes for `models`, the first of which is served; others (a draft model) have the same blocks. `num_ranks`: ranks
    on this machine that share its free memory, all with their weights loaded.

    Raises StartupError when a flag cannot be honoured, or when memory does not suffice for the smallest sizes.
    """
    _check_flags(config, models[0])
    devices = list(dict.fromkeys(device for model in models for device in model.devices))
    tokens = config.max_num_batched_tokens or min(device_of(device).max_batched_tokens for device in devices)
    context = config.max_model_len or models[0].context_length
    memories = [_device_memory(config, models, device, num_ranks) for device in devices]
    # No sequence is longer than the KV cache, so a small one makes small tables too.
    cached = config.max_total_tokens or max(1, min(memory.tokens_in(memory.allowed) for memory in memories))
    longest = min(context, cached)
    for memory in memories:
        memory.others = _other_bytes(config, models, memory.device, tokens, longest)
    tightest = min(memories, key=_DeviceMemory.max_tokens)
    if config.max_total_tokens is None:
        # max_num_seqs sequences of maximum length never use more.
        total_tokens = min(tightest.max_tokens(), config.max_num_seqs * context)
    else:
        total_tokens = config.max_total_tokens
        for memory in memories:
            _require_memory(memory, total_tokens)
    num_blocks = total_tokens // config.block_size
    if num_blocks < 2:
        raise StartupError(_too_small(config, tightest))
    capacity = num_blocks * config.block_size
    if context > capacity:
        if config.max_model_len is not None:
            raise StartupError(
                f"--max-model-len {context} does not fit the KV cache of {capacity} tokens: lower it, or raise "
                "--max-total-tokens."
            )
        logger.warning("Context shortened from %d to %d tokens: the KV cache holds no more.", context, capacity)
        context = capacity
    for memory in memories:
        logger.info(
            "KV cache of %d tokens (%s); %s are kept for the largest step of %d tokens; %s are free %s",
            capacity, _megabytes(capacity * memory.per_token), _megabytes(memory.others), tokens,
            _megabytes(memory.free.num_bytes), memory.free.where,
        )  # fmt: skip
    return Sizes(context, num_blocks, tokens)


def _check_flags(config: EngineConfig, model: LoadedModel) -> None:
    if config.max_model_len is not None and config.max_model_len > model.context_length:
        raise StartupError(
            f"--max-model-len {config.max_model_len} exceeds the model's context of {model.context_length} tokens."
        )


def _device_memory(
    config: EngineConfig, models: Sequence[LoadedModel], torch_device: torch.device, num_ranks: int
) -> _DeviceMemory:
    device = device_of(torch_device)
    free = device.free_memory()
    if device.holds_host_state:  # the machine's memory; each rank has a GPU of its own
        free = FreeMemory(free.num_bytes // num_ranks, free.where)
    allowed = device.allowed_bytes(free, config.gpu_memory_utilization)
    return _DeviceMemory(device, free, allowed, _bytes_per_token(models, config.block_size, device))


def _other_bytes(config: EngineConfig, models: Sequence[LoadedModel], device: Device, tokens: int, longest: int) -> int:
    """Bytes on a device for everything but weights and KV cache."""
    others = max(step_bytes(model, config, tokens, longest, device.torch_device) for model in models)
    return others + (config.max_num_seqs * longest * _BYTES_PER_QUEUED_TOKEN if device.holds_host_state else 0)


def _require_memory(memory: _DeviceMemory, total_tokens: int) -> None:
    if total_tokens * memory.per_token + memory.others > memory.free.num_bytes:
        raise StartupError(
            f"--max-total-tokens {total_tokens} takes {_megabytes(total_tokens * memory.per_token)} for the KV cache, "
            f"and the largest step takes {_megabytes(memory.others)}; {_megabytes(memory.free.num_bytes)} are free "
            f"{memory.free.where}. Lower it, or leave it out to have it chosen."
        )


def _too_small(config: EngineConfig, memory: _DeviceMemory) -> str:
    if config.max_total_tokens is not None:
        return (
            f"--max-total-tokens {config.max_total_tokens} must be at least two blocks of {config.block_size} tokens."
        )
    return (
        f"Not enough memory: {_megabytes(memory.free.num_bytes)} are free {memory.free.where}, of which "
        f"--gpu-memory-utilization {config.gpu_memory_utilization} allows {_megabytes(memory.allowed)}; the largest "
        f"step takes {_megabytes(memory.others)}, and a block of the KV cache "
        f"{_megabytes(memory.per_token * config.block_size)}. Free memory, or lower "
        "--max-num-seqs, --max-num-batched-tokens or --max-model-len."
    )


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes < 10e9 else f"{num_bytes / 1e9:.1f} GB"


def _bytes_per_token(models: Sequence[LoadedModel], block_size: int, device: Device) -> int:
    """Bytes for one token: KV cache of the device's layers, and the engine's state about it if in the same memory."""
    cache = sum(model.attention.bytes_per_token(block_size, model.dtype, device.torch_device) for model in models)
    if not device.holds_host_state:
        return cache
    return cache + _BYTES_PER_CACHED_TOKEN + -(-_BYTES_PER_BLOCK // block_size)


def step_bytes(model: LoadedModel, config: EngineConfig, num_tokens: int, longest: int, device: torch.device) -> int:
    """Bytes that the largest step takes on a device, without weights and KV cache. `longest`: maximum context of a
    sequence in tokens."""
    if device not in model.devices:
        return 0
    text = model.model.config.get_text_config(decoder=True)
    size: int = model.dtype.itemsize
    projected: int = max(
        (
            2 * shape.num_heads * (shape.key_dim + shape.value_dim)
            + 4 * shape.num_kv_heads * (shape.key_dim + shape.value_dim)
            for shape in model.attention.shapes_on(device)
        ),
        default=0,
    )
    hidden: int = text.hidden_size
    # Residual, norms (in float32 in some models), inputs of matrix products; then the gated MLP.
    layer: int = num_tokens * (8 * hidden * size + 4 * hidden * 4 + (projected + 4 * _mlp_width(text)) * size)
    entries: int = min(num_tokens * text.vocab_size, config.max_num_seqs * text.vocab_size + MAX_EXTRA_LOGITS)
    # In the model's dtype, on any device, because any may have the head.
    logits: int = entries * size
    if device == model.device:
        # In float32: the logits, a copy that processors change, and one for logprobs.
        logits += entries * 5 * 4 + min(entries, SLICE_ENTRIES + text.vocab_size) * _BYTES_PER_SAMPLED_ENTRY
    size_of_step = StepSize(num_tokens, config.max_num_seqs, longest)
    attention = model.attention.workspace_bytes(config.block_size, model.dtype, device, size_of_step)
    return _FIXED_BYTES + layer + logits + attention


def _mlp_width(text: PretrainedConfig) -> int:
    """Intermediate size of the widest layer for one token: of the MLP, or of all its experts together."""
    names = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "intermediate_size_mlp")
    widths = [value for name in names if isinstance(value := getattr(text, name, None), int)]
    dense = max(widths, default=4 * text.hidden_size)
    chosen = getattr(text, "num_experts_per_tok", None) or getattr(text, "moe_top_k", None)
    if not chosen:
        return dense
    # Tokens are copied for each of their experts, before and after.
    routed = (getattr(text, "moe_intermediate_size", None) or dense) + text.hidden_size
    return int(max(dense, chosen * routed))
