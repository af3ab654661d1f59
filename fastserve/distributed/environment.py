"""rtp-llm's environment of one model over several processes, checked as a whole before anything starts.

The variables and their meaning are those of rtp-llm's documentation; everything that contradicts is reported at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastserve.distributed.machines import NUM_PORTS, Machine, read_machines
from fastserve.distributed.problems import Problems
from fastserve.distributed.variables import Variables

DEFAULT_PORT = 8088
MAX_RANKS = 64
DEFAULT_TIMEOUT_MIN = 30
_MAX_TIMEOUT_MIN = 7 * 24 * 60
_DTYPES = {"FP16": "float16", "BF16": "bfloat16", "FP32": "float32"}
_WEIGHT_TYPES = (*_DTYPES, "INT8", "INT4")
WITHOUT_EFFECT = (
    *("DIST_BARRIER_TIMEOUT", "EXTRA_DATA_PATH", "FT_DISABLE_CUSTOM_AR", "GANG_SLEEP_TIME", "INT8_KV_CACHE"),
    *("KV_CACHE_MEM_MB", "LOAD_CKPT_NUM_PROCESS", "PRE_ALLOCATE_OP_MEM", "PY_LOG_LEVEL", "TP_SPLIT_EMB_AND_LMHEAD"),
    *("TP_RANK", "VIT_TRT"),
)
"""Variables of rtp-llm that have no counterpart here."""


@dataclass(frozen=True)
class World:
    """The ranks of one model, and which of them run on this machine."""

    size: int
    local_size: int
    first_rank: int
    """Rank of this machine's first process."""
    port: int
    machines: tuple[Machine, ...]
    """All machines by part; empty if this one is alone, or if the file that lists them does not exist yet."""
    timeout_min: int
    """Minutes that a machine waits for the others."""
    expert_parallel: bool
    """Whether experts are given out whole to the ranks."""


@dataclass(frozen=True)
class ServerEnvironment:
    world: World
    checkpoint: Path
    tokenizer: Path | None
    """None: in the folder of the checkpoint."""
    model_type: str | None
    max_model_len: int | None
    max_concurrency: int | None
    dtype: str | None
    load_8bit: bool
    load_4bit: bool
    reuse_cache: bool
    without_effect: tuple[str, ...]
    """Names of variables that are set and have no counterpart here."""


def read_environment(environ: Mapping[str, str]) -> ServerEnvironment:
    """Raises EnvironmentFault, with everything that is wrong."""
    problems = Problems()
    variables = Variables(environ, problems)
    checkpoint = variables.path("CHECKPOINT_PATH")
    if variables.text("CHECKPOINT_PATH") is None:
        problems.add("CHECKPOINT_PATH is not set. Give the folder of the model.")
    tokenizer = variables.path("TOKENIZER_PATH")
    weights = variables.choice("WEIGHT_TYPE", _WEIGHT_TYPES)
    _check_lora(variables, problems)
    found = ServerEnvironment(
        world=_world(variables, problems),
        checkpoint=checkpoint or Path(),
        tokenizer=None if tokenizer is None or _is_same(tokenizer, checkpoint) else tokenizer,
        model_type=variables.text("MODEL_TYPE"),
        max_model_len=variables.optional_integer("MAX_SEQ_LEN", 2),
        max_concurrency=variables.optional_integer("CONCURRENCY_LIMIT", 1),
        dtype=_DTYPES.get(weights or ""),
        load_8bit=weights == "INT8",
        load_4bit=weights == "INT4",
        reuse_cache=variables.choice("REUSE_CACHE", ("0", "1")) != "0",
        without_effect=tuple(name for name in WITHOUT_EFFECT if variables.text(name) is not None),
    )
    problems.raise_if_any()
    return found


def _is_same(tokenizer: Path, checkpoint: Path | None) -> bool:
    return checkpoint is not None and tokenizer.resolve() == checkpoint.resolve()


def _world(variables: Variables, problems: Problems) -> World:
    size = variables.integer("WORLD_SIZE", 1, 1, MAX_RANKS)
    tp_size = variables.integer("TP_SIZE", 1, 1, MAX_RANKS)
    pp_size = variables.integer("PP_SIZE", 1, 1, MAX_RANKS)
    first_rank = variables.integer("WORLD_RANK", 0, 0, MAX_RANKS)
    port = variables.integer("START_PORT", DEFAULT_PORT, 1, 65535)
    timeout_min = variables.integer("GANG_TIMEOUT_MIN", DEFAULT_TIMEOUT_MIN, 1, _MAX_TIMEOUT_MIN)
    file = variables.text("DISTRIBUTE_CONFIG_FILE")
    # Without a file of machines all ranks run on this one, as with rtp-llm on a machine with as many GPUs.
    local_size = variables.integer("LOCAL_WORLD_SIZE", 1 if file else size, 1, MAX_RANKS)
    if pp_size > 1 and variables.are_valid("PP_SIZE"):
        problems.add(f"PP_SIZE={pp_size}: layers cannot be divided over ranks (pipeline parallelism). Leave it out.")
    dp_size = variables.integer("DP_SIZE", 1, 0, MAX_RANKS)
    if dp_size > 1:
        problems.add(f"DP_SIZE={dp_size} is not supported: start more workers of the model in its place.")
    ep_size = variables.integer("EP_SIZE", 1, 0, MAX_RANKS)
    if ep_size > 1 and variables.are_valid("TP_SIZE") and ep_size != tp_size:
        problems.add(
            f"EP_SIZE={ep_size} and TP_SIZE={tp_size}: experts are given out to all ranks or to none. "
            f"Set EP_SIZE={tp_size}, or leave it out to have every expert divided like the rest of the model."
        )
    if variables.are_valid("TP_SIZE", "PP_SIZE", "WORLD_SIZE") and tp_size * pp_size != size:
        problems.add(
            f"TP_SIZE={tp_size} times PP_SIZE={pp_size} is {tp_size * pp_size}, and WORLD_SIZE={size}: "
            f"they must be equal. Set WORLD_SIZE={tp_size * pp_size}, or TP_SIZE={size}."
        )
    if variables.are_valid("WORLD_RANK", "WORLD_SIZE") and first_rank >= size:
        problems.add(f"WORLD_RANK={first_rank} must be less than WORLD_SIZE={size}: ranks are numbered from 0.")
    if variables.are_valid("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        _check_machine_size(local_size, size, file, problems)
        if variables.are_valid("WORLD_RANK") and first_rank % local_size:
            problems.add(
                f"WORLD_RANK={first_rank} must be the number of the machine times LOCAL_WORLD_SIZE={local_size}: "
                f"a machine's first rank. Give {first_rank - first_rank % local_size} or "
                f"{first_rank - first_rank % local_size + local_size}."
            )
        _check_devices(variables, local_size, problems)
    machines = _machines(file, port, variables, problems)
    if machines and variables.are_valid("LOCAL_WORLD_SIZE", "WORLD_SIZE", "WORLD_RANK"):
        own = _check_machines(machines, local_size, size, first_rank, problems)
        if own is not None and variables.text("START_PORT") is None:
            port = own.port
        elif own is not None and own.port != port:
            problems.add(
                f"START_PORT={port}, and DISTRIBUTE_CONFIG_FILE has port {own.port} for machine {own.name}, which "
                f"WORLD_RANK={first_rank} is the first rank of. Set START_PORT={own.port}, or correct the file."
            )
    return World(size, local_size, first_rank, port, tuple(machines), timeout_min, ep_size > 1)


def _check_machine_size(local_size: int, size: int, file: str | None, problems: Problems) -> None:
    if local_size > size:
        problems.add(
            f"LOCAL_WORLD_SIZE={local_size} is more than WORLD_SIZE={size}: a machine cannot have more ranks than "
            "there are in all."
        )
    elif size % local_size:
        problems.add(
            f"WORLD_SIZE={size} is no multiple of LOCAL_WORLD_SIZE={local_size}: every machine has as many ranks."
        )
    elif local_size < size and file is None:
        problems.add(
            f"LOCAL_WORLD_SIZE={local_size} is less than WORLD_SIZE={size}: there are {size // local_size} machines, "
            "and DISTRIBUTE_CONFIG_FILE is not set. List them in that file, or leave LOCAL_WORLD_SIZE out to have all "
            "ranks on this machine."
        )


def _check_devices(variables: Variables, local_size: int, problems: Problems) -> None:
    listed = variables.text("CUDA_VISIBLE_DEVICES")
    devices = [part.strip() for part in (listed or "").split(",") if part.strip()]
    if listed is None or devices == ["-1"] or listed in ("NoDevFiles", "none"):
        return  # all, or none: then the ranks run on the CPU
    if len(set(devices)) != len(devices):
        problems.add(f"{variables.shown('CUDA_VISIBLE_DEVICES')} names a device twice: each rank needs its own.")
    elif len(devices) < local_size:
        problems.add(
            f"{variables.shown('CUDA_VISIBLE_DEVICES')} has {len(devices)} devices for {local_size} ranks on this "
            "machine: each rank needs its own."
        )


def _machines(file: str | None, port: int, variables: Variables, problems: Problems) -> list[Machine]:
    """The machines in the file; none if it does not exist yet, as it may be written while this machine starts."""
    path = Path(file).expanduser() if file else None
    if path is None or not variables.are_valid("START_PORT") or not path.exists():
        return []
    return read_machines(path, port, problems)


def _check_machines(
    machines: list[Machine], local_size: int, size: int, first_rank: int, problems: Problems
) -> Machine | None:
    """Return this machine; None if it is not in the file."""
    if len(machines) * local_size != size:
        problems.add(
            f"{len(machines)} machines in DISTRIBUTE_CONFIG_FILE with LOCAL_WORLD_SIZE={local_size} ranks each are "
            f"{len(machines) * local_size} ranks, and WORLD_SIZE={size}."
        )
        return None
    own = machines[first_rank // local_size]
    if own.ip in ("0.0.0.0", "::"):
        problems.add(f"Machine {own.name} in DISTRIBUTE_CONFIG_FILE has the ip {own.ip}, which others cannot reach.")
    if local_size < size:
        _check_ports(machines, problems)
    return own


def _check_ports(machines: list[Machine], problems: Problems) -> None:
    """Each machine takes ports from its own on; several of them may be on one host."""
    before: Machine | None = None
    for item in sorted(machines, key=lambda machine: (machine.ip, machine.port)):
        if item.port + NUM_PORTS > 65536:
            problems.add(
                f"Machine {item.name} in DISTRIBUTE_CONFIG_FILE takes {NUM_PORTS} ports from {item.port} on, beyond "
                "65535. Choose a lower one."
            )
        if before is not None and before.ip == item.ip and item.port < before.port + NUM_PORTS:
            problems.add(
                f"Machines {before.name} and {item.name} in DISTRIBUTE_CONFIG_FILE have the ports {before.port} and "
                f"{item.port} of one address, and each takes {NUM_PORTS} ports from its own on. Choose ports that are "
                f"at least {NUM_PORTS} apart."
            )
        before = item


def _check_lora(variables: Variables, problems: Problems) -> None:
    """The worker reads the variable itself, as the default of --lora-modules, and finds the folders."""
    text = variables.text("LORA_INFO")
    if text is None:
        return
    try:
        adapters = json.loads(text)
    except (ValueError, RecursionError):
        adapters = None
    if not isinstance(adapters, dict) or not all(isinstance(path, str) for path in adapters.values()):
        problems.add(
            f'{variables.shown("LORA_INFO")} is no JSON object of names and folders, such as {{"a": "/path"}}.'
        )
