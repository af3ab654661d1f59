"""The kernel for CPUs and attention in torch operations against attention written down as it is defined."""

from __future__ import annotations

import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from fastserve.engine.attention.backend import AttentionBackend
from fastserve.engine.attention.cpu_backend import CpuAttention
from fastserve.engine.attention.metadata import AttentionMetadata, LayerShape
from fastserve.engine.attention.paged import PagedAttention
from fastserve.engine.attention.torch_backend import TorchAttention
from fastserve.engine.devices.device import Device
from fastserve.engine.devices.find import attention_backend, device_of
from fastserve.engine.kernels import build
from fastserve.engine.kernels.paged_attention import PagedAttentionKernel

BLOCK = 16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def torch_backend(
    device: torch.device, shapes: Sequence[LayerShape], dtype: torch.dtype, block_size: int
) -> AttentionBackend:
    return Device.attention_backend(device_of(device), shapes, dtype, block_size)


def definition(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: int,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    chunk: int | None = None,
) -> torch.Tensor:
    """One sequence, token by token and head by head, in float64."""
    rows, heads, _ = query.shape
    group = heads // keys.shape[1]
    out = torch.zeros(rows, heads, values.shape[2], dtype=torch.float64)
    for row in range(rows):
        position = first + row
        begin = 0 if window is None else max(0, position - window + 1)
        begin = begin if chunk is None else max(begin, position - position % chunk)
        seen = slice(begin, first + row + 1)
        for head in range(heads):
            scores = (keys[seen, head // group].double() @ query[row, head].double()) * scaling
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1].double()])
            weights = scores.softmax(-1)[: seen.stop - seen.start]
            out[row, head] = weights @ values[seen, head // group].double()
    return out


@pytest.mark.parametrize("use_kernel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "key_dim", "value_dim"), [(4, 2, 16, 16), (7, 1, 64, 64), (3, 3, 24, 40), (14, 2, 64, 64)]
)
@pytest.mark.parametrize(
    ("window", "chunk", "softcap", "with_sinks"),
    [
        (None, None, None, False), (5, None, None, False), (None, None, 20.0, False), (20, None, None, True),
        (None, 23, 20.0, True),
    ],
)  # fmt: skip
def test_equals_the_definition(
    use_kernel: bool,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    with_sinks: bool,
) -> None:
    """A history of steps in which sequences with scattered blocks decode and prefill side by side."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    attention = PagedAttention(attention_backend if use_kernel else torch_backend)
    shape = LayerShape(heads, kv_heads, key_dim, value_dim, window=window, chunk=chunk)
    attention.shapes[0], attention.devices[0] = shape, torch.device("cpu")
    attention.allocate(40, BLOCK, dtype)
    assert isinstance(attention.backend, CpuAttention if use_kernel else TorchAttention)
    tables = rng.permutation(40).reshape(5, 8).astype(np.int32)
    sinks = torch.randn(heads) if with_sinks else None
    scaling = 0.3
    known_keys = [torch.zeros(0, kv_heads, key_dim, dtype=dtype) for _ in range(5)]
    known_values = [torch.zeros(0, kv_heads, value_dim, dtype=dtype) for _ in range(5)]
    for counts in ([1, 30, 17, 2, 1], [1, 1, 1, 40, 1], [1, 1, 1, 1, 33], [1, 5, 1, 1, 1]):
        order = sorted(range(5), key=lambda index: counts[index] != 1)
        query, key, value = (
            torch.randn(1, number, sum(counts), dim, dtype=dtype)
            for number, dim in ((heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim))
        )
        firsts = [len(known_keys[index]) for index in order]
        lengths = [counts[index] for index in order]
        starts = np.cumsum([0, *lengths[:-1]])
        places = [np.arange(first, first + length) for first, length in zip(firsts, lengths, strict=True)]
        metadata = AttentionMetadata(
            starts=starts.astype(np.int32),
            counts=np.array(lengths, dtype=np.int32),
            positions=np.array(firsts, dtype=np.int32),
            block_table=tables[order],
            token_block=np.concatenate([tables[i][at // BLOCK] for i, at in zip(order, places, strict=True)]),
            token_offset=np.concatenate(places).astype(np.int32) % BLOCK,
        )
        with attention.running(metadata):
            out, _ = attention(
                types.SimpleNamespace(layer_idx=0),
                query,
                key,
                value,
                None,
                scaling=scaling,
                softcap=softcap,
                s_aux=sinks,
            )
        for index, start, first, length in zip(order, starts, firsts, lengths, strict=True):
            part = slice(int(start), int(start) + length)
            known_keys[index] = torch.cat([known_keys[index], key[0, :, part].transpose(0, 1)])
            known_values[index] = torch.cat([known_values[index], value[0, :, part].transpose(0, 1)])
            expected = definition(
                query[0, :, part].transpose(0, 1), known_keys[index], known_values[index],
                first, scaling, window, softcap, sinks, chunk,
            )  # fmt: skip
            assert (out[0, part].double() - expected).abs().max() < TOLERANCE[dtype] * expected.abs().max()


def test_the_kernel_is_built_here() -> None:
    """Otherwise the tests of the kernel would test the fallback."""
    assert all(PagedAttentionKernel.load(dtype) is not None for dtype in TOLERANCE)


@pytest.mark.parametrize("compiler", ["/nowhere/g++", "/bin/false"])
def test_without_a_working_compiler_there_is_no_kernel(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    assert build.build_library("float32") is None
    assert "slower torch operations" in caplog.text
    assert not list(tmp_path.rglob("*.so"))
