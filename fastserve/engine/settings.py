"""What the worker tells an engine process at its start."""

from __future__ import annotations

import msgspec


class EngineConfig(msgspec.Struct, frozen=True):
    """Travels as JSON on the engine process's command line. Unset sizes are found from the model and free memory."""

    model_dir: str
    device: str | None = None
    dtype: str | None = None
    max_model_len: int | None = None
    max_total_tokens: int | None = None
    gpu_memory_utilization: float = 0.9
    block_size: int = 16
    max_num_batched_tokens: int | None = None
    max_num_seqs: int = 256
    prefix_cache: bool = True
    trust_remote_code: bool = False
    debug: bool = False
    log_level: str = "info"
