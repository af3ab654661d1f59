"""Middleware of controller and workers: accepts only requests with the cluster key, and none from web pages."""

from __future__ import annotations

from starlette.types import ASGIApp, Scope

from fastserve.access.admin import AdminCheck
from fastserve.access.bearer import bearer_token
from fastserve.access.cluster_key import DEFAULT_OWNER, ENV_CLUSTER_KEY, ClusterKeys
from fastserve.access.hosts import HostCheck
from fastserve.access.key_files import Reloadable
from fastserve.access.refusals import Guard, RefusedKeys
from fastserve.access.web import check_host, check_media_type, header_of
from fastserve.errors import AuthenticationError, PermissionDeniedError
from fastserve.protocol import MAY_PRIORITISE_HEADER

_MAY_PRIORITISE = MAY_PRIORITISE_HEADER.encode()


class ClusterGuard(Guard):
    """Stores in the request's state the key's `owner`, `may_prioritise`, and the mark for `require_admin`. Only
    `/health` is open to everybody.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Reloadable[ClusterKeys | None],
        admin: AdminCheck,
        hosts: HostCheck,
        refused: RefusedKeys,
        everybody_may_prioritise: bool,
    ) -> None:
        """`everybody_may_prioritise`: whether requests may have a negative priority if there are no keys (--insecure)
        and no API server of ours has decided it.
        """
        super().__init__(app)
        self._keys = keys
        self._admin = admin
        self._hosts = hosts
        self._refused = refused
        self._everybody_may_prioritise = everybody_may_prioritise

    def check(self, scope: Scope) -> None:
        if scope["type"] == "http" and scope["path"] == "/health" and scope["method"] in ("GET", "HEAD"):
            return
        headers = scope["headers"]
        check_host(self._hosts, headers)
        if header_of(headers, b"origin") is not None:
            raise PermissionDeniedError(
                "Web pages may not call a service of the cluster (the request has an Origin header); the API server is "
                "for clients.",
                code="origin_not_allowed",
            )
        token = bearer_token(headers)
        is_admin = self._admin.note(scope, token)
        state, keys = scope["state"], self._keys.value
        may_prioritise = header_of(headers, _MAY_PRIORITISE)
        if keys is None:
            state["owner"] = DEFAULT_OWNER
            state["may_prioritise"] = (
                self._everybody_may_prioritise if may_prioritise is None else may_prioritise == b"1"
            )
        else:
            owner = DEFAULT_OWNER if is_admin else None if token is None else keys.owner_of(token)
            if owner is None:
                self._refused.note(scope, has_key=token is not None)
                raise AuthenticationError(
                    f"{'Wrong' if token else 'No'} cluster key: controller, workers and API servers of a cluster share "
                    f"one ({ENV_CLUSTER_KEY} or --cluster-key-file; services started by hand on one machine find the "
                    "user's). Send it as the header 'Authorization: Bearer <key>'. Clients talk to the API server.",
                    code="invalid_cluster_key",
                )
            state["owner"] = owner
            state["may_prioritise"] = may_prioritise == b"1"
        if scope["type"] == "http":
            check_media_type(scope)
