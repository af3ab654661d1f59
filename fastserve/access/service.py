"""Access settings of one service: keys, hosts and guards, made once from its configuration."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fastapi import FastAPI

from fastserve.access.admin import AdminCheck, AdminKeys, load_admin_keys
from fastserve.access.api_keys import ApiKeyGuard, ApiKeys
from fastserve.access.cluster_guard import ClusterGuard
from fastserve.access.cluster_key import ClusterKeys, load_cluster_keys
from fastserve.access.hosts import HostCheck, check_host_names, is_loopback
from fastserve.access.key_files import Reloadable
from fastserve.access.refusals import RefusedKeys
from fastserve.access.web import WebPageGuard
from fastserve.config import AccessOptions
from fastserve.observability.metrics import CollectorRegistry


@dataclass(frozen=True)
class ServiceAccess:
    cluster_keys: Reloadable[ClusterKeys | None]
    admin_keys: Reloadable[AdminKeys]
    hosts: HostCheck
    is_on_loopback: bool
    """Whether it listens on loopback only."""
    checks_pages: bool
    """Whether a service without API keys refuses foreign web pages: on loopback, and if --allowed-hosts is set (a
    container listens on all addresses and may still be published on loopback only).
    """

    @property
    def everybody_may_prioritise(self) -> bool:
        """Whether, without keys, every request may have a negative priority."""
        return self.is_on_loopback


def load_access(
    config: AccessOptions,
    environ: Mapping[str, str],
    *,
    host: str,
    cluster_hosts: Sequence[str],
    is_in_cluster: bool = True,
    names: Sequence[str] = (),
) -> ServiceAccess:
    """Raises StartupError if keys are missing or cannot be read.

    `host`: the host that the service listens on; `names`: its other host names. `cluster_hosts`: the hosts between
    which the cluster key is sent; empty for a service outside a cluster.
    """

    def read() -> ClusterKeys | None:
        if not is_in_cluster:
            return None
        return load_cluster_keys(
            environ, key_file=config.cluster_key_file, insecure=config.insecure, hosts=cluster_hosts
        )

    check_host_names(config.allowed_hosts, "--allowed-hosts")
    path = config.cluster_key_file if is_in_cluster and not config.insecure else None
    return ServiceAccess(
        cluster_keys=Reloadable(read, path, "--cluster-key-file"),
        admin_keys=load_admin_keys(environ, config.admin_key_file),
        hosts=HostCheck([host, *names, *config.allowed_hosts]),
        is_on_loopback=is_loopback(host),
        checks_pages=is_loopback(host) or bool(config.allowed_hosts),
    )


def guard_cluster_service(app: FastAPI, access: ServiceAccess, registry: CollectorRegistry) -> None:
    """Add the middleware that requires the cluster key and refuses web pages."""
    app.add_middleware(
        ClusterGuard,
        keys=access.cluster_keys,
        admin=AdminCheck(access.admin_keys),
        hosts=access.hosts,
        refused=RefusedKeys("cluster", registry),
        everybody_may_prioritise=access.everybody_may_prioritise,
    )


def guard_client_service(
    app: FastAPI,
    access: ServiceAccess,
    registry: CollectorRegistry,
    keys: Reloadable[ApiKeys],
    *,
    allowed_origins: Collection[str],
    json_only: bool,
) -> None:
    """Add the middleware that requires API keys if there are any, and refuses foreign web pages if there are none.

    Middleware that is added later runs before these checks.
    """
    app.add_middleware(
        ApiKeyGuard,
        keys=keys,
        admin=AdminCheck(access.admin_keys),
        refused=RefusedKeys("api", registry),
        everybody_may_prioritise=access.everybody_may_prioritise,
    )
    app.add_middleware(
        WebPageGuard,
        hosts=access.hosts,
        is_open=lambda: access.checks_pages and not keys.value,
        allowed_origins=allowed_origins,
        json_only=json_only,
    )
