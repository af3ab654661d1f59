"""Ends what launchers started, and only that: `python -m fastserve.shutdown --serve all|controller|...`.

The API server goes first and the controller last, so that running requests can end and workers can say goodbye. Each
service gets SIGTERM, then time to drain; what still runs after that is killed with all that it started.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from fastserve import supervisor
from fastserve.config import ShutdownConfig
from fastserve.errors import StartupError
from fastserve.options import parse_config
from fastserve.supervisor import Run

ORDER = ("openai_api_server", "model_worker", "controller")


def shut_down(config: ShutdownConfig) -> None:
    """Raises StartupError when a run file cannot be read or a service may not be ended by this user."""
    log_dir = Path(config.log_dir)
    wanted = config.down or config.serve
    runs = {run.run_id: run for run in supervisor.read_runs(log_dir)}
    chosen = [run_id for run_id, run in runs.items() if config.server_port in (None, run.server_port)]
    ended = 0
    for kind in ORDER:
        if wanted not in ("all", kind):
            continue
        for run_id in chosen:
            runs[run_id], count = _end_kind(log_dir, runs[run_id], kind, config.drain_timeout_s)
            ended += count
    if not ended:
        print(f"Nothing to shut down: no {'service' if wanted == 'all' else wanted} of a launch in {log_dir} runs.")


def _end_kind(log_dir: Path, run: Run, kind: str, drain_timeout_s: float) -> tuple[Run, int]:
    """End one kind of service of one launch. Returns what is left of the run, and how many were ended."""
    of_kind = [service for service in run.services if service.kind == kind]
    running = [service for service in of_kind if supervisor.members(run, service)]
    for service in running:
        print(f"Ending {service.name} (process {service.pid}, port {service.port})", flush=True)
    try:
        killed = supervisor.end_services(run, running, drain_timeout_s)
    except psutil.AccessDenied as error:
        raise StartupError(f"Process {error.pid} belongs to another user: run the shutdown as that user.") from error
    for service in running:
        print(f"{service.name} {f'was killed after {drain_timeout_s:g} s' if service in killed else 'has ended'}")
    left = Run(run.run_id, run.server_port, tuple(service for service in run.services if service.kind != kind))
    supervisor.write_run(log_dir, left)
    return left, len(running)


def main(argv: Sequence[str] | None = None) -> None:
    try:
        shut_down(parse_config(ShutdownConfig, argv, "fastserve.shutdown", os.environ))
    except StartupError as error:
        print(error.message, file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
