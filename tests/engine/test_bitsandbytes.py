"""Weights as bitsandbytes keeps them, by its CPU backend, where the package is installed: `pip install bitsandbytes`.
The engine uses it on CUDA only."""

from __future__ import annotations

import pytest
import torch

from fastserve.engine.runner.quantised import quantise_int8, quantise_nf4

KINDS = {"int8": (0.01, 0.005), "nf4": (0.12, 0.03)}
"""Errors of the weight (and of a product), and what it differs from ours by (its scales are rounded too), relative to
their lengths."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_weight_of_bitsandbytes_is_one_of_ours(kind: str, dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes")
    from fastserve.engine.runner.bitsandbytes_weight import BitsAndBytesWeight

    torch.manual_seed(0)
    weight, other, x, bias = torch.randn(96, 128), torch.randn(96, 128), torch.randn(5, 128), torch.randn(96)
    error, difference = KINDS[kind]
    form = BitsAndBytesWeight(weight, dtype, kind)
    ours = (quantise_int8 if kind == "int8" else quantise_nf4)(weight, torch.float32)
    assert form.get().dtype is dtype
    assert (form.get() - weight).norm() <= error * weight.norm()
    assert (form.get() - ours.get()).norm() <= difference * weight.norm()
    assert torch.equal(form.part(slice(16, 48)).get(), form.get()[16:48])
    expected = x @ weight.t() + bias
    # Its CPU backend packs a weight of 4 bits anew with the first product, after which it cannot be read as on CUDA.
    found = form.product(x.to(dtype), bias.to(dtype))
    assert found.dtype is dtype
    assert (found - expected).norm() <= error * expected.norm()
    form.set(other)
    assert (form.get() - other).norm() <= error * other.norm()
