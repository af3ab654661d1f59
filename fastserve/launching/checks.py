"""Checks before anything starts. What cannot work is refused with a sentence that a person can act on."""

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
    """Raises StartupError with the first thing that cannot work. `running`: the services of earlier launches."""
    check_tls(common_config(config))
    for item in items:
        worker = worker_config(config, item)
        if worker.gpus and len(worker.gpus.split(",")) < worker.num_gpus:
            raise StartupError(f"Larger --num-gpus ({worker.num_gpus}) than --gpus {worker.gpus}!")
        check_model(item.model)
    if config.api_keys is not None and not config.api_keys:
        # As from "$UNSET": a server that was meant to be guarded must not open.
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
    """A model is a path that exists, or has the form of a Hugging Face id. Whether the path holds a model and the hub
    has the id, the worker finds out: it alone knows all kinds of files that it serves."""
    if os.path.exists(model):
        return
    if model.startswith((".", "/", "~", "\\")) or not is_hub_id(model):
        raise StartupError(
            f"The model {model!r} is missing: there is no such file or folder, and it is no Hugging Face id "
            "(owner/name)."
        )


def _check_ports(claims: Sequence[tuple[str, str, int]], running: Sequence[RunningService], log_dir: Path) -> None:
    wanted: dict[int, str] = {}
    for flag, _, port in claims:
        if not 0 < port < 65536:
            raise StartupError(f"{flag} {port}: a port is a number from 1 to 65535.")
        if port in wanted:
            raise StartupError(f"Port {port} is wanted twice: by {wanted[port]} and by {flag}.")
        wanted[port] = flag
    ours = {service.mark.port: service for service in running if service.leader is not None}
    for flag, host, port in claims:
        problem = port_problem(host, port)
        # One that has just been started has not bound its port yet. Those of other folders may be in a container, which
        # has ports of its own.
        if port in ours and (problem or ours[port].mark.log_dir == str(log_dir)):
            mark = ours[port].mark
            raise StartupError(
                f"Port {port} ({flag}) is in use by the {mark.name} of an earlier launch (process {ours[port].pid}): "
                f"end it with `python -m fastserve.shutdown --log-dir {mark.log_dir}`, or choose another port."
            )
        if problem:
            raise StartupError(f"Cannot listen on {host}:{port} ({flag}): {problem}.")
