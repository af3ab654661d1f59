"""Flags of FastChat's model worker that are parsed but not supported, and combinations of flags that are invalid."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastserve.config import WorkerConfig
from fastserve.engine.scheduling import check as check_scheduling
from fastserve.engine.spread import Spread, read_gpu_memory, refuse_gpu_ids, refuse_spread
from fastserve.errors import StartupError
from fastserve.options import check_ranges

Refusal = tuple[Callable[[WorkerConfig], bool], str]

_LATER = "is not available in this version of fastserve"

REFUSALS: Sequence[Refusal] = (
    (lambda c: c.device == "npu", f"--device npu {_LATER}: choose cpu, cuda, mps or xpu."),
    (
        lambda c: c.tp_size > 1 and (c.num_gpus > 1 or c.cpu_offloading),
        "--tp-size excludes --num-gpus and --cpu-offloading: with it each rank has one GPU, or CPU cores of its own.",
    ),
    (
        lambda c: c.enable_expert_parallel and c.tp_size == 1,
        "--enable-expert-parallel says how experts are given out to ranks: give --tp-size of at least 2 too, or leave "
        "it out.",
    ),
    (lambda c: c.load_8bit and c.load_4bit, "--load-8bit and --load-4bit exclude each other: give one of them."),
    (
        lambda c: _is_gptq(c) and _is_awq(c),
        "The gptq and awq flags exclude each other: a checkpoint is of one kind.",
    ),
    (
        lambda c: (c.load_8bit or c.load_4bit) and (_is_gptq(c) or _is_awq(c)),
        "--load-8bit and --load-4bit quantize weights that are not yet quantized: leave them out with a GPTQ or AWQ "
        "checkpoint.",
    ),
    (
        lambda c: not _is_gptq(c) and (c.gptq_act_order or c.gptq_groupsize != -1),
        "--gptq-groupsize and --gptq-act-order say something about GPTQ weights: give --gptq-wbits or --gptq-ckpt too, "
        "or leave them out.",
    ),
    (
        lambda c: not _is_awq(c) and c.awq_groupsize != -1,
        "--awq-groupsize says something about AWQ weights: give --awq-wbits or --awq-ckpt too, or leave it out.",
    ),
    (
        lambda c: c.dummy and (_is_gptq(c) or _is_awq(c)),
        "--dummy reads no weights, so it excludes the gptq and awq flags; use --load-8bit or --load-4bit for random "
        "weights of that size.",
    ),
    (
        lambda c: (
            c.enable_exllama
            or c.exllama_gpu_split is not None
            or c.exllama_cache_8bit
            or c.exllama_max_seq_len != WorkerConfig.exllama_max_seq_len
        ),
        f"ExLlamaV2 (--enable-exllama and its options) {_LATER}: leave it out; GPTQ weights are served without it "
        "(--gptq-ckpt, --gptq-wbits).",
    ),
    (
        lambda c: c.enable_xft or c.xft_dtype is not None or c.xft_max_seq_len != WorkerConfig.xft_max_seq_len,
        f"xFasterTransformer (--enable-xft and its options) {_LATER}: leave it out; --load-8bit and --load-4bit work "
        "on a CPU.",
    ),
    (
        lambda c: c.embed_in_truncate and c.embedding_long_inputs not in (None, "truncate"),
        "--embed-in-truncate and --embedding-long-inputs say different things: give one of them.",
    ),
    (
        lambda c: c.conv_template is not None and c.chat_template is not None,
        "--conv-template and --chat-template both name a chat template: leave out one of them.",
    ),
)


def _is_gptq(config: WorkerConfig) -> bool:
    return config.gptq_ckpt is not None or config.gptq_wbits != WorkerConfig.gptq_wbits


def _is_awq(config: WorkerConfig) -> bool:
    return config.awq_ckpt is not None or config.awq_wbits != WorkerConfig.awq_wbits


def refuse_unavailable(config: WorkerConfig, num_local_ranks: int | None = None) -> None:
    """Raises StartupError for the first flag that is unsupported, out of range or in conflict with another.

    `num_local_ranks`: ranks on this machine, if others are on other machines."""
    _refuse_gpus(config, num_local_ranks or config.tp_size)
    if config.machine_collectives is not None and num_local_ranks is None:
        raise StartupError(
            f"--machine-collectives {config.machine_collectives} says how ranks on several machines exchange tensors "
            "(DISTRIBUTE_CONFIG_FILE): leave it out."
        )
    if config.engine == "fake" and num_local_ranks is not None:
        raise StartupError("--engine fake serves on one machine alone: leave DISTRIBUTE_CONFIG_FILE out.")
    for is_refused, message in REFUSALS:
        if is_refused(config):
            raise StartupError(message)
    check_ranges(WorkerConfig, config)
    check_scheduling(config)
    for flag, size in (("--gptq-groupsize", config.gptq_groupsize), ("--awq-groupsize", config.awq_groupsize)):
        if size < 1 and size != -1:
            raise StartupError(f"{flag} {size} is out of range: give at least 1, or -1 for what the weights have.")


def _refuse_gpus(config: WorkerConfig, num_ranks: int) -> None:
    """Check the flags about GPUs alone. The engine checks them against the devices of the machine."""
    if config.gpus is not None:
        refuse_gpu_ids(config.gpus)
        if len(config.gpus.split(",")) < config.num_gpus:
            raise StartupError(f"Larger --num-gpus ({config.num_gpus}) than --gpus {config.gpus}!")
        if len(config.gpus.split(",")) < num_ranks:
            where = "" if num_ranks == config.tp_size else f", of which {num_ranks} on this machine,"
            raise StartupError(
                f"Larger --tp-size ({config.tp_size}){where} than --gpus {config.gpus}: name one GPU for each rank."
            )
    if config.max_gpu_memory is not None:
        read_gpu_memory(config.max_gpu_memory)
    if config.device != "npu":
        refuse_spread(config.device or "cuda", Spread(config.num_gpus, cpu_offloading=config.cpu_offloading))
