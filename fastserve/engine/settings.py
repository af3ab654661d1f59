"""What the worker tells an engine process at its start."""

from __future__ import annotations

import msgspec


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
    trust_remote_code: bool = False
    profile_steps: int = 0
    profile_dir: str = "logs"
    debug: bool = False
    log_level: str = "info"
