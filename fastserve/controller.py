"""The controller: `python -m fastserve.controller`."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence

from fastserve import dispatch
from fastserve.config import ControllerConfig
from fastserve.control.app import create_app
from fastserve.control.routes import VITAL_PATHS
from fastserve.observability.logging import setup_logging
from fastserve.options import parse_config
from fastserve.serving.listen import bind
from fastserve.serving.server import run_entry, serve

__all__ = ["create_app", "main"]

GC_THRESHOLDS = (100_000, 50, 100)
"""Arguments of `gc.set_threshold`."""


def main(argv: Sequence[str] | None = None) -> None:
    run_entry(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> None:
    choices = {"dispatch_method": dispatch.names()}
    config = parse_config(ControllerConfig, argv, "fastserve-controller", os.environ, choices)
    setup_logging(config.log_level, "controller", os.environ)
    # The collector would scan the statuses and leases of thousands of workers again and again while requests wait.
    # Reference counting frees nearly everything here.
    gc.set_threshold(*GC_THRESHOLDS)
    sockets = bind(config.host, config.port)
    serve(create_app(config), config, sockets, vital_paths=VITAL_PATHS)


if __name__ == "__main__":
    main()
