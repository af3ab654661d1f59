"""What the worker tells an engine process at its start."""

from __future__ import annotations

import msgspec


class PackedCheckpoint(msgspec.Struct, frozen=True):
    """A quantized checkpoint that flags point to. What is None is read off its tensors."""

    method: str
    """gptq or awq"""
    path: str | None = None
    """A file or folder; None: the model's own folder."""
    bits: int | None = None
    group_size: int | None = None
    act_order: bool = False


class WeightOptions(msgspec.Struct, frozen=True):
    """Where the weights come from, and how they are kept."""

    quantize: str | None = None
    """int8 or nf4: how weights of linear layers are packed while they are read."""
    packed: PackedCheckpoint | None = None
    gguf_file: str | None = None
    adapter_dir: str | None = None
    """Of a LoRA adapter that is added to the weights."""
    dummy: bool = False
    """Random weights; no file of weights is looked for."""


class EngineConfig(msgspec.Struct, frozen=True):
    """Travels as JSON on the engine process's command line. Unset sizes are found from the model and free memory."""

    model_dir: str
    device: str | None = None
    dtype: str | None = None
    num_gpus: int = 1
    max_gpu_memory: int | None = None
    """bytes"""
    cpu_offloading: bool = False
    max_model_len: int | None = None
    max_total_tokens: int | None = None
    gpu_memory_utilization: float = 0.9
    block_size: int = 16
    max_num_batched_tokens: int | None = None
    max_num_seqs: int = 256
    prefix_cache: bool = True
    speculative_method: str = "ngram"
    """ngram or off"""
    num_speculative_tokens: int = 8
    speculative_model_dir: str | None = None
    """Of a draft model, which then takes the place of the method."""
    weights: WeightOptions = WeightOptions()
    trust_remote_code: bool = False
    profile_steps: int = 0
    profile_dir: str = "logs"
    debug: bool = False
    log_level: str = "info"
