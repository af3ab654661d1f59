"""The launcher: starts a controller, model workers and an API server, waits until they serve, and leaves them running.

    python -m fastserve.launcher --model-path-address MODEL@HOST@PORT ...

What each service is started with is decided by `plan`, a pure function; `check` refuses what cannot work before
anything is started; `launch` does it. An item may end in options of its own worker, named like the worker's flags and
given as in a URL: `MODEL@HOST@PORT?device=cuda&gpus=0,1&num-gpus=2&model-names=a,b`. In their values %26 stands for &,
%40 for @, and so on. Host and port are read from the right, so the model's path may contain anything.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import unquote

from fastserve import supervisor
from fastserve.access.cluster_key import ENV_CLUSTER_KEY, find_or_make, make_keys
from fastserve.config import ApiServerConfig, ControllerConfig, LauncherConfig, WorkerConfig
from fastserve.control import dispatch
from fastserve.errors import StartupError
from fastserve.options import parse_config, parse_option, to_argv
from fastserve.supervisor import ChildSpec, Launch, Stopped, StopSignals, http_address

REGISTRATION_TIMEOUT_S = 30.0
ITEM_FORM = "MODEL@HOST@PORT or MODEL@HOST@PORT?OPTION=VALUE&OPTION=VALUE"
_ITEM = re.compile(r"(?P<model>.+)@(?P<host>[^@?]+)@(?P<port>\d+)(?:\?(?P<options>[^@]*))?", re.DOTALL)
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}

WORKER_OPTIONS = tuple(
    item.name
    for item in dataclasses.fields(WorkerConfig)
    if item.name not in {"host", "port", "ssl", "model_path", "controller_address", "api_keys", "api_keys_file"}
)
"""What an item may set for its own worker."""


# ---- items ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One worker to be started: what stands in --model-path-address."""

    model: str
    host: str
    port: int
    options: Mapping[str, Any]

    @property
    def label(self) -> str:
        return f"{self.model}@{self.host}@{self.port}"

    @property
    def log_name(self) -> str:
        last = re.split(r"[/\\]", self.label)[-1]
        return "worker_" + re.sub(r"[-@.]", "_", last) + ".log"


def parse_item(text: str) -> Item:
    """Raises StartupError with a sentence that names the item and the form."""
    match = _ITEM.fullmatch(text)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise StartupError(f"--model-path-address {text!r}: an item has the form {ITEM_FORM}.")
    options = {}
    for part in (match["options"] or "").split("&"):
        if not part:
            continue
        flag, _, value = part.partition("=")
        name = flag.replace("-", "_")
        if name not in WORKER_OPTIONS:
            raise StartupError(f"--model-path-address {text!r}: a worker has no option {flag!r} ({ITEM_FORM}).")
        try:
            options[name] = parse_option(WorkerConfig, name, unquote(value))
        except ValueError as error:
            raise StartupError(f"--model-path-address {text!r}: {flag}: {error}.") from None
    return Item(os.path.expanduser(match["model"]), match["host"], int(match["port"]), options)


# ---- the plan ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    controller: ChildSpec
    workers: tuple[ChildSpec, ...]
    server: ChildSpec

    @property
    def services(self) -> tuple[ChildSpec, ...]:
        return (self.controller, *self.workers, self.server)


def worker_config(config: LauncherConfig, item: Item) -> WorkerConfig:
    """The worker's settings: the launcher's where both have the option, the item's own over them."""
    shared = {
        name: getattr(config, name)
        for name in WORKER_OPTIONS
        if name in {launcher_field.name for launcher_field in dataclasses.fields(config)}
    }
    derived = {
        "model_path": item.model,
        "host": item.host,
        "port": item.port,
        "controller_address": http_address(reachable(config.controller_host), config.controller_port),
        # A worker that listens everywhere finds out itself under which address others reach it.
        "worker_address": None if item.host in _WILDCARDS else http_address(item.host, item.port),
    }
    return WorkerConfig(**{**shared, **derived, **item.options})


def plan(
    config: LauncherConfig,
    items: Sequence[Item],
    environ: Mapping[str, str],
    *,
    package: str = "fastserve",
    logs_in_use: Collection[Path] = (),
) -> Plan:
    """What to start, with what arguments and environment. Pure.

    API keys reach the API server by its environment alone, and no other service sees them. A log that another launch
    writes to (`logs_in_use`) gets the port into its name instead.
    """
    environ = {**environ, "PYTHONUNBUFFERED": "1"}
    environ.pop("FASTSERVE_API_KEYS", None)
    log_dir = Path(config.log_dir)

    def service(
        module: str, name: str, log_name: str, host: str, port: int, argv: Sequence[str], **env: str
    ) -> ChildSpec:
        log = log_dir / log_name
        if log in logs_in_use:
            log = log.with_name(f"{log.stem}_{port}.log")
        command = (sys.executable, "-m", f"{package}.{module}", *argv)
        return ChildSpec(module, name, command, {**environ, **env}, log, reachable(host), port)

    controller = ControllerConfig(
        host=config.controller_host,
        port=config.controller_port,
        dispatch_method=config.dispatch_method,
        log_level=config.log_level,
    )
    server = ApiServerConfig(
        host=config.server_host,
        port=config.server_port,
        controller_address=http_address(reachable(config.controller_host), config.controller_port),
        allow_credentials=config.allow_credentials,
        api_keys_file=config.api_keys_file,
        log_level=config.log_level,
    )
    workers = []
    for item in items:
        worker = worker_config(config, item)
        gpus = {"CUDA_VISIBLE_DEVICES": worker.gpus} if worker.gpus else {}
        name = f"model_worker {item.label}"
        workers.append(service("model_worker", name, item.log_name, item.host, item.port, to_argv(worker), **gpus))
    keys = {"FASTSERVE_API_KEYS": ",".join(config.api_keys)} if config.api_keys else {}
    return Plan(
        service("controller", "controller", "controller.log", controller.host, controller.port, to_argv(controller)),
        tuple(workers),
        service(
            "openai_api_server",
            "openai_api_server",
            "openai_api_server.log",
            server.host,
            server.port,
            to_argv(server),
            **keys,
        ),
    )


def reachable(host: str) -> str:
    """The host under which a service that listens on `host` answers on this machine."""
    return _WILDCARDS.get(host, host)


# ---- what is refused before anything starts ---------------------------------------------------------------------


def check(config: LauncherConfig, items: Sequence[Item], running: Sequence[supervisor.Run]) -> None:
    """Raises StartupError with the first thing that cannot work."""
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
    _check_ports(claims, running)


def check_model(model: str) -> None:
    """A model is a folder that exists, or has the form of a Hugging Face id (which the worker will look for)."""
    if os.path.isdir(model):
        return
    if os.path.exists(model):
        raise StartupError(f"The model {model!r} is a file: give the folder of the checkpoint.")
    if model.startswith((".", "/", "~", "\\")) or not _HUB_ID.fullmatch(model):
        raise StartupError(
            f"The model {model!r} is missing: there is no such folder, and it is no Hugging Face id (owner/name)."
        )


def _check_ports(claims: Sequence[tuple[str, str, int]], running: Sequence[supervisor.Run]) -> None:
    wanted: dict[int, str] = {}
    for flag, _, port in claims:
        if port in wanted:
            raise StartupError(f"Port {port} is wanted twice: by {wanted[port]} and by {flag}.")
        wanted[port] = flag
    ours = {service.port: service for run in running for service in run.services if supervisor.leader(run, service)}
    for flag, host, port in claims:
        if port in ours:
            raise StartupError(
                f"Port {port} ({flag}) is in use by the {ours[port].name} of an earlier launch (process "
                f"{ours[port].pid}): end it with `python -m fastserve.shutdown`, or choose another port."
            )
        problem = supervisor.port_problem(host, port)
        if problem:
            raise StartupError(f"Cannot listen on {host}:{port} ({flag}): {problem}.")


# ---- talking to the person --------------------------------------------------------------------------------------


class Console:
    """Finished lines, and a progress line: rewritten in place on a terminal, else repeated every few seconds."""

    REPEAT_S = 5.0
    REWRITE_S = 0.2

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rewrites = stream.isatty()
        self._next_s = time.monotonic() + (0.0 if self._rewrites else self.REPEAT_S)

    def say(self, line: str) -> None:
        print(f"\r\x1b[K{line}" if self._rewrites else line, file=self._stream, flush=True)

    def show_progress(self, line: str) -> None:
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + (self.REWRITE_S if self._rewrites else self.REPEAT_S)
        if self._rewrites:
            width = os.get_terminal_size(self._stream.fileno()).columns or 80
            print(f"\r\x1b[K{line[: width - 1]}", end="", file=self._stream, flush=True)
        else:
            print(line, file=self._stream, flush=True)


def summary(config: LauncherConfig, items: Sequence[Item], services: Plan) -> str:
    """The addresses, a request to try, and how to stop."""
    # Workers that do not register are not known to the API server: they are asked directly.
    front = services.workers[0] if config.no_register else services.server
    first = worker_config(config, items[0])
    model = (first.model_names or (re.split(r"[/\\]", items[0].model.rstrip("/\\"))[-1],))[0]
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "What is 7 + 5?"}]}
    has_keys = (config.api_keys or config.api_keys_file) and not config.no_register
    key = " -H 'Authorization: Bearer YOUR_API_KEY'" if has_keys else ""
    log_dir = Path(config.log_dir)
    stop = "python -m fastserve.shutdown" + (
        "" if config.log_dir == "logs" else f" --log-dir {shlex.quote(config.log_dir)}"
    )
    lines = [
        "fastserve is running.",
        f"  API server  {services.server.address}",
        f"  controller  {services.controller.address}",
        *(
            f"  worker      {worker.address}  {item.model}"
            for worker, item in zip(services.workers, items, strict=True)
        ),
        f"  base_url for the OpenAI SDK: {front.address}/v1",
        "Try it:",
        f"  curl -N {front.address}/v1/chat/completions -H 'Content-Type: application/json'{key} \\",
        f"    -d {shlex.quote(json.dumps(body))}",
        f"The logs are in {log_dir.resolve()}",
        f"To stop:  {stop}",
    ]
    return "\n".join(lines)


# ---- launching --------------------------------------------------------------------------------------------------


def launch(config: LauncherConfig, environ: Mapping[str, str], console: Console, *, package: str = "fastserve") -> None:
    """Start everything and return when all of it serves.

    Raises StartupError when that fails and Stopped on Ctrl-C or SIGTERM; whatever was started is gone by then.
    """
    items = [parse_item(text) for text in config.model_path_address]
    log_dir = Path(config.log_dir)
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(f"--log-dir {config.log_dir}: the folder cannot be made ({error.strerror}).") from error
    running = supervisor.read_runs(log_dir)
    check(config, items, running)
    in_use = {
        log_dir / Path(service.log).name
        for run in running
        for service in run.services
        if supervisor.leader(run, service)
    }
    services = plan(config, items, environ, package=package, logs_in_use=in_use)
    for name in ("worker_host", "worker_port", "model_path"):
        default = next(item.default for item in dataclasses.fields(config) if item.name == name)
        if getattr(config, name) != default:
            flag = "--" + name.replace("_", "-")
            console.say(f"{flag} has no effect: each item of --model-path-address names its model, host and port.")
    console.say(f"Starting the services; their logs are in {config.log_dir}")
    with StopSignals() as stop, Launch(log_dir, config.server_port, stop, console.say, console.show_progress) as run:
        run.wait_ready([run.start(services.controller)], config.wait_timeout_s)
        run.wait_ready([run.start(spec) for spec in (*services.workers, services.server)], config.wait_timeout_s)
        expected = sum(not worker_config(config, item).no_register for item in items)
        timeout_s = min(config.wait_timeout_s, REGISTRATION_TIMEOUT_S)
        if not run.wait_for(lambda: _count_registered(services.controller) >= expected, timeout_s):
            raise StartupError(
                f"All services run, but after {timeout_s:g} s not all of the {expected} workers have registered with "
                f"the controller; their logs in {config.log_dir} say why."
            )
    console.say(summary(config, items, services))


def _count_registered(controller: ChildSpec) -> int:
    keys = make_keys(controller.env[ENV_CLUSTER_KEY].split(","), ENV_CLUSTER_KEY)
    body = supervisor.http_get(controller.host, controller.port, "/ready", keys.authorization())
    return 0 if body is None else int(json.loads(body)["workers"])


def main(argv: Sequence[str] | None = None, *, package: str = "fastserve") -> None:
    """The command. `package` is where the services' modules are found."""
    console = Console(sys.stdout)
    try:
        choices = {"dispatch_method": dispatch.names()}
        config = parse_config(LauncherConfig, argv, "fastserve.launcher", os.environ, choices)
        environ = dict(os.environ)
        if not environ.get(ENV_CLUSTER_KEY):
            environ[ENV_CLUSTER_KEY] = find_or_make(environ).current
        launch(config, environ, console, package=package)
    except StartupError as error:
        print(error.message, file=sys.stderr, flush=True)
        sys.exit(1)
    except Stopped as error:
        print(f"The launch was ended by {error}.", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
