"""The OpenAI-compatible API server: `python -m fastserve.openai_api_server`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from fastserve.config import ApiServerConfig
from fastserve.gateway.app import create_app
from fastserve.observability.logging import setup_logging
from fastserve.options import parse_config
from fastserve.serving.listen import bind
from fastserve.serving.server import run_entry, serve

__all__ = ["create_app", "main"]


def main(argv: Sequence[str] | None = None) -> None:
    def run() -> None:
        config = parse_config(ApiServerConfig, argv, "fastserve-api", os.environ)
        setup_logging(config.log_level, "openai_api_server", os.environ)
        sockets = bind(config.host, config.port)
        config = dataclasses.replace(config, port=sockets[0].getsockname()[1])
        serve(create_app(config), config, sockets)

    run_entry(run)


if __name__ == "__main__":
    main()
