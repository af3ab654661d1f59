"""The Triton steps against their definition, and in the places of a model's own: interpreted on a CPU, compiled on a
GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from fastserve.engine.attention.paged import PagedAttention, attention_implementation
from fastserve.engine.devices.find import attention_backend
from fastserve.engine.loading import loader as loading
from fastserve.engine.runner.runner import ModelRunner
from fastserve.engine.selfcheck.compare import Capacity, difference

from .conftest import CONFIGS, keep_way
from .triton_interpreter import DEVICES, import_kernels

module: Any = import_kernels("triton_elementwise")
kernels = module.TritonElementwiseKernels()

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= TOLERANCE[found.dtype] * expected.abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("size", [16, 100, 3000])
def test_kernels_equal_their_definition(device: str, dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(size)
    rows = 3
    x, weight = (torch.randn(*shape, device=device).to(dtype) for shape in ((rows, size), (size,)))
    mean = x.double().pow(2).mean(-1, keepdim=True)
    for offset in (0.0, 1.0):
        expected = x.double() / (mean + 1e-5).sqrt() * (weight.double() + offset)
        assert_equal(kernels.rms_norm(x, weight, 1e-5, offset), expected)

    gate_up = (torch.randn(rows, 2 * size, device=device) * 20).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_equal(kernels.silu_and_mul(gate_up), F.silu(gate) * up)

    # More heads, or longer ones, than one program takes; as attention modules have it: (tokens, heads, dim) in memory.
    q = torch.randn(1, rows, 5, size, device=device).to(dtype).transpose(1, 2)
    cos, sin = (torch.randn(1, rows, size, device=device).to(dtype) for _ in range(2))
    low, high = q.double().chunk(2, dim=-1)
    rotated = torch.cat([-high, low], dim=-1)
    found = kernels.rotary(q, cos, sin)
    assert_equal(found, q.double() * cos.double().unsqueeze(1) + rotated * sin.double().unsqueeze(1))
    assert found.transpose(1, 2).is_contiguous()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of numpy, which the interpreter runs on
@pytest.mark.parametrize("device", DEVICES)
def test_extreme_gates_do_not_overflow(device: str) -> None:
    gate = torch.tensor([-1e30, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e30] * 4, device=device)
    found = kernels.silu_and_mul(torch.cat([gate, torch.ones_like(gate)]).unsqueeze(0))
    assert torch.allclose(found[0], F.silu(gate))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "norms", "mlps"), [("qwen3", 13, 3), ("gemma2", 13, 0)])
def test_they_take_the_places_of_a_models_own_parts(
    device: str, name: str, norms: int, mlps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "elementwise_ops", lambda *_: kernels)
    torch.manual_seed(0)
    attention = PagedAttention(attention_backend)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).to(device)
    model.set_attn_implementation(attention_implementation())
    loaded = loading.prepare(model, attention, torch.float32)
    assert {layers.kind: layers.fused for layers in loaded.fused_layers} == {
        "norm": norms, "gated_mlp": mlps, "attention": 3
    }  # fmt: skip
    sizes: dict[str, Any] = {"block_size": 16, "num_blocks": 8, "max_num_seqs": 4, "max_model_len": 64}
    runner = ModelRunner(loaded, **sizes)
    found = difference(loaded.reference, runner, keep_way(runner, "modules"), Capacity(**sizes))
    assert found is not None
    assert found < 1e-4
