"""Gives all workers of a model the weights of a folder: `python -m fastserve.update_weights --model NAME --path DIR`.

One worker after the other, so that the others serve meanwhile, or all at once. A worker that fails keeps its old
weights and is named; the exit code is 1 then.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

from fastserve.access.cluster_client import CONNECT_TIMEOUT_S, ClusterClient, Outcome
from fastserve.config import CONTROLLER_PORT
from fastserve.errors import StartupError
from fastserve.launching.console import Console
from fastserve.options import option, parse_config


@dataclass(frozen=True)
class UpdateWeightsConfig:
    """Gives all workers of a model the weights of a folder, while they serve."""

    title: ClassVar[str] = "update of weights"

    model: str = option("", "a name under which the workers serve the model")
    path: str = option("", "the folder of a whole checkpoint, on each worker's machine")
    controller_address: str = option(f"http://localhost:{CONTROLLER_PORT}", "the controller's address")
    weight_version: str | None = option(
        None, "what the workers call the new weights; if unset the number of their updates"
    )
    mode: str = option(
        "drain",
        "what becomes of running requests: they finish first, are computed anew, go on as they are, or end",
        choices=("drain", "retract", "in_place", "abort"),
    )
    at_once: bool = option(False, "all workers at once; otherwise one after the other")
    timeout_s: float = option(3600.0, "seconds for each worker", minimum=1)
    admin_key_file: str | None = option(None, "file with the workers' admin key; else FASTSERVE_ADMIN_KEY")
    cluster_key_file: str | None = option(
        None, "file with the cluster key, where there is no admin key; else FASTSERVE_CLUSTER_KEY or the user's own"
    )
    tls_ca: str | None = option(None, "file with the authority that signed the services' certificates")


def update_weights(config: UpdateWeightsConfig, console: Console) -> bool:
    """Update each worker; return whether all succeeded. Raises StartupError if there is nobody to call."""
    for name in ("model", "path"):
        if not getattr(config, name):
            raise StartupError(f"Give --{name}.")
    with ClusterClient(
        config.controller_address,
        admin_key_file=config.admin_key_file,
        cluster_key_file=config.cluster_key_file,
        ca_file=config.tls_ca,
    ) as cluster:
        workers = cluster.workers_of(config.model)

        def update(worker: str) -> Outcome:
            console.say(f"{worker}: loading {config.path} ...")
            body = {
                "model_path": config.path,
                "mode": config.mode,
                "weight_version": config.weight_version,
                "timeout_s": config.timeout_s,
            }
            outcome = cluster.call(worker, "/update_weights_from_disk", body, config.timeout_s + CONNECT_TIMEOUT_S)
            if outcome.is_success:
                console.say(f"{worker}: has version {outcome.reply.get('weight_version')}")
            else:
                console.say(f"{worker}: FAILED, keeps its old weights: {outcome.message}")
            return outcome

        with ThreadPoolExecutor(len(workers) if config.at_once else 1) as pool:
            outcomes = list(pool.map(update, workers))
    failed = [outcome.address for outcome in outcomes if not outcome.is_success]
    if failed:
        console.say(
            f"{len(outcomes) - len(failed)} of {len(outcomes)} workers have the new weights; not {', '.join(failed)}"
        )
    else:
        console.say(f"All {len(outcomes)} workers of {config.model} have the new weights.")
    return not failed


def main(argv: Sequence[str] | None = None) -> None:
    try:
        config = parse_config(UpdateWeightsConfig, argv, "fastserve.update_weights", os.environ)
        succeeded = update_weights(config, Console(sys.stdout))
    except StartupError as error:
        Console(sys.stderr).say(error.message)
        sys.exit(1)
    except KeyboardInterrupt:
        Console(sys.stderr).say("Interrupted: some workers may have the new weights, and others the old ones.")
        sys.exit(130)
    sys.exit(0 if succeeded else 1)


if __name__ == "__main__":
    main()
