"""From settings to a pooling core that is ready."""

from __future__ import annotations

from fastserve.config import EngineOptions
from fastserve.engine.loading.streaming import Progress
from fastserve.engine.pooling.core import PoolingCore
from fastserve.engine.pooling.model import PoolingModel
from fastserve.engine.settings import EngineConfig
from fastserve.options import check_ranges


def build_pooling_core(config: EngineConfig, progress: Progress) -> PoolingCore:
    """Load the model, try it and measure it. Raises StartupError with a message for the user."""
    check_ranges(EngineOptions, config)
    return PoolingCore(PoolingModel(config, progress), config.max_num_batched_tokens, config.max_num_seqs)
