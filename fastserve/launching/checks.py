"""Checks before anything starts. Each error says what is wrong and how to fix it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fastserve.config import LauncherConfig, is_hub_id
from fastserve.errors import StartupError
from fastserve.launching.plan import Item, common_config, worker_config
from fastserve.launching.processes import RunningService
from fastserve.serving.listen import port_problem
from fastserve.serving.tls import check_tls


def check(
    config: LauncherConfig,
    items: Sequence[Item],
    running: Sequence[RunningService],
    log_dir: Path,
) -> None:
    """Raises StartupError for the first problem found. `running`: the services of earlier launches."""
    check_tls(common_config(config))
    for item in items:
        worker = worker_config(config, item)
        if worker.gpus and len(worker.gpus.split(",")) < worker.num_gpus:
            raise StartupError(f"Larger --num-gpus ({worker.num_gpus}) than --gpus {worker.gpus}!")
        check_model(item.model)
    if config.api_keys is not None and not config.api_keys:
        # For example --api-keys "$UNSET": a server that was meant to be guarded must not start open.
        raise StartupError(
            "--api-keys (or FASTSERVE_API_KEYS) holds no key: name at least one, or leave it out to serve without keys."
        )
    if config.api_keys_file is not None and not Path(config.api_keys_file).is_file():
        raise StartupError(f"--api-keys-file {config.api_keys_file}: there is no such file.")
    claims = [
        ("--controller-port", config.controller_host, config.controller_port),
        ("--server-port", config.server_host, config.server_port),
        *((f"--model-path-address {item.label}", item.host, item.port) for item in items),
    ]
    _check_ports(claims, running, log_dir)


def check_model(model: str) -> None:
    """Raises StartupError unless `model` is an existing path or looks like a Hugging Face id.

    Only the worker checks whether the path holds a model, or the hub has the id: it alone knows all supported formats.
    """
    if os.path.exists(model):
        return
    if model.startswith((".", "/", "~", "\\")) or not is_hub_id(model):
        raise StartupError(
            f"The model {model!r} is missing: there is no such file or folder, and it is no Hugging Face id "
            "(owner/name)."
        )


def _check_ports(claims: Sequence[tuple[str, str, int]], running: Sequence[RunningService], log_dir: Path) -> None:
    flag_of_port: dict[int, str] = {}
    for flag, _, port in claims:
        if not 0 < port < 65536:
            raise StartupError(f"{flag} {port}: a port is a number from 1 to 65535.")
        if port in flag_of_port:
            raise StartupError(f"Port {port} is used twice: by {flag_of_port[port]} and by {flag}.")
        flag_of_port[port] = flag
    ours = {service.mark.port: service for service in running if service.leader is not None}
    for flag, host, port in claims:
        problem = port_problem(host, port)
        # A service that has just started may not have bound its port yet. One that logs to another folder may run in a
        # container, which has ports of its own.
        if port in ours and (problem or ours[port].mark.log_dir == str(log_dir)):
            mark = ours[port].mark
            raise StartupError(
                f"Port {port} ({flag}) is in use by the {mark.name} of an earlier launch (process {ours[port].pid}): "
                f"end it with `python -m fastserve.shutdown --log-dir {mark.log_dir}`, or choose another port."
            )
        if problem:
            raise StartupError(f"Cannot listen on {host}:{port} ({flag}): {problem}.")
