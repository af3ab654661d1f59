"""langchain-openai in its own environment, under langchain's standard suite for chat models."""

from __future__ import annotations

import re

import pytest

from .conftest import RunScript

BEYOND_THE_DEMO_MODEL = (
    # It has learnt neither jokes nor functions other than get_weather(city) and calculator(expression).
    "structured_output or test_tool_calling or agent_loop or unicode_tool_call"
)
MIN_PASSED = 20


@pytest.mark.clients
@pytest.mark.timeout(600)
def test_langchains_standard_suite_passes(run_script: RunScript) -> None:
    # The suite's model keeps its connections from one test to the next, so all of them need one event loop.
    pytest_options = ("-c", "/dev/null", "--noconftest", "--import-mode=importlib", "-p", "no:cacheprovider")
    loop = ("--asyncio-mode=auto", "-o", "asyncio_default_test_loop_scope=session")
    out = run_script(
        "langchain_client.py", "-m", "pytest", *pytest_options, *loop, "-k", f"not ({BEYOND_THE_DEMO_MODEL})"
    )
    passed = re.search(r"(\d+) passed", out)
    assert passed is not None, out
    assert int(passed[1]) >= MIN_PASSED, out
