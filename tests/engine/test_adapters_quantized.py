"""Adapters of a batch on quantized base models.

The reference is the dequantized model with the adapter added to it. The type's own rounding has rows of the bare base
differ from theirs; rows with an adapter may differ as much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, PreTrainedModel

from fastserve.engine.core import EngineCore
from fastserve.engine.layers.layouts.quantized import QuantizedWeight
from fastserve.engine.layers.linear import Linear
from fastserve.engine.runner.runner import ModelRunner
from fastserve.engine.settings import WeightOptions

from .conftest import keep_way, plain
from .packers import write_packed
from .test_adapters import LAYERS, make_adapter, request, run, serve
from .test_formats import (
    K_QUANT_SIZES,
    SIZES,
    awq_packer,
    compressed,
    gptq_packer,
    pack_fp8_blocks,
    pack_int8,
    pack_w4a16,
    pack_w8a16_in_order,
    save,
    write_gguf,
    write_k_quants,
)

RANKS = {"small": 3, "large": 20}
ALPHA = 6
LOGPROB_TOLERANCE = 2e-4
"""Of the float32 products of both models."""


@dataclass(frozen=True)
class Case:
    write: Callable[[str, Path], PreTrainedModel] | None
    """Writes the checkpoint; returns the dequantized model. None: the weights are quantized while they are read."""
    stays: bool = True
    """Whether the weights are still quantized when they are multiplied with."""
    quantize: str | None = None


def packed(pack: Any, settings: dict[str, Any]) -> Callable[[str, Path], PreTrainedModel]:
    return lambda base, folder: write_packed(base, folder, pack, settings)


def gptq_case(bits: int, group: int, *, shuffled: bool) -> Case:
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": shuffled}
    return Case(packed(gptq_packer(bits, group, shuffled=shuffled), settings))


def gguf_case(kind: str, *, stays: bool) -> Case:
    return Case(partial(write_gguf_llama, quantization=kind), stays)


def write_gguf_llama(base: str, folder: Path, quantization: str) -> PreTrainedModel:
    return write_gguf(base, folder, "llama", quantization)


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
W4 = compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)
W8 = compressed("pack-quantized", num_bits=8, type="int", actorder="group", group_size=32)
INT8 = compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True)
CASES = {
    "int8": Case(None, quantize="int8"),
    "nf4": Case(None, quantize="nf4"),
    "gptq, 4 bits": gptq_case(4, 32, shuffled=False),
    "gptq, 3 bits in another order": gptq_case(3, 32, shuffled=True),
    "awq": Case(packed(awq_packer(32), AWQ)),
    "compressed-tensors, int8": Case(packed(pack_int8, INT8)),
    "fp8, by blocks": Case(
        packed(pack_fp8_blocks, {"quant_method": "fp8", "weight_block_size": [32, 48]}), stays=False
    ),
    "gguf, Q8_0": gguf_case("Q8_0", stays=True),
    "gguf, Q4_0": gguf_case("Q4_0", stays=True),
}
SLOW = {
    "gptq, 2 bits": gptq_case(2, 32, shuffled=False),
    "gptq, 8 bits": gptq_case(8, -1, shuffled=False),
    "compressed-tensors, w4a16": Case(packed(pack_w4a16, W4)),
    "compressed-tensors, w8a16 in another order": Case(packed(pack_w8a16_in_order, W8)),
    "gguf, Q5_1": gguf_case("Q5_1", stays=False),
    "gguf, BF16": gguf_case("BF16", stays=False),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(LlamaConfig(**SIZES), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folders(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    layers = (*LAYERS, "embed_tokens", "lm_head")
    return {name: make_adapter(base, root / name, rank, layers) for name, rank in RANKS.items()}


def dequantized(core: EngineCore, base: str) -> PreTrainedModel:
    model = plain(base)
    for name, parameter in model.named_parameters():
        parameter.data = core.weights.get(name).float()
    return model


def logprobs_with(model: PreTrainedModel, folder: Path | None, ids: list[int]) -> list[float]:
    """Of each token of `ids` but the first, by the model with the adapter added to its weights."""
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    if folder is not None:
        tensors = load_file(folder / "adapter_model.safetensors")
        for name, parameter in model.named_parameters():
            key = f"base_model.model.{name.removesuffix('.weight')}"
            pairs = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
            for a, b in (pair for pair in pairs if f"{key}{pair[0]}" in tensors):
                change = tensors[f"{key}{b}"] @ tensors[f"{key}{a}"] * (ALPHA / RANKS[folder.name])
                parameter.data = parameter.data + (change if change.shape == parameter.shape else change.t())
    with torch.inference_mode():
        found = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    for name, parameter in model.named_parameters():
        parameter.data = before[name]
    return [float(found[at, token]) for at, token in enumerate(ids[1:])]


@pytest.mark.parametrize(
    "case", [*(pytest.param(case, id=name) for name, case in CASES.items()),
             *(pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items())],
)  # fmt: skip
def test_products_are_added_to_those_of_a_quantized_base_in_each_way(
    base: str, folders: dict[str, Path], tmp_path: Path, case: Case
) -> None:
    path, expected = base, None
    if case.write is not None:
        path, expected = str(tmp_path), case.write(base, tmp_path)
    weights = WeightOptions(quantize=case.quantize)
    core = serve(path, folders, settings={"weights": weights, "no_prefix_cache": True})
    assert isinstance(core._executor, ModelRunner)
    model = dequantized(core, base) if expected is None else expected
    memory = core._executor.adapter_memory
    assert memory is not None
    layouts = [site.layer.layout for site in memory.sites if isinstance(site.layer, Linear)]
    assert any(isinstance(layout, QuantizedWeight) for layout in layouts) == case.stays
    check_products(core, model, folders)


def test_products_are_added_to_those_of_a_base_of_k_quants(tmp_path: Path) -> None:
    base = save(LlamaConfig(**K_QUANT_SIZES), tmp_path / "base")
    layers = (*LAYERS, "embed_tokens", "lm_head")
    folders = {name: make_adapter(base, tmp_path / name, rank, layers) for name, rank in RANKS.items()}
    model = write_k_quants(base, tmp_path / "gguf")
    core = serve(str(tmp_path / "gguf"), folders, settings={"no_prefix_cache": True})
    check_products(core, model, folders)


def check_products(core: EngineCore, model: PreTrainedModel, folders: dict[str, Path]) -> None:
    """A mixture of requests gets the logprobs of `model` with their adapters, in each way to compute a step."""
    assert isinstance(core._executor, ModelRunner)
    names = ["", *folders, "small"]
    requests = [
        request(
            f"r{index}", [2 + (5 * at + 31 * index) % 150 for at in range(9 + 8 * index)], 1, name, prompt_logprobs=0
        )
        for index, name in enumerate(names)
    ]
    expected_logprobs = [logprobs_with(model, folders.get(one.adapter), one.prompt_ids) for one in requests]
    for way in ("whole_step", "modules"):
        assert core._executor.forward_passes.ways[0].name == way
        answers = run(core, requests)
        errors = [
            max(abs(found - own) for found, own in zip(answers[one.request_id].prompt_logprobs, reference, strict=True))
            for one, reference in zip(requests, expected_logprobs, strict=True)
        ]
        assert max(errors) <= LOGPROB_TOLERANCE + 4 * errors[0], (way, errors)
        assert errors[0] < 0.2, (way, errors)
        keep_way(core._executor, "modules")
