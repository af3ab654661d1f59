"""Ends services that launchers started, and nothing else: `python -m fastserve.shutdown --serve all|controller|...`.

A launch belongs to its log folder; its processes are found by the marks in their environment, even if the folder is
gone. The supervisor ends first, so that nothing is restarted; then the API server, the workers, and the controller
last, so that running requests can finish and workers can deregister. Each service gets SIGTERM and time to drain; then
it is killed together with its child processes.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from fastserve.config import ShutdownConfig
from fastserve.errors import StartupError
from fastserve.launching.console import Console
from fastserve.launching.log_files import locked
from fastserve.launching.processes import SUPERVISOR, RunningService, absolute, end_services, find_services
from fastserve.launching.run_file import RunFile, run_files_in
from fastserve.observability.private_files import reason
from fastserve.options import parse_config

AS_THAT_USER = "run the shutdown as the user who started the launch"
DRAIN_MARGIN_S = 5.0
"""Seconds that a service may take to exit after its drain."""
SHUTDOWN_ORDER = ("openai_api_server", "model_worker", "controller")


def shut_down(config: ShutdownConfig, console: Console) -> None:
    """End the services. Raises StartupError if this user may not end one of them; all others have ended by then."""
    log_dir = absolute(config.log_dir, "--log-dir")
    kind_to_end = config.down or config.serve
    kinds = (SUPERVISOR, *SHUTDOWN_ORDER) if kind_to_end == "all" else (kind_to_end,)
    # Locked against a concurrent shutdown: its second SIGTERM would cut the drain short.
    with locked(log_dir, lambda: console.show_progress(f"waiting for another launch or shutdown in {config.log_dir}")):
        files = _run_files(log_dir)
        if kind_to_end != "all":
            _keep_from_restarting(_find(config, log_dir, files), kind_to_end, console)
        ended = 0
        failures = [] if files is not None else [StartupError(f"{log_dir} is closed to this user: {AS_THAT_USER}.")]
        for kind in kinds:
            services = [service for service in _find(config, log_dir, files) if service.mark.kind == kind]
            try:
                _end(services, _drain_timeout_s(config, services), console)
            except StartupError as error:
                failures.append(error)
            ended += kind != SUPERVISOR and len(services)
        failures += _remove_run_files(config, files or [], console)
    if failures:
        raise failures[0]
    if not ended:
        noun = "service" if kind_to_end == "all" else kind_to_end
        console.say(f"Nothing to shut down: no {noun} of a launch in {config.log_dir} runs.")
        _say_where_others_are(log_dir, console)


def _run_files(log_dir: Path) -> list[RunFile] | None:
    """The run files in the folder; None if this user may not read it."""
    try:
        return run_files_in(log_dir)
    except PermissionError:
        return None


def _find(config: ShutdownConfig, log_dir: Path, files: Sequence[RunFile] | None) -> list[RunningService]:
    """The services of launches that log to the folder or have their run file in it."""
    listed = {file.run_id for file in files or ()}
    return [
        service
        for service in find_services()
        if (service.mark.log_dir == str(log_dir) or service.mark.run_id in listed)
        and config.server_port in (None, service.mark.server_port)
    ]


def _drain_timeout_s(config: ShutdownConfig, services: Sequence[RunningService]) -> float:
    if config.drain_timeout_s is not None:
        return config.drain_timeout_s
    return max((service.mark.drain_timeout_s for service in services), default=0.0) + DRAIN_MARGIN_S


def _end(services: Sequence[RunningService], drain_timeout_s: float, console: Console) -> None:
    loud = [service for service in services if service.mark.kind != SUPERVISOR]
    for service in loud:
        console.say(f"Ending {service.mark.name} (process {service.pid}, port {service.mark.port})")
    killed = {service.mark for service in end_services(services, drain_timeout_s)}
    for service in loud:
        late = service.mark in killed
        console.say(f"{service.mark.name} {f'was killed after {drain_timeout_s:g} s' if late else 'has ended'}")


def _keep_from_restarting(services: Sequence[RunningService], kind: str, console: Console) -> None:
    """Write files that keep the supervisors from restarting services of this kind; if that fails, end them."""
    for supervisor in [service for service in services if service.mark.kind == SUPERVISOR]:
        mark = supervisor.mark
        try:
            RunFile(Path(mark.log_dir), mark.server_port, mark.run_id).write_stopped([kind])
        except OSError as error:
            console.say(
                f"{mark.log_dir} cannot be written ({reason(error)}), so the supervisor is ended too: services of this "
                "launch that die are not started again."
            )
            end_services([supervisor], grace_s=5.0)


def _remove_run_files(config: ShutdownConfig, files: Sequence[RunFile], console: Console) -> list[StartupError]:
    """Remove the run files of launches that have ended. Returns an error for each launch of another user."""
    running = {service.mark.run_id for service in find_services()}
    failures = []
    for file in files:
        if file.run_id in running or config.server_port not in (None, file.server_port):
            continue
        try:
            owner = file.path.lstat().st_uid
            if os.name == "posix" and os.geteuid() not in (0, owner):
                # Its services may still run: the environment of another user's processes cannot be read.
                failures.append(StartupError(f"{file.path} belongs to another user (id {owner}): {AS_THAT_USER}."))
            else:
                file.remove()
        except FileNotFoundError:
            continue
        except OSError as error:
            console.say(f"{file.path} cannot be removed: {reason(error)}.")
    return failures


def _say_where_others_are(log_dir: Path, console: Console) -> None:
    elsewhere = {
        (service.mark.log_dir, service.mark.server_port)
        for service in find_services()
        if service.mark.log_dir != str(log_dir)
    }
    if elsewhere:
        console.say(f"Looked for launches that log to {log_dir}. Others run:")
    for folder, server_port in sorted(elsewhere):
        console.say(f"  --log-dir {folder} --server-port {server_port}")


def main(argv: Sequence[str] | None = None) -> None:
    if os.name == "posix":
        # A shutdown must not stop half-way because its terminal was closed.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    errors = Console(sys.stderr)
    try:
        shut_down(parse_config(ShutdownConfig, argv, "fastserve.shutdown", os.environ), Console(sys.stdout))
    except StartupError as error:
        errors.say(error.message)
        sys.exit(1)
    except KeyboardInterrupt:
        errors.say("Interrupted: some services may still run. Run the shutdown again to end them.")
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
