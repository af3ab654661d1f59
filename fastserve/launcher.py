"""The launcher: starts a controller, model workers and an API server, waits until they serve, and leaves them running.

    python -m fastserve.launcher --model-path-address MODEL@HOST@PORT ...

`launching/plan.py` decides what to start, `launching/checks.py` refuses what cannot work, and a supervisor
(`supervisor.py`) starts and watches the services.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastserve import dispatch
from fastserve.access.cluster_key import ENV_CLUSTER_KEY, find_or_make, make_keys, read_key_file
from fastserve.config import LauncherConfig
from fastserve.errors import StartupError
from fastserve.launching.checks import check
from fastserve.launching.console import Console
from fastserve.launching.handover import Stopped, StopSignals, SupervisorProcess, follow
from fastserve.launching.log_files import locked, prepare_folder, rotate
from fastserve.launching.order import Order
from fastserve.launching.plan import SECRETS, Item, common_config, log_path, parse_item, plan, summary, worker_config
from fastserve.launching.processes import absolute, find_services
from fastserve.observability.private_files import reason
from fastserve.options import parse_config
from fastserve.serving.tls import certificate_paths


def launch(config: LauncherConfig, environ: Mapping[str, str], console: Console, *, package: str = "fastserve") -> None:
    """Start all services and return when they serve.

    Raises StartupError if one fails, and Stopped on Ctrl-C, SIGTERM or SIGHUP; all processes have ended by then.
    """
    items = [parse_item(text) for text in config.model_path_address]
    log_dir = absolute(config.log_dir, "--log-dir")
    for warning in prepare_folder(log_dir, f"--log-dir {config.log_dir}"):
        console.say(warning)
    for name in ("worker_host", "worker_port", "model_path"):
        default = next(item.default for item in dataclasses.fields(config) if item.name == name)
        if getattr(config, name) != default:
            flag = "--" + name.replace("_", "-")
            console.say(f"{flag} has no effect: each item of --model-path-address names its model, host and port.")
    with StopSignals() as signals:

        def on_wait() -> None:
            console.show_progress(f"waiting for another launch or shutdown in {config.log_dir}")
            signals.raise_if_received()

        # Concurrent launches must not choose the same logs, and this one is invisible until its supervisor runs.
        with locked(log_dir, on_wait):
            order, own_log = _prepare(config, items, environ, log_dir, package)
            console.say(f"Starting the services; their logs are in {config.log_dir}")
            own_environ = {name: value for name, value in environ.items() if name not in SECRETS}
            supervisor = SupervisorProcess(order, own_environ, own_log)
        follow(supervisor, console, signals)
        # Inside the block: once services run, the summary is printed whatever signals come.
        console.say(summary(config, items, order.services))


def _prepare(
    config: LauncherConfig, items: Sequence[Item], environ: Mapping[str, str], log_dir: Path, package: str
) -> tuple[Order, Path]:
    """Check the settings and rotate old logs. Returns the order, and the path of the supervisor's log."""
    running = find_services()
    check(config, items, running, log_dir)
    is_second = any(service.mark.log_dir == str(log_dir) for service in running)
    cluster_environ, controller_headers = _cluster_access(config, environ)
    services = plan(
        config,
        items,
        environ,
        package=package,
        log_dir=log_dir,
        is_second=is_second,
        cluster_environ=cluster_environ,
    )
    own_log = log_path(log_dir, "launcher.log", config.server_port, is_second=is_second)
    for log in (own_log, *(spec.log for spec in services.services)):
        try:
            rotate(Path(log), config.log_keep)
        except OSError as error:
            raise StartupError(f"The log {log} cannot be written: {reason(error)}.") from error
    for file in services.state_files:
        try:
            Path(file).unlink(missing_ok=True)
        except OSError as error:
            raise StartupError(f"{file} cannot be removed: {reason(error)}.") from error
    order = Order(
        run_id=uuid.uuid4().hex[:12],
        log_dir=str(log_dir),
        server_port=config.server_port,
        services=services,
        num_registered=sum(not worker_config(config, item).no_register for item in items),
        controller_headers=controller_headers,
        client_certificate=certificate_paths(common_config(config), environ),
        wait_timeout_s=config.wait_timeout_s,
        restart=config.restart,
        log_max_bytes=config.log_max_bytes,
        log_keep=config.log_keep,
    )
    return order, Path(own_log)


def _cluster_access(config: LauncherConfig, environ: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Environment with the cluster key for all services, and headers of requests to the controller.

    Creates the user's key if there is none. Raises StartupError.
    """
    if config.insecure:
        return {}, {}
    if config.cluster_key_file is not None:
        return {}, read_key_file(config.cluster_key_file).authorization()
    given = environ.get(ENV_CLUSTER_KEY, "")
    if given.strip():
        return {}, make_keys(given.split(","), ENV_CLUSTER_KEY).authorization()
    keys = find_or_make(environ)
    return {ENV_CLUSTER_KEY: keys.current}, keys.authorization()


def main(argv: Sequence[str] | None = None, *, package: str = "fastserve") -> None:
    """Entry point. `package`: the Python package that holds the services' modules."""
    _open_standard_streams()
    errors = Console(sys.stderr)
    try:
        choices = {"dispatch_method": dispatch.names()}
        config = parse_config(LauncherConfig, argv, "fastserve.launcher", os.environ, choices)
        launch(config, os.environ, Console(sys.stdout), package=package)
    except StartupError as error:
        errors.say(error.message)
        sys.exit(1)
    except Stopped as error:
        errors.say(f"The launch was ended by {error}.")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # before anything was started
        errors.say("The launch was ended by SIGINT.")
        sys.exit(128 + signal.SIGINT)


def _open_standard_streams() -> None:
    """Open standard streams that are closed, so that no other file gets their descriptor numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


if __name__ == "__main__":
    main()
