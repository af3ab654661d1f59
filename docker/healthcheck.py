"""Health check of a container: requests /health from the service that runs in it, over TLS if it serves TLS.

Port and certificate are read from the service's command line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from fastserve.config import ApiServerConfig, ControllerConfig, ServerConfig, WorkerConfig
from fastserve.errors import StartupError
from fastserve.launching.probe import Probe
from fastserve.options import parse_config
from fastserve.serving.listen import local_host
from fastserve.serving.tls import certificate_paths, serves_tls

CONFIGS: Mapping[str, type[ServerConfig]] = {
    "fastserve.controller": ControllerConfig,
    "fastserve.model_worker": WorkerConfig,
    "fastserve.openai_api_server": ApiServerConfig,
}
TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Service:
    host: str
    port: int
    ssl: bool
    certificate: tuple[str, str] | None
    """Files of the service's certificate and key, used as client certificate, since it may require one."""


def find_service(command_lines: Iterable[Sequence[str]], environ: Mapping[str, str]) -> Service | None:
    """The first service among the command lines of processes. Raises StartupError when its settings cannot be read."""
    for words in command_lines:
        for module, config_class in CONFIGS.items():
            if module in words and "-m" in words:
                config = parse_config(config_class, words[words.index(module) + 1 :], module, environ)
                certificate = certificate_paths(config, environ)
                return Service(local_host(config.host), config.port, serves_tls(config), certificate)
    return None


def is_healthy(service: Service) -> bool:
    return Probe(service.certificate, TIMEOUT_S).get(service, "/health") is not None


def main() -> str | int:
    """The exit code, or an error message."""
    command_lines = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    try:
        service = find_service(command_lines, os.environ)
    except StartupError as error:
        return error.message
    return 0 if service is not None and is_healthy(service) else 1


if __name__ == "__main__":
    sys.exit(main())
