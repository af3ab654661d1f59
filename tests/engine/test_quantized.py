"""Weights of 8 and 4 bits: dequantized as their scheme says, multiplied as their dequantized values are, in one sum for
each output whatever the batch, and in whole models on both paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fastserve.engine.kernels.packed_linear import PackedLinearKernel
from fastserve.engine.layers.fusion import FusedGatedMLP
from fastserve.engine.layers.layouts.layout import WeightLayout
from fastserve.engine.layers.layouts.quantized import QuantizedWeight
from fastserve.engine.layers.linear import Linear
from fastserve.engine.layers.quantization import NF4, from_codes, quantize_int8, quantize_nf4
from fastserve.engine.loading.loader import load_model
from fastserve.engine.loading.reference import own_logits
from fastserve.engine.runner.runner import ModelRunner
from fastserve.engine.selfcheck.compare import Capacity, difference

from .conftest import TinyModels

DTYPES = [torch.float32, torch.bfloat16]
# Batch sizes around each threshold of the kernel: one tile, several, decoded once, several chunks.
ROWS = [1, 5, 6, 7, 18, 19, 31, 100]
# Outputs and inputs with and without a remainder after groups of 16; inputs that the kernel does not support.
SHAPES = [(64, 256), (200, 384), (16, 128), (37, 136), (9, 50)]


def spread(per_group: torch.Tensor, group: int, width: int) -> torch.Tensor:
    return per_group.double().repeat_interleave(group, dim=1)[:, :width]


def random_codes(
    out: int, width: int, *, bits: int, group: int, zeros: str, signed: bool = False, order: bool = False
) -> tuple[Callable[[torch.dtype], QuantizedWeight], torch.Tensor]:
    """A quantized weight, and its value by the definition in float64."""
    low, high = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
    codes = torch.randint(low, high, (out, width)).to(torch.int8 if signed else torch.uint8)
    codes[0, :2] = torch.tensor([low, high - 1])
    groups = -(-width // group)
    scales = torch.rand(out, groups) * 0.02 + 0.001
    middle = float(low + high) / 2
    zero = {
        "none": None,
        "shared": torch.full((out, groups), middle),
        "each": torch.randint(low, high, (out, groups)).float(),
        "fractions": torch.rand(out, groups) * (high - low) + low,
    }[zeros]
    columns = torch.randperm(width) if order else torch.arange(width)
    value = torch.empty(out, width, dtype=torch.float64)
    offset = 0.0 if zero is None else spread(zero, group, width)
    value[:, columns] = (codes.double() - offset) * spread(scales, group, width)

    def make(dtype: torch.dtype) -> QuantizedWeight:
        input_order = columns if order else None
        return from_codes(codes, scales, zero, bits=bits, dtype=dtype, input_order=input_order, group=group)

    return make, value


def random_table(out: int, width: int, *, group: int) -> tuple[Callable[[torch.dtype], QuantizedWeight], torch.Tensor]:
    codes, scales = torch.randint(0, 16, (out, width)), torch.rand(out, -(-width // group))
    value = torch.tensor(NF4, dtype=torch.float64)[codes] * spread(scales, group, width)
    return lambda dtype: from_codes(codes, scales, None, bits=4, dtype=dtype, table=NF4, group=group), value


Made = tuple[Callable[[torch.dtype], QuantizedWeight], torch.Tensor]
SCHEMES: dict[str, Callable[[int, int], Made]] = {
    "int8 by output": lambda o, i: random_codes(o, i, bits=8, group=i, zeros="none", signed=True),
    "int8 groups": lambda o, i: random_codes(o, i, bits=8, group=128, zeros="shared"),
    "int8 zeros": lambda o, i: random_codes(o, i, bits=8, group=64, zeros="each"),
    "int4 symmetric": lambda o, i: random_codes(o, i, bits=4, group=32, zeros="shared"),
    "int4 signed": lambda o, i: random_codes(o, i, bits=4, group=128, zeros="none", signed=True),
    "int4 zeros": lambda o, i: random_codes(o, i, bits=4, group=128, zeros="each"),
    "int4 fractions": lambda o, i: random_codes(o, i, bits=4, group=32, zeros="fractions"),
    "int4 by output": lambda o, i: random_codes(o, i, bits=4, group=i, zeros="each"),
    "int4 order": lambda o, i: random_codes(o, i, bits=4, group=64, zeros="each", order=True),
    "int4 symmetric order": lambda o, i: random_codes(o, i, bits=4, group=128, zeros="shared", order=True),
    "int8 order": lambda o, i: random_codes(o, i, bits=8, group=32, zeros="each", order=True),
    "nf4": lambda o, i: random_table(o, i, group=64),
}


def test_the_kernel_is_there() -> None:
    assert PackedLinearKernel.load(torch.bfloat16, for_codes=True), "it must build here, or much is not tested"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_products_are_those_of_the_values(
    scheme: str, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastserve.engine.layers.quantization._CONVERTED_ENTRIES", 1)  # the fewest rows at a time
    torch.manual_seed(len(scheme))
    make, value = SCHEMES[scheme](*shape)
    layout = make(dtype)
    eps = torch.finfo(dtype).eps
    assert (layout.get().double() - value).abs().max() <= max(eps, 1e-6) * value.abs().max()
    bias = torch.randn(shape[0]).to(dtype)
    whole = torch.randn(max(ROWS), shape[1]).to(dtype)
    # Errors of sums of many terms, so relative to the size of the terms. The kernel rounds nf4's table to bfloat16.
    size = (whole.double().abs() @ value.abs().t()).amax()
    for rows in ROWS:
        found = layout.product(whole[:rows], bias).double()
        expected = whole[:rows].double() @ value.t() + bias.double()
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= (1e-6 if dtype is torch.float32 else 4e-3) * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_token_has_the_same_result_in_any_batch(scheme: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    make, _ = SCHEMES[scheme](104, 384)
    layout = make(dtype)
    x = torch.randn(max(ROWS) + 3, 384).to(dtype)
    alone = torch.cat([layout.product(row, None) for row in x.split(1)])
    for rows in ROWS:
        for first in (0, 3):
            assert torch.equal(layout.product(x[first : first + rows], None), alone[first : first + rows])


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_parts_are_rows_of_the_whole(scheme: str) -> None:
    torch.manual_seed(2)
    make, value = SCHEMES[scheme](104, 128)
    layout = make(torch.float32)
    x = torch.randn(3, 128)
    whole = layout.product(x, None)
    for rows in (slice(0, 64), slice(64, 104), slice(5, 30), slice(60, 104)):
        part = layout.part(rows)
        assert torch.equal(part.get(), layout.get()[rows])
        assert torch.allclose(part.product(x, None), whole[:, rows], atol=1e-3, rtol=1e-4)
        before = layout.get()
        part.set(value[rows].float() * 2)
        after = layout.get()
        changed = (after != before).any(dim=1)
        assert changed[rows].all(), "a part shares its memory"
        outside = torch.cat([after[: rows.start] - before[: rows.start], after[rows.stop :] - before[rows.stop :]])
        assert outside.abs().max() <= 0.3 * before.abs().max()
        layout = make(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [384, 50])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_rows_are_those_of_the_whole(scheme: str, width: int, dtype: torch.dtype) -> None:
    """The kernel does not support 50 inputs."""
    torch.manual_seed(3)
    layout = SCHEMES[scheme](104, width)[0](dtype)
    ids = torch.tensor([[0, 103, 64], [15, 0, 16]])
    found, expected = layout.rows(ids), layout.get()[ids]
    assert found.shape == (2, 3, width)
    assert found.dtype is dtype
    # The kernel may round once where torch rounds twice.
    assert torch.allclose(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("width", [128, 50])
def test_set_quantizes_by_the_same_scheme(scheme: str, width: int) -> None:
    torch.manual_seed(3)
    make, _ = SCHEMES[scheme](40, width)
    layout = make(torch.float32)
    memory = layout.nbytes
    weight = torch.randn(40, width)
    weight[7] = 0.0
    layout.set(weight)
    found = layout.get()
    assert layout.nbytes == memory
    assert torch.equal(found[7], weight[7])
    # Half of the widest step between neighbouring table entries, with the largest value at one end of the table.
    steps = {"int8": 1 / 254, "int4": 1 / 14, "nf4": 0.153}
    bound = next(step for name, step in steps.items() if scheme.startswith(name))
    assert (found - weight).abs().max() <= 1.001 * bound * weight.abs().max()
    layout.set(found)
    assert torch.allclose(layout.get(), found, atol=bound * 0.1)


def test_int8_rounds_each_output_to_127_steps() -> None:
    weight = torch.randn(24, 96) * torch.logspace(-3, 3, 24).unsqueeze(1)
    scale = weight.abs().amax(1, keepdim=True) / 127
    expected = (weight / scale).round() * scale
    assert torch.allclose(quantize_int8(weight, torch.float32).get(), expected, rtol=1e-6)


def test_nf4_takes_the_nearest_of_its_values_for_each_block_of_64() -> None:
    weight = torch.randn(24, 192) * torch.logspace(-3, 3, 24).unsqueeze(1)
    blocks = weight.view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    table = torch.tensor(NF4)
    nearest = table[((blocks / largest).unsqueeze(-1) - table).abs().argmin(-1)]
    assert torch.allclose(quantize_nf4(weight, torch.float32).get(), (nearest * largest).view(24, 192), rtol=1e-6)


def test_memory() -> None:
    weight = torch.randn(1024, 1024)
    assert quantize_int8(weight, torch.bfloat16).nbytes <= 0.51 * weight.numel() * 2
    assert quantize_nf4(weight, torch.bfloat16).nbytes <= 0.29 * weight.numel() * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": torch.ones(8, 3)}, r"need scales \(and zeros\) of shape \(8, 2\), not \(8, 3\)"),
        ({"zeros": torch.ones(8, 1)}, r"not \(8, 2\) and \(8, 1\)"),
        ({"codes": torch.full((8, 64), 16, dtype=torch.uint8)}, "codes from 16 to 16 do not fit 4 bits"),
        ({"input_order": torch.arange(64) + 1}, "must name each of 0 to 63 once"),
        ({"table": NF4, "zeros": torch.ones(8, 2)}, "a table has 16 entries"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    fits: dict[str, object] = {
        "codes": torch.zeros(8, 64, dtype=torch.uint8), "scales": torch.ones(8, 2), "zeros": None,
        "bits": 4, "group": 32, "dtype": torch.float32,
    }  # fmt: skip
    from_codes(**fits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        from_codes(**(fits | change))  # type: ignore[arg-type]


# ---- whole models -----------------------------------------------------------------------------------------------


def with_zeros(weight: torch.Tensor) -> QuantizedWeight:
    """4 bits in groups of 32 with zero points and an input order."""
    make, _ = random_codes(*weight.shape, bits=4, group=32, zeros="fractions", order=True)
    layout = make(torch.float32)
    layout.set(weight)
    return layout


QUANTISERS: dict[str, Callable[[torch.Tensor], QuantizedWeight]] = {
    "int8": lambda weight: quantize_int8(weight, torch.float32),
    "nf4": lambda weight: quantize_nf4(weight, torch.float32, 32),
    "int4 zeros order": with_zeros,
}


class Stacked:
    """Concatenated layouts, for a layer whose parts are quantized separately."""

    def __init__(self, parts: list[QuantizedWeight]) -> None:
        self._parts = parts

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert bias is None
        return torch.cat([part.product(x, None) for part in self._parts], dim=-1)


def quantize_in_place(
    model: torch.nn.Module, quantize: Callable[[torch.Tensor], QuantizedWeight]
) -> dict[str, torch.Tensor]:
    """Quantize all linear layers except the LM head; returns their dequantized weights by name."""
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, FusedGatedMLP):
            parts = [quantize(part.get()) for part in module.parts]
            module.parts, module.gate_up.layout = parts, cast(WeightLayout, Stacked(parts))
            names = ("gate_proj", "up_proj")
            found |= {f"{path}.{name}.weight": part.get() for name, part in zip(names, parts, strict=True)}
        elif isinstance(module, Linear) and not path.endswith(("gate_up", "lm_head")):  # the head may be tied
            module.layout = quantize(module.layout.get())
            found[f"{path}.weight"] = module.layout.get()
    return found


@pytest.mark.parametrize("quantizer", list(QUANTISERS))
@pytest.mark.parametrize(("name", "is_native"), [("llama", True), ("qwen2", True), ("gemma2", True), ("gpt2", False)])
def test_models_compute_with_the_dequantized_weights(
    tiny_models: TinyModels, name: str, is_native: bool, quantizer: str
) -> None:
    path = tiny_models.path(name)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    unquantized = own_logits(plain, torch.device("cpu"), 256)
    loaded = load_model(path, "cpu", "float32", trust_remote_code=False, progress=lambda *_: None)
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    torch.manual_seed(4)
    with torch.no_grad():
        for weight_name, weight in quantize_in_place(loaded.model, QUANTISERS[quantizer]).items():
            is_transposed = isinstance(plain.get_submodule(weight_name.removesuffix(".weight")), Conv1D)
            parameters[weight_name].data = weight.t() if is_transposed else weight
    reference = own_logits(plain, torch.device("cpu"), 256)
    assert (reference.logits - unquantized.logits).abs().max() > 0.01 * reference.logits.std(), "nothing was quantized"
    sizes: dict[str, Any] = {"num_blocks": 8, "block_size": 16, "max_num_seqs": 4, "max_model_len": 64}
    runner = ModelRunner(loaded, **sizes)
    assert ("whole_step" in {way.name for way in runner.forward_passes.ways}) == is_native
    for way in runner.forward_passes.ways:
        error = difference(reference, runner, way, Capacity(**sizes))
        assert error is not None
        assert error < 1e-3
