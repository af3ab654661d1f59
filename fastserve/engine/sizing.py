"""How large everything may be: the KV cache takes the memory that the largest step and the books leave. Of a model on
several devices, each has the pages of its own layers, and the least of what they afford is the number of blocks.

Each share is an upper bound told in advance, because what is found out later is found out by being killed. So the sizes
are a promise: an engine at its limits, with every block in use and its largest step running, stays within the memory
that was free when it started.
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
"""Threads' stacks, compiled products, buffers of the messages: what grows after the start and with no size of ours."""
_BYTES_PER_DRAWN_ENTRY = 48
"""Of the logits that the sampler sorts and cumulates at once."""
_BYTES_PER_QUEUED_TOKEN = 52
"""Of a sequence that waits or runs: its number in two lists of Python, and in the runner's table."""
_BYTES_PER_CACHED_TOKEN = 150
"""Of a token in the KV cache: its part in the key of its block, and in the index that drafts are looked up in."""
_BYTES_PER_BLOCK = 600
_NO_BOUND = 1 << 60
"""tokens"""


@dataclass(frozen=True, slots=True)
class Sizes:
    max_model_len: int
    num_blocks: int
    max_num_batched_tokens: int


@dataclass(slots=True)
class _Room:
    """The memory of one device, for the KV cache of the layers that live there."""

    device: Device
    free: FreeMemory
    allowed: int
    per_token: int
    others: int = 0

    def affords(self, num_bytes: int) -> int:
        """Tokens. A device without layers sets no bound."""
        return max(0, num_bytes) // self.per_token if self.per_token else _NO_BOUND

    def num_tokens(self) -> int:
        room = self.allowed - self.others
        room = min(room, int(self.allowed * self.device.kv_cache_share))
        return self.affords(room) if room > 0 else 0


def find_sizes(config: EngineConfig, models: Sequence[LoadedModel]) -> Sizes:
    """Sizes for `models`, the first of which is served; others (a draft model) have the same blocks.

    Raises StartupError when a flag cannot be honoured, or when memory does not suffice for the smallest sizes.
    """
    _check_flags(config, models[0])
    devices = list(dict.fromkeys(device for model in models for device in model.devices))
    tokens = config.max_num_batched_tokens or min(device_of(device).max_batched_tokens for device in devices)
    context = config.max_model_len or models[0].context_length
    rooms = [_find_room(config, models, device) for device in devices]
    # No sequence is longer than the cache, so a cache that is small makes small tables too.
    cached = config.max_total_tokens or max(1, min(room.affords(room.allowed) for room in rooms))
    longest = min(context, cached)
    for room in rooms:
        room.others = _other_bytes(config, models, room.device, tokens, longest)
    tightest = min(rooms, key=_Room.num_tokens)
    if config.max_total_tokens is None:
        # More than every sequence at its longest is never used.
        total_tokens = min(tightest.num_tokens(), config.max_num_seqs * context)
    else:
        total_tokens = config.max_total_tokens
        for room in rooms:
            _require_room(room, total_tokens)
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
    for room in rooms:
        logger.info(
            "KV cache of %d tokens (%s); %s are kept for the largest step of %d tokens; %s are free %s",
            capacity, _megabytes(capacity * room.per_token), _megabytes(room.others), tokens,
            _megabytes(room.free.num_bytes), room.free.where,
        )  # fmt: skip
    return Sizes(context, num_blocks, tokens)


def _check_flags(config: EngineConfig, model: LoadedModel) -> None:
    if config.max_model_len is not None and config.max_model_len > model.context_length:
        raise StartupError(
            f"--max-model-len {config.max_model_len} exceeds the model's context of {model.context_length} tokens."
        )


def _find_room(config: EngineConfig, models: Sequence[LoadedModel], torch_device: torch.device) -> _Room:
    device = device_of(torch_device)
    free = device.free_memory()
    allowed = device.allowed_bytes(free, config.gpu_memory_utilization)
    return _Room(device, free, allowed, _bytes_per_token(models, config.block_size, device))


def _other_bytes(config: EngineConfig, models: Sequence[LoadedModel], device: Device, tokens: int, longest: int) -> int:
    """Of a device, beside weights and KV cache."""
    others = max(step_bytes(model, config, tokens, longest, device.torch_device) for model in models)
    return others + (config.max_num_seqs * longest * _BYTES_PER_QUEUED_TOKEN if device.holds_books else 0)


def _require_room(room: _Room, total_tokens: int) -> None:
    if total_tokens * room.per_token + room.others > room.free.num_bytes:
        raise StartupError(
            f"--max-total-tokens {total_tokens} takes {_megabytes(total_tokens * room.per_token)} for the KV cache, "
            f"and the largest step takes {_megabytes(room.others)}; {_megabytes(room.free.num_bytes)} are free "
            f"{room.free.where}. Lower it, or leave it away to have it found."
        )


def _too_small(config: EngineConfig, room: _Room) -> str:
    if config.max_total_tokens is not None:
        return (
            f"--max-total-tokens {config.max_total_tokens} must be at least two blocks of {config.block_size} tokens."
        )
    return (
        f"Not enough memory: {_megabytes(room.free.num_bytes)} are free {room.free.where}, of which "
        f"--gpu-memory-utilization {config.gpu_memory_utilization} allows {_megabytes(room.allowed)}; the largest step "
        f"takes {_megabytes(room.others)}, and a block of the KV cache "
        f"{_megabytes(room.per_token * config.block_size)}. Free memory, or lower "
        "--max-num-seqs, --max-num-batched-tokens or --max-model-len."
    )


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes < 10e9 else f"{num_bytes / 1e9:.1f} GB"


def _bytes_per_token(models: Sequence[LoadedModel], block_size: int, device: Device) -> int:
    """Of the KV cache of the layers there, and of the books about it where these lie in the same memory."""
    cache = sum(model.attention.bytes_per_token(block_size, model.dtype, device.torch_device) for model in models)
    if not device.holds_books:
        return cache
    return cache + _BYTES_PER_CACHED_TOKEN + -(-_BYTES_PER_BLOCK // block_size)


def step_bytes(model: LoadedModel, config: EngineConfig, num_tokens: int, longest: int, device: torch.device) -> int:
    """What the largest step takes of a device beside weights and KV cache; `longest` bounds the context of a
    sequence."""
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
    # The residual, the norms (which some models compute in float32), the inputs of the products; then the gated MLP.
    layer: int = num_tokens * (8 * hidden * size + 4 * hidden * 4 + (projected + 4 * _mlp_width(text)) * size)
    entries: int = min(num_tokens * text.vocab_size, config.max_num_seqs * text.vocab_size + MAX_EXTRA_LOGITS)
    # As the model gives them, wherever its head is.
    logits: int = entries * size
    if device == model.device:
        # Then in float32: a copy that is changed, one for logprobs, and these.
        logits += entries * 5 * 4 + min(entries, SLICE_ENTRIES + text.vocab_size) * _BYTES_PER_DRAWN_ENTRY
    size_of_step = StepSize(num_tokens, config.max_num_seqs, longest)
    attention = model.attention.workspace_bytes(config.block_size, model.dtype, device, size_of_step)
    return _FIXED_BYTES + layer + logits + attention


def _mlp_width(text: PretrainedConfig) -> int:
    """Of the widest layer, for one token: that of the MLP, or of all experts that it goes to."""
    names = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "intermediate_size_mlp")
    widths = [value for name in names if isinstance(value := getattr(text, name, None), int)]
    dense = max(widths, default=4 * text.hidden_size)
    chosen = getattr(text, "num_experts_per_tok", None) or getattr(text, "moe_top_k", None)
    if not chosen:
        return dense
    # Tokens are copied for each of their experts, on the way in and out.
    routed = (getattr(text, "moe_intermediate_size", None) or dense) + text.hidden_size
    return int(max(dense, chosen * routed))
