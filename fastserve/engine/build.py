"""From settings to a core that is ready: load, probe, size the KV cache, verify, measure."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

import psutil
import torch

from fastserve.engine.contract import EngineInfo, SamplingParams
from fastserve.engine.core import EngineCore
from fastserve.engine.plan import Chunk, NewSequence, StepPlan
from fastserve.engine.runner.loading import LoadedModel, Progress, load_model
from fastserve.engine.runner.runner import ModelRunner, probe_shapes
from fastserve.engine.runner.verify import verify
from fastserve.engine.settings import EngineConfig
from fastserve.engine.speed import REFERENCE_BATCH, SpeedMeter
from fastserve.errors import StartupError

logger = logging.getLogger(__name__)

_BATCHED_TOKENS = {True: 256, False: 2048}
"""The token budget on a CPU and elsewhere: as few as still make full use of the device, since all answers wait for a
step to end. On a CPU, products of 256 tokens are as fast for each token as larger ones."""
_CPU_SHARE = 0.5
"""Of the memory that --gpu-memory-utilization allows, what the KV cache takes on a CPU, which it shares with others."""


def build_core(config: EngineConfig, progress: Progress) -> EngineCore:
    """Load the model and make everything ready. Raises StartupError with a sentence for the person."""
    begin = time.perf_counter()
    loaded = load_model(
        config.model_dir,
        config.device,
        config.dtype,
        trust_remote_code=config.trust_remote_code,
        progress=progress,
    )
    if config.debug:
        logger.info("%s", loaded.model)
    with _told_in_a_sentence(type(loaded.model).__name__):
        probe_shapes(loaded)
    if not loaded.attention.shapes:
        raise StartupError(f"{type(loaded.model).__name__} cannot be served: it has no attention that can be paged.")
    max_model_len, num_blocks = _sizes(config, loaded)
    runner = ModelRunner(
        loaded,
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
    )
    name = type(loaded.model).__name__
    with _told_in_a_sentence(name):
        verify(
            loaded.reference,
            runner,
            name,
            loaded.dtype,
            block_size=config.block_size,
            num_blocks=num_blocks,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
        )
    speed = _measure(runner, num_blocks, config)
    model_config = loaded.model.config
    info = EngineInfo(
        model_path=config.model_dir,
        architecture=type(loaded.model).__name__,
        device=str(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        vocab_size=model_config.get_text_config(decoder=True).vocab_size,
        max_model_len=max_model_len,
        block_size=config.block_size,
        num_blocks=num_blocks,
        eos_token_ids=loaded.eos_token_ids,
        num_parameters=loaded.weights.num_parameters,
        load_s=time.perf_counter() - begin,
    )
    return EngineCore(
        info,
        runner,
        speed,
        max_num_batched_tokens=config.max_num_batched_tokens or _BATCHED_TOKENS[loaded.device.type == "cpu"],
        max_num_seqs=config.max_num_seqs,
        prefix_cache=config.prefix_cache,
    )


@contextlib.contextmanager
def _told_in_a_sentence(name: str) -> Iterator[None]:
    """Model code that fails when it is first run ends the start with a sentence; the log has the rest."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError) as error:
        logger.exception("%s failed when it was tried", name)
        raise StartupError(f"{name} cannot be served: its code failed when it was tried ({error}).") from error


def _sizes(config: EngineConfig, loaded: LoadedModel) -> tuple[int, int]:
    """(longest sequence in tokens, number of KV blocks)"""
    if config.max_model_len is not None and config.max_model_len > loaded.context_length:
        raise StartupError(
            f"--max-model-len {config.max_model_len} exceeds the model's context of {loaded.context_length} tokens."
        )
    max_model_len = config.max_model_len or loaded.context_length
    per_token = loaded.attention.bytes_per_token(loaded.dtype)
    if config.max_total_tokens is not None:
        total_tokens = config.max_total_tokens
    else:
        affordable = _free_bytes(loaded.device, config.gpu_memory_utilization) // per_token
        # More than every sequence at its longest is never used.
        total_tokens = min(affordable, config.max_num_seqs * max_model_len)
    num_blocks = total_tokens // config.block_size
    if num_blocks < 2:
        raise StartupError(
            f"The KV cache would hold {total_tokens} tokens only ({per_token} bytes each): free memory, or raise "
            "--gpu-memory-utilization or --max-total-tokens."
        )
    capacity = num_blocks * config.block_size
    if max_model_len > capacity:
        if config.max_model_len is not None:
            raise StartupError(
                f"--max-model-len {max_model_len} does not fit the KV cache of {capacity} tokens: lower it, or raise "
                "--max-total-tokens."
            )
        logger.warning("Context shortened from %d to %d tokens: the KV cache holds no more.", max_model_len, capacity)
        max_model_len = capacity
    return max_model_len, num_blocks


def _free_bytes(device: torch.device, utilization: float) -> int:
    if not 0 < utilization <= 1:
        raise StartupError(f"--gpu-memory-utilization {utilization} must lie between 0 and 1.")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(free - (1 - utilization) * total))
    if device.type == "xpu":
        free, total = torch.xpu.mem_get_info(device)
        return max(0, int(free - (1 - utilization) * total))
    return int(psutil.virtual_memory().available * utilization * _CPU_SHARE)


def _measure(runner: ModelRunner, num_blocks: int, config: EngineConfig) -> SpeedMeter:
    """Time steps of one and of a few sequences' single tokens; also warms up what the first request would wait for."""
    count = max(1, min(2 * REFERENCE_BATCH, config.max_num_seqs, num_blocks))
    small = _time_decode(runner, 1)
    if count == 1:
        return SpeedMeter((1, small), (2, 2 * small))
    return SpeedMeter((1, small), (count, _time_decode(runner, count)))


def _time_decode(runner: ModelRunner, count: int, repeats: int = 3) -> float:
    params = SamplingParams(max_tokens=1)
    times = []
    for _ in range(repeats):
        new = [NewSequence(i, [0], 1, params, 0) for i in range(count)]
        chunks = [Chunk(i, 0, 1, [i], sample=True) for i in range(count)]
        begin = time.perf_counter()
        runner.execute(StepPlan([], new, chunks))
        times.append(time.perf_counter() - begin)
        runner.forget(list(range(count)))
    return min(times)
