"""The Triton products with weights of 8 and 4 bits against their definition: interpreted on a CPU, compiled on a
GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastserve.engine.devices.cpu import CpuDevice
from fastserve.engine.layers import quantization
from fastserve.engine.layers.layouts.quantized import QuantizedWeight
from fastserve.engine.layers.layouts.quantized_storage import PackedStorage

from .test_quantized import SCHEMES
from .triton_interpreter import DEVICES, import_kernels

module: Any = import_kernels("triton_quantized")
kernel = module.TritonQuantizedMatmul()

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layout for CPUs, and this kernel."""
    monkeypatch.setattr(PackedStorage, "of", lambda *_: None)
    monkeypatch.setattr(CpuDevice, "quantized_matmul", lambda self: kernel)


def count_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product that the kernel computes."""
    rows: list[int] = []

    def product(x: torch.Tensor, weight: Any) -> torch.Tensor:
        rows.append(len(x))
        found: torch.Tensor = module.TritonQuantizedMatmul().product(x, weight)
        return found

    monkeypatch.setattr(kernel, "product", product)
    return rows


def on(device: str, layout: QuantizedWeight) -> QuantizedWeight:
    for owner in (layout, layout._store):
        for name, value in vars(owner).items():
            if isinstance(value, torch.Tensor):
                setattr(owner, name, value.to(device))
    return layout


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(70, 384), (104, 192)], ids=str)
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_products_are_those_of_the_values(
    monkeypatch: pytest.MonkeyPatch, scheme: str, shape: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(len(scheme))
    make, value = SCHEMES[scheme](*shape)
    layout = on(device, make(dtype))
    rows = count_products(monkeypatch)
    bias = torch.randn(shape[0]).to(dtype)
    for batch in ((1,), (2, 9)):
        x = torch.randn(*batch, shape[1]).to(dtype)
        expected = x.double() @ value.t() + bias.double()
        found = layout.product(x.to(device), bias.to(device)).cpu()
        assert found.dtype is dtype
        assert found.shape == expected.shape
        size = (x.double().abs() @ value.abs().t()).amax()
        assert (found.double() - expected).abs().max() <= TOLERANCE[dtype] * size
    assert rows == [1, 18], "the kernel was not used"


@pytest.mark.parametrize("device", DEVICES)
def test_parts_and_weights_that_are_set(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    torch.manual_seed(0)
    layout = on(device, SCHEMES["int4 zeros"](104, 256)[0](torch.float32))
    rows = count_products(monkeypatch)
    weight, x = torch.randn(104, 256), torch.randn(2, 256, device=device)
    layout.set(weight.to(device))
    part = layout.part(slice(5, 80))
    expected = x @ layout.get().t()
    assert torch.allclose(layout.product(x, None), expected, atol=1e-3)
    assert torch.allclose(part.product(x, None), expected[:, 5:80], atol=1e-3)
    assert rows == [2, 2]


@pytest.mark.parametrize("device", DEVICES)
def test_many_tokens_and_odd_groups_are_dequantized(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    rows = count_products(monkeypatch)
    for group, count in ((64, module.MAX_ROWS + 1), (24, 2)):
        layout = on(device, quantization.quantize_nf4(torch.randn(32, 192), torch.float32, group))
        x = torch.randn(count, 192, device=device)
        assert torch.allclose(layout.product(x, None), x @ layout.get().t(), atol=1e-3)
    assert rows == []
