"""The plan of a launch, made before anything starts: items of --model-path-address and the services' commands.

An item may end in options for its own worker, named like the worker's flags and written as a URL's query:
`MODEL@HOST@PORT?device=cuda&gpus=0,1&num-gpus=2&model-names=a,b`. Values are percent-encoded (%26 for &, %40 for @,
and in a list %2C for a comma that does not separate). Host and port are read from the right, so the model's path may
contain any character.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from fastserve.config import ApiServerConfig, ControllerConfig, LauncherConfig, ServerConfig, WorkerConfig
from fastserve.errors import StartupError
from fastserve.launching.log_files import worker_log_name
from fastserve.launching.processes import absolute
from fastserve.options import comma_join, is_comma_list, is_json_object, parse_option, to_argv
from fastserve.serving.listen import WILDCARDS, local_host, url_of
from fastserve.serving.tls import serves_tls

ConfigT = TypeVar("ConfigT")

ITEM_FORM = "MODEL@HOST@PORT or MODEL@HOST@PORT?OPTION=VALUE&OPTION=VALUE"
_ITEM = re.compile(
    r"(?P<model>.+)@(\[(?P<ipv6>[^]@?]+)\]|(?P<host>[^]@?[]+))@(?P<port>[0-9]+)(?:\?(?P<options>[^@]*))?", re.DOTALL
)
SECRETS = ("FASTSERVE_API_KEYS",)
"""Environment variables that are not passed to every service."""

NOT_FOR_ITEMS = {
    *("host", "port", "model_path", "controller_address", "api_keys", "api_keys_file"),
    *("ssl", "tls_cert", "tls_key"),  # the same for all services of a launch
}
WORKER_OPTIONS = tuple(item.name for item in dataclasses.fields(WorkerConfig) if item.name not in NOT_FOR_ITEMS)
"""Worker options that an item may set."""
NOT_SHARED = {"host", "port", "api_keys"}
"""Options with the same name in launcher and services, but different meanings."""


# ---- items ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One worker to be started: an item of --model-path-address."""

    model: str
    host: str
    port: int
    options: Mapping[str, Any]

    @property
    def label(self) -> str:
        return f"{self.model}@{self.host}@{self.port}"


def parse_item(text: str) -> Item:
    """Parse `MODEL@HOST@PORT[?OPTIONS]`. Raises StartupError that names the item and the expected format."""
    match = _ITEM.fullmatch(text)
    if match is None or len(match["port"]) > 5 or not 0 < int(match["port"]) < 65536:
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
            options[name] = parse_option(WorkerConfig, name, _decode(name, value))
        except ValueError as error:
            raise StartupError(f"--model-path-address {text!r}: {flag}: {error}.") from None
    return Item(os.path.expanduser(match["model"]), match["ipv6"] or match["host"], int(match["port"]), options)


def _decode(name: str, value: str) -> str:
    """The text of an item's option. In a list, a comma that is percent-encoded is a part of its value."""
    text = unquote(value)
    if not is_comma_list(WorkerConfig, name) or is_json_object(text):
        return text
    return comma_join(unquote(part) for part in value.split(","))


# ---- the plan ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChildSpec:
    """A service to be started."""

    kind: str
    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    """The complete environment. It may hold API keys, so it is left out of the repr."""
    log: str
    """Absolute path."""
    host: str
    """Host under which this machine reaches the service."""
    port: int
    ssl: bool
    drain_timeout_s: float

    @property
    def address(self) -> str:
        return url_of(self.host, self.port, ssl=self.ssl)


@dataclass(frozen=True)
class LaunchPlan:
    controller: ChildSpec
    workers: tuple[ChildSpec, ...]
    server: ChildSpec
    state_files: tuple[str, ...] = ()
    """Files of workers that outlive their restarts, and not the launch."""

    @property
    def services(self) -> tuple[ChildSpec, ...]:
        return (self.controller, *self.workers, self.server)


def common_config(config: LauncherConfig) -> ServerConfig:
    """The settings that all services have in common."""
    return service_config(ServerConfig, config, {})


def has_tls(config: LauncherConfig) -> bool:
    return serves_tls(common_config(config))


def worker_config(config: LauncherConfig, item: Item) -> WorkerConfig:
    """The worker's settings: the item's options, else the launcher's of the same name, else the defaults."""
    given: dict[str, Any] = {
        "model_path": item.model,
        "host": item.host,
        "port": item.port,
        "controller_address": controller_address(config),
        # A worker that listens on all addresses determines its advertised address itself.
        "worker_address": None if item.host in WILDCARDS else url_of(item.host, item.port, ssl=has_tls(config)),
    }
    worker = service_config(WorkerConfig, config, {**given, **item.options})
    if worker.no_register:
        return worker
    # API keys are for clients, and only a worker without a controller serves clients directly.
    return service_config(WorkerConfig, config, {**given, **item.options}, without={"api_keys_file"})


def controller_address(config: LauncherConfig) -> str:
    return url_of(local_host(config.controller_host), config.controller_port, ssl=has_tls(config))


def service_config(
    config_class: type[ConfigT], config: LauncherConfig, given: Mapping[str, Any], without: Collection[str] = ()
) -> ConfigT:
    """Settings of a service: `given`, and each launcher option of the same name."""
    common = {item.name for item in dataclasses.fields(config)} & set(_names(config_class))
    shared = {name: getattr(config, name) for name in common - NOT_SHARED - set(without)}
    # Unset in the launcher: keep each service's own default, as limits differ between services.
    return config_class(**{**{name: value for name, value in shared.items() if value is not None}, **given})


def _names(config_class: Any) -> Iterator[str]:
    return (item.name for item in dataclasses.fields(config_class))


def plan(
    config: LauncherConfig,
    items: Sequence[Item],
    environ: Mapping[str, str],
    *,
    package: str = "fastserve",
    log_dir: Path | None = None,
    is_second: bool = False,
    cluster_environ: Mapping[str, str] | None = None,
) -> LaunchPlan:
    """Decide what to start, with which arguments and environment.

    API keys are passed by environment, and only to the API server and to workers without a controller.
    `cluster_environ` goes to all services. `is_second`: another launch logs to the same folder (see `log_path`).
    """
    environ = {**environ, "PYTHONUNBUFFERED": "1", **(cluster_environ or {})}
    for secret in SECRETS:
        environ.pop(secret, None)
    log_dir = Path(config.log_dir) if log_dir is None else log_dir
    if environ.get("LOGDIR") and absolute(environ["LOGDIR"], "LOGDIR") == log_dir.absolute():
        # LOGDIR would make each service write a second log, and rotate a file that it has open.
        environ.pop("LOGDIR")

    def service(module: str, name: str, log_name: str, settings: ServerConfig, **env: str) -> ChildSpec:
        return ChildSpec(
            kind=module,
            name=name,
            argv=(sys.executable, "-m", f"{package}.{module}", *to_argv(settings)),
            env={**environ, **env},
            log=log_path(log_dir, log_name, settings.port, is_second=is_second),
            host=local_host(settings.host),
            port=settings.port,
            ssl=serves_tls(settings),
            drain_timeout_s=settings.drain_timeout_s,
        )

    controller = service_config(
        ControllerConfig, config, {"host": config.controller_host, "port": config.controller_port}
    )
    server = service_config(
        ApiServerConfig,
        config,
        {
            "host": config.server_host,
            "port": config.server_port,
            "controller_address": controller_address(config),
        },
    )
    keys = {"FASTSERVE_API_KEYS": comma_join(config.api_keys)} if config.api_keys else {}
    workers, state_files = [], []
    for item in items:
        worker = worker_config(config, item)
        env = {"CUDA_VISIBLE_DEVICES": worker.gpus} if worker.gpus else {}
        if worker.no_register:
            env |= keys
        name = f"model_worker {item.label}"
        log_name = worker_log_name(item.model, item.host, item.port)
        if worker.serves_adapters and worker.lora_state_file is None:
            log = Path(log_path(log_dir, log_name, item.port, is_second=is_second))
            state_file = str(log.with_suffix(".adapters.json").absolute())
            worker = dataclasses.replace(worker, lora_state_file=state_file)
            state_files.append(state_file)
        workers.append(service("model_worker", name, log_name, worker, **env))
    return LaunchPlan(
        service("controller", "controller", "controller.log", controller),
        tuple(workers),
        service("openai_api_server", "openai_api_server", "openai_api_server.log", server, **keys),
        tuple(state_files),
    )


def log_path(log_dir: Path, name: str, port: int, *, is_second: bool) -> str:
    """Path of a service's log. `is_second`: another launch logs to the same folder, so the name includes the port."""
    log = log_dir / name
    has_port = log.stem.endswith(f"_{port}")
    return str(log.with_name(f"{log.stem}_{port}.log") if is_second and not has_port else log)


# ---- summary ----------------------------------------------------------------------------------------------------


def summary(config: LauncherConfig, items: Sequence[Item], services: LaunchPlan) -> str:
    """Text for the user: the addresses, an example request, and how to stop."""
    # The API server does not know unregistered workers, so the example request goes to the worker.
    first = worker_config(config, items[0])
    front = services.workers[0] if first.no_register else services.server
    model = (first.model_names or (re.split(r"[/\\]", items[0].model.rstrip("/\\"))[-1],))[0]
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "What is 7 + 5?"}]}
    key = " -H 'Authorization: Bearer YOUR_API_KEY'" if config.api_keys or config.api_keys_file else ""
    stop = "python -m fastserve.shutdown" + (
        "" if config.log_dir == "logs" else f" --log-dir {shlex.quote(config.log_dir)}"
    )
    url = f"{front.address}/v1/chat/completions"
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
        f"  curl -N {shlex.quote(url)} -H 'Content-Type: application/json'{key} \\",
        f"    -d {shlex.quote(json.dumps(body))}",
        f"The logs are in {Path(services.server.log).parent}",
        f"To stop:  {stop}",
    ]
    return "\n".join(lines)
