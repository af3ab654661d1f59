"""The thread pool of the kernels, used by several threads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastserve.engine.kernels.build import cpu_library

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
def test_a_change_of_the_number_of_threads_waits_for_the_kernel_of_another_thread() -> None:
    """In a process of its own: a kernel that waits for ever cannot be ended."""
    subprocess.run([sys.executable, "-c", PACK_WHILE_THE_NUMBER_CHANGES], check=True, timeout=60)
