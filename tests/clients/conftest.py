"""A controller, a worker with the demo model and an API server, once, and the environments of the clients."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.environments import CannotMakeError, made_in
from tests.interop.processes import Service, wait_until

from . import FOLDER, MODEL

SCRIPT_TIMEOUT_S = 150.0

RunScript = Callable[..., str]


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an API server with the demo model behind it."""
    folder = tmp_path_factory.mktemp("services")
    with ExitStack() as stack:

        def start(module: str, *arguments: str) -> str:
            command = [sys.executable, "-m", f"fastserve.{module}", "--host", "127.0.0.1", "--port", "0", *arguments]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            return stack.enter_context(Service(command, folder / f"{module}.log", env)).address

        to_controller = ("--controller-address", start("controller"))
        start("model_worker", "--model-path", MODEL, "--device", "cpu", *to_controller)
        stores = ("--responses-store", str(folder / "responses.db"), "--batches-folder", str(folder / "batches"))
        address = start("openai_api_server", *to_controller, *stores)
        wait_until(lambda: MODEL in httpx.get(f"{address}/v1/models").text, "the model is served", 60)
        yield address


@pytest.fixture(scope="session")
def python_with(pytestconfig: pytest.Config) -> Callable[[str], Path]:
    """The Python of an environment with a requirements file of this folder; skips the test if none can be made."""

    def find(requirements: str) -> Path:
        cache: pytest.Cache | None = getattr(pytestconfig, "cache", None)  # absent with `-p no:cacheprovider`
        if cache is None:
            pytest.skip("no folder for the clients' environment: pytest's cache is switched off")
        try:
            return made_in(cache.mkdir("clients"), FOLDER / requirements)
        except CannotMakeError as error:
            pytest.skip(f"no environment for the clients: {error}")

    return find


@pytest.fixture(scope="session")
def run_script(python_with: Callable[[str], Path], url: str, tmp_path_factory: pytest.TempPathFactory) -> RunScript:
    """Run a script of the folder `scripts` to its end; `python_arguments` come before it."""

    def run(script: str, *python_arguments: str, requirements: str = "requirements.txt") -> str:
        python = python_with(requirements)
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
        # No client reports anything to anybody.
        env |= {"NO_PROXY": "127.0.0.1,localhost", "DO_NOT_TRACK": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        ended = subprocess.run(
            [str(python), *python_arguments, str(FOLDER / "scripts" / script)],
            env=env | {"FASTSERVE_URL": url},
            cwd=tmp_path_factory.mktemp("script"),
            capture_output=True,
            text=True,
            timeout=SCRIPT_TIMEOUT_S,
            check=False,
        )
        assert ended.returncode == 0, f"{script}:\n{ended.stdout[-4000:]}\n{ended.stderr[-4000:]}"
        return ended.stdout

    return run
