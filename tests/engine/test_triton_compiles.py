"""The compiler may refuse what the interpreter accepts: kernels compile for an H100, with its fast instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")


@pytest.mark.skipif(sys.platform != "linux", reason="Triton carries its assembler for Linux only")
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.compile_for_hopper"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    for kernel in ("wide", "wide, all options"):
        assert found[kernel]["wgmma.mma_async"] > 0, "prompts must run on Hopper's tensor cores"
        assert found[kernel]["mma.sync"] == 0
    for kernel in ("wide", "wide, all options", "narrow"):
        assert found[kernel]["cp.async.cg"] > 0, "blocks must be loaded asynchronously, before they are needed"
    assert found["narrow"]["mma.sync"] > 0
    for kernel in ("shrink", "expand"):
        assert found[kernel]["mma.sync"] > 0, "products with adapters must run on tensor cores"
    for kernel in ("4 bits", "8 bits"):
        assert found[kernel]["mma.sync"] > 0, "values become matrix fragments in registers"
        assert found[kernel]["cp.async"] > 0, "codes must be on their way before they are needed"
