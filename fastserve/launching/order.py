"""Messages between the launcher and its supervisor: one order, then reports, each a line of JSON in a pipe.

The order holds environments with keys, so it is never written to a file or a command line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fastserve.launching.plan import ChildSpec, LaunchPlan


@dataclass(frozen=True)
class Order:
    """Everything the supervisor needs to run a launch."""

    run_id: str
    log_dir: str
    server_port: int
    services: LaunchPlan
    num_registered: int
    """Number of workers that must register with the controller."""
    controller_headers: Mapping[str, str] = field(repr=False)
    """Headers of requests to the controller. They hold the cluster key."""
    client_certificate: tuple[str, str] | None
    """Paths of a certificate and its key, for services that require client certificates; None without TLS."""
    wait_timeout_s: float
    restart: bool
    log_max_bytes: int
    log_keep: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def read_order(text: str | bytes) -> Order:
    content = json.loads(text)
    plan = content.pop("services")
    services = LaunchPlan(_spec(plan["controller"]), tuple(map(_spec, plan["workers"])), _spec(plan["server"]))
    certificate = content.pop("client_certificate")
    return Order(services=services, client_certificate=certificate and tuple(certificate), **content)


def _spec(content: dict[str, Any]) -> ChildSpec:
    return ChildSpec(**{**content, "argv": tuple(content["argv"])})


@dataclass(frozen=True)
class Report:
    """A message of the supervisor to the launcher. `ready` and `failed` are final."""

    kind: str
    """`line` and `progress` (for the console), `ready`, or `failed`."""
    text: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def read_report(text: str | bytes) -> Report:
    return Report(**json.loads(text))
