"""Routes that change a service are for administrators."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from fastapi import Depends, FastAPI

from fastserve.access.admin import ENV_ADMIN_KEY, load_admin_keys, require_admin
from fastserve.access.api_keys import load_api_keys
from fastserve.access.service import guard_client_service, guard_cluster_service, load_access
from fastserve.config import WorkerConfig
from fastserve.errors import StartupError
from fastserve.observability.metrics import CollectorRegistry
from fastserve.serving.errors import install_error_handlers
from tests.keys import CLUSTER, CLUSTER_KEY

ADMIN_KEY = "an-admin-key-0123456789"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
API = {"Authorization": "Bearer sk-client"}


def make_app(environ: dict[str, str], *, lone: bool = False) -> FastAPI:
    app = FastAPI()
    install_error_handlers(app)

    @app.post("/change", dependencies=[Depends(require_admin)])
    async def change() -> str:
        return "changed"

    @app.get("/look")
    async def look() -> str:
        return "seen"

    environ = {"FASTSERVE_CLUSTER_KEY": CLUSTER_KEY} | environ
    access = load_access(WorkerConfig(), environ, host="0.0.0.0", cluster_hosts=["localhost"], is_in_cluster=not lone)
    registry = CollectorRegistry()
    if lone:
        keys = load_api_keys(("sk-client",), None)
        guard_client_service(app, access, registry, keys, allowed_origins=(), json_only=True)
    else:
        guard_cluster_service(app, access, registry)
    return app


async def post(app: FastAPI, headers: dict[str, str], client: str = "10.0.0.7", path: str = "/change") -> int:
    transport = httpx.ASGITransport(app, client=(client, 1234))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as http:
        return (await http.request("POST" if path == "/change" else "GET", path)).status_code


@pytest.mark.parametrize("lone", [False, True])
async def test_with_an_admin_key_it_alone_opens_them_from_everywhere(lone: bool) -> None:
    app = make_app({ENV_ADMIN_KEY: ADMIN_KEY}, lone=lone)
    plain = API if lone else CLUSTER
    for client in ("127.0.0.1", "10.0.0.7"):
        assert await post(app, ADMIN, client) == 200
        assert await post(app, plain, client) == 403
        assert await post(app, {}, client) == 401
        assert await post(app, {"Authorization": ADMIN["Authorization"] + "x"}, client) == 401
    assert await post(app, ADMIN, path="/look") == 200
    assert await post(app, plain, path="/look") == 200


@pytest.mark.parametrize("lone", [False, True])
async def test_without_one_they_answer_to_this_machine_only(lone: bool) -> None:
    app = make_app({}, lone=lone)
    plain = API if lone else CLUSTER
    for client in ("127.0.0.1", "::1", "127.3.2.1"):
        assert await post(app, plain, client) == 200
        assert await post(app, {}, client) == 401, "being here is not enough where a key is asked for"
    for client in ("10.0.0.7", "192.0.2.1", "fe80::1"):
        assert await post(app, plain, client) == 403
    assert await post(app, plain, path="/look") == 200


@pytest.mark.parametrize("name", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "Via"])
async def test_without_one_a_proxy_on_this_machine_opens_them_to_nobody(name: str) -> None:
    app = make_app({})
    for client in ("127.0.0.1", "::1"):
        for value in ("203.0.113.9", "127.0.0.1", "for=127.0.0.1"):
            assert await post(app, CLUSTER | {name: value}, client) == 403
            assert await post(app, CLUSTER | {name: value}, client, path="/look") == 200


async def test_a_web_page_on_this_machine_is_no_administrator() -> None:
    app = make_app({})
    assert await post(app, CLUSTER | {"Origin": "http://localhost:3000"}, "127.0.0.1") == 403


def test_keys_come_from_a_file_or_the_environment_and_have_a_length(tmp_path: Path) -> None:
    path = tmp_path / "admin"
    path.write_text(f"{ADMIN_KEY}\n")
    path.chmod(0o600)
    keys = load_admin_keys({ENV_ADMIN_KEY: "other-key-0123456789"}, str(path)).value
    assert keys.accepts(ADMIN_KEY.encode())
    assert not keys.accepts(b"other-key-0123456789")
    assert load_admin_keys({ENV_ADMIN_KEY: f"{ADMIN_KEY}, other-key-0123456789"}, None).value.accepts(
        b"other-key-0123456789"
    )
    with pytest.raises(StartupError, match="at least 16 characters"):
        load_admin_keys({ENV_ADMIN_KEY: "short"}, None)
    path.write_text("\n")
    with pytest.raises(StartupError, match="holds no key"):
        load_admin_keys({}, str(path))
