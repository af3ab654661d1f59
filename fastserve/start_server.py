"""rtp-llm's start command: `TP_SIZE=2 WORLD_SIZE=2 CHECKPOINT_PATH=... python -m fastserve.start_server`.

Starts a model worker from rtp-llm's environment variables. Flags of the worker may follow, and win. The worker serves
clients directly; with FASTSERVE_CONTROLLER_ADDRESS or --controller-address it registers with that controller.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence

from fastserve import model_worker
from fastserve.distributed.environment import read_environment
from fastserve.distributed.shared_memory import small_shared_memory
from fastserve.errors import StartupError
from fastserve.serving.server import run_entry

logger = logging.getLogger(__name__)
ENV_CONTROLLER = "FASTSERVE_CONTROLLER_ADDRESS"


def main(argv: Sequence[str] | None = None) -> None:
    flags = sys.argv[1:] if argv is None else argv
    arguments: list[str] = []

    # Before logging is set up, which the worker does by its flags: messages go to standard error as they are.
    run_entry(lambda: arguments.extend(worker_arguments(os.environ, flags)))
    model_worker.main(arguments)


def worker_arguments(environ: Mapping[str, str], flags: Sequence[str]) -> list[str]:
    """The worker's command line. Raises EnvironmentFault for a wrong environment."""
    settings = read_environment(environ)
    world = settings.world
    if world.local_size < world.size:
        raise StartupError(
            f"LOCAL_WORLD_SIZE={world.local_size} of WORLD_SIZE={world.size}: ranks on several machines are not "
            "supported. Start all ranks on one machine: leave LOCAL_WORLD_SIZE and DISTRIBUTE_CONFIG_FILE out."
        )
    if settings.without_effect:
        logger.warning("variables that have no effect here: %s", ", ".join(settings.without_effect))
    warning = small_shared_memory(world.local_size)
    if warning is not None:
        logger.warning(warning)
    arguments = ["--model-path", str(settings.checkpoint), "--host", "0.0.0.0", "--port", str(world.port)]
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
