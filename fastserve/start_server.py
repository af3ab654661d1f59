"""rtp-llm's start command: `TP_SIZE=2 WORLD_SIZE=2 CHECKPOINT_PATH=... python -m fastserve.start_server`.

Starts a model worker from rtp-llm's environment variables. Flags of the worker may follow, and win. The worker serves
clients directly; with FASTSERVE_CONTROLLER_ADDRESS or --controller-address it registers with that controller.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence

from fastserve import model_worker
from fastserve.distributed.environment import read_environment
from fastserve.distributed.gang import Gang
from fastserve.distributed.problems import EnvironmentFault
from fastserve.distributed.shared_memory import small_shared_memory
from fastserve.errors import StartupError
from fastserve.serving.server import run_entry

logger = logging.getLogger(__name__)
ALL_ADDRESSES = "::"
"""IPv4 and IPv6: machines of a model reach each other by either."""
ENV_CONTROLLER = "FASTSERVE_CONTROLLER_ADDRESS"
POLL_S = 1.0
REPORT_INTERVAL_S = 10.0
WRITING_S = 5.0
"""Time in which a file of machines that has come late may be incomplete."""


def main(argv: Sequence[str] | None = None) -> None:
    flags = sys.argv[1:] if argv is None else argv
    arguments: list[str] = []
    gangs: list[Gang | None] = []

    def read() -> None:
        # Before logging is set up, which the worker does by its flags: messages go to standard error as they are.
        arguments.extend(worker_arguments(os.environ, flags))
        gangs.append(find_gang(os.environ))

    run_entry(read)
    model_worker.main(arguments, gangs[0])


def find_gang(environ: Mapping[str, str], poll_s: float = POLL_S) -> Gang | None:
    """The machines of the model; None: it is on one. Waits for the file that lists them.

    Raises EnvironmentFault for a wrong environment or file, StartupError when the file does not come."""
    world = read_environment(environ).world
    if world.local_size == world.size:
        return None
    deadline, next_report = time.monotonic() + 60 * world.timeout_min, 0.0
    path = environ.get("DISTRIBUTE_CONFIG_FILE", "")
    patience_s = 0.0
    while not world.machines:
        now = time.monotonic()
        if now >= deadline:
            raise StartupError(
                f"DISTRIBUTE_CONFIG_FILE={path} does not exist after {world.timeout_min} minutes (GANG_TIMEOUT_MIN)."
            )
        if now >= next_report:
            next_report = now + REPORT_INTERVAL_S
            logger.warning("waiting for DISTRIBUTE_CONFIG_FILE=%s, which does not exist yet", path)
        time.sleep(poll_s)
        try:
            world = read_environment(environ).world
        except EnvironmentFault:
            # It may be half written.
            patience_s += poll_s
            if patience_s > WRITING_S:
                raise
    return Gang.of(world, world.machines, 60.0 * world.timeout_min)


def worker_arguments(environ: Mapping[str, str], flags: Sequence[str]) -> list[str]:
    """The worker's command line. Raises EnvironmentFault for a wrong environment."""
    settings = read_environment(environ)
    world = settings.world
    if settings.without_effect:
        logger.warning("variables that have no effect here: %s", ", ".join(settings.without_effect))
    warning = small_shared_memory(world.local_size)
    if warning is not None:
        logger.warning(warning)
    arguments = ["--model-path", str(settings.checkpoint), "--host", ALL_ADDRESSES, "--port", str(world.port)]
    for flag, value in (
        ("--tokenizer-path", settings.tokenizer),
        ("--tp-size", world.size if world.size > 1 else None),
        ("--max-model-len", settings.max_model_len),
        ("--limit-worker-concurrency", settings.max_concurrency),
        ("--dtype", settings.dtype),
        ("--controller-address", environ.get(ENV_CONTROLLER) or None),
    ):
        if value is not None:
            arguments += [flag, str(value)]
    registers = bool(environ.get(ENV_CONTROLLER)) or any(flag.startswith("--controller") for flag in flags)
    for flag, is_set in (
        ("--enable-expert-parallel", world.expert_parallel),
        ("--load-8bit", settings.load_8bit),
        ("--load-4bit", settings.load_4bit),
        ("--no-prefix-cache", not settings.reuse_cache),
        ("--no-register", not registers),
    ):
        if is_set:
            arguments.append(flag)
    return [*arguments, *flags]


if __name__ == "__main__":
    main()
