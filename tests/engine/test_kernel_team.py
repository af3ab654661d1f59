"""The thread pool of the kernels, used by several threads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastserve.engine.kernels import build
from fastserve.engine.kernels.build import cpu_library

from .conftest import TinyModels
from .test_engine_equality import make_core

PACK_WHILE_THE_NUMBER_CHANGES = """
import ctypes, threading, torch
from fastserve.engine.kernels.build import cpu_library
library = cpu_library(torch.float32)
weight, packed = torch.rand(256, 256), torch.zeros(256 * 256)
expected = torch.zeros(256 * 256)
def pack(to):
    library.pack_weight(ctypes.c_void_p(weight.data_ptr()), ctypes.c_void_p(to.data_ptr()),
                        ctypes.c_int64(256), ctypes.c_int64(256))
pack(expected)
is_done = threading.Event()
def pack_on():
    while not is_done.is_set():
        pack(packed)
thread = threading.Thread(target=pack_on)
thread.start()
for number in range(500):
    library.set_threads(1 + number % 3)
is_done.set()
thread.join()
assert torch.equal(packed, expected)
"""


@pytest.mark.skipif(cpu_library(torch.float32) is None, reason="no C++ compiler")
def test_a_kernel_keeps_its_threads_while_their_number_changes() -> None:
    """In a process of its own: a kernel that waits for ever cannot be ended."""
    subprocess.run([sys.executable, "-c", PACK_WHILE_THE_NUMBER_CHANGES], check=True, timeout=60)


@pytest.mark.skipif(cpu_library(torch.float32) is None, reason="no C++ compiler")
def test_kernels_use_all_threads_after_the_start_check(tiny_models: TinyModels) -> None:
    """The check computes small matrices, with one thread."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for dtype in ("float32", "bfloat16"):
            make_core(tiny_models.path("llama"), dtype=dtype)
            for library in build._loaded():
                assert library.num_threads() == 2
    finally:
        torch.set_num_threads(before)
        cpu_library(torch.float32)
