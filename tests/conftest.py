"""Environment variables and the order of test files. Set before anything imports torch (and with it triton)."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from fastserve.access.cluster_key import ENV_CLUSTER_KEY
from tests.keys import CLUSTER_KEY

# Services started by tests inherit it, so no test finds or creates the key of the user who runs them.
os.environ[ENV_CLUSTER_KEY] = CLUSTER_KEY

# Nor do they store responses and batches in the user's home, or run batches that are left there.
STATE_FOLDER = tempfile.TemporaryDirectory(prefix="fastserve-tests-", ignore_cleanup_errors=True)
os.environ["XDG_STATE_HOME"] = STATE_FOLDER.name

if not Path("/dev/nvidiactl").exists():
    # Without a GPU, Triton's kernels are interpreted. triton reads this variable only at its import.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Shells start background commands with SIGINT ignored, nohup with SIGHUP, and the processes of tests would inherit it.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

# The same examples in each run: a change is not held up by what it has nothing to do with. New ones are tried with
# `--hypothesis-profile explore`.
hypothesis.settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile("fixed")

COMPAT_MODULES = {
    *("test_architectures", "test_bitsandbytes", "test_engine_equality", "test_experts", "test_formats", "test_fusion"),
    *("test_loading", "test_loading_refusals", "test_refusals", "test_weights"),
    *("test_chat_template", "test_tokenizer"),
    *("test_gateway_api", "test_model_worker_process", "test_openai_routes", "test_connections", "test_start"),
    *("test_dependencies", "test_trio_first_answer"),
}
"""Test modules to run against other releases of dependencies: loading, recognition and equality."""


SHARED_FOLDER = "trio"
"""The tests of this folder share services, so one process runs all of them, first and in sequence."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in COMPAT_MODULES:
            item.add_marker("compat")
    items.sort(key=lambda item: item.path.parent.name != SHARED_FOLDER)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `--dist loadfile`: distribute files in the order above, and those of the shared folder as one."""
    from xdist.scheduler import LoadFileScheduling

    if config.getoption("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False
    scheduler = LoadFileScheduling(config, log)
    file_of = scheduler._split_scope

    def scope_of(node_id: str) -> str:
        file: str = file_of(node_id)
        return SHARED_FOLDER if Path(file).parent.name == SHARED_FOLDER else file

    scheduler._split_scope = scope_of
    return scheduler
