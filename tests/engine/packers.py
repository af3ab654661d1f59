"""Quantizes models by rounding to the nearest, and writes them bit for bit as the formats say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Rounded:
    """A weight (out, in) in whole numbers: value = (code - zero) * scale."""

    codes: torch.Tensor
    """(out, in), from 0"""
    scales: torch.Tensor
    """(out, groups) float16 values"""
    zeros: torch.Tensor
    """(out, groups)"""
    g_idx: torch.Tensor
    """(in,)"""

    def dense(self) -> torch.Tensor:
        return (self.codes - self.zeros[:, self.g_idx]).double().mul(self.scales[:, self.g_idx].double()).float()


def round_to_nearest(weight: torch.Tensor, bits: int, group: int, *, shuffled: bool = False) -> Rounded:
    """Asymmetric. `shuffled`: neighbours are in different groups, as with GPTQ's order of activations."""
    width = weight.shape[1]
    group = width if group == -1 else group
    g_idx = torch.arange(width) // group
    if shuffled:
        g_idx = g_idx[torch.randperm(width, generator=torch.Generator().manual_seed(0))]
    top = (1 << bits) - 1
    codes: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    zeros: list[torch.Tensor] = []
    for index in range(int(g_idx.max()) + 1):
        values = weight[:, g_idx == index].float()
        low, high = values.amin(1).clamp_max(0), values.amax(1).clamp_min(0)
        scales.append(((high - low) / top).clamp_min(1e-6).half())
        # A zero point of 0 cannot be told from one of 2^bits where it is stored less 1.
        zeros.append((-low / scales[-1].float()).round().clamp(1, top))
    scale, zero = torch.stack(scales, 1), torch.stack(zeros, 1)
    codes_all = (weight.float() / scale.float()[:, g_idx] + zero[:, g_idx]).round().clamp(0, top)
    del codes
    return Rounded(codes_all.long(), scale, zero.long(), g_idx)


def pack_stream(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers (rows, columns) of `bits` -> words (rows * bits / 32, columns) of int32: each column is one stream
    of bits, lowest first."""
    rows, columns = numbers.shape
    stream: npt.NDArray[np.uint8] = np.zeros((rows * bits, columns), dtype=np.uint8)
    values = numbers.numpy().astype(np.uint32)
    for bit in range(bits):
        stream[bit::bits] = (values >> bit) & 1
    words = np.packbits(stream.reshape(-1, 32, columns), axis=1, bitorder="little")
    return torch.from_numpy(np.ascontiguousarray(words.transpose(0, 2, 1)).view("<i4").squeeze(-1).copy())


def gptq(name: str, weight: Rounded, bits: int, *, v2: bool = False) -> Tensors:
    layer = name.removesuffix(".weight")
    zeros = weight.zeros.t() if v2 else weight.zeros.t() - 1
    return {
        f"{layer}.qweight": pack_stream(weight.codes.t(), bits),
        f"{layer}.qzeros": pack_stream(zeros.t().contiguous(), bits).t().contiguous(),
        f"{layer}.scales": weight.scales.t().contiguous(),
        f"{layer}.g_idx": weight.g_idx.int(),
    }


def awq(name: str, weight: Rounded) -> Tensors:
    layer = name.removesuffix(".weight")

    def pack(numbers: torch.Tensor) -> torch.Tensor:
        words = torch.zeros(numbers.shape[0], numbers.shape[1] // 8, dtype=torch.int64)
        for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words |= numbers[:, output::8] << (4 * place)
        return torch.from_numpy(words.numpy().astype(np.uint32).view(np.int32))

    return {
        f"{layer}.qweight": pack(weight.codes.t()),
        f"{layer}.qzeros": pack(weight.zeros.t()),
        f"{layer}.scales": weight.scales.t().contiguous(),
    }


def packed_integers(name: str, weight: Rounded, bits: int) -> Tensors:
    """compressed-tensors' pack-quantized, asymmetric."""
    zeros = torch.cat([weight.zeros, weight.zeros.new_zeros(-len(weight.zeros) % (32 // bits), weight.zeros.shape[1])])
    return {
        f"{name}_packed": pack_stream(weight.codes.t().contiguous(), bits).t().contiguous(),
        f"{name}_scale": weight.scales.contiguous(),
        f"{name}_zero_point": pack_stream(zeros, bits),
        f"{name}_shape": torch.tensor(weight.codes.shape),
        f"{name}_g_idx": weight.g_idx.int(),
    }


Pack = Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]
"""Of a layer's weight (out, in): what is stored for it, and what that stands for."""


def write_packed(
    source: str, folder: Path, pack: Pack, settings: dict[str, Any] | None, file: str = "model.safetensors"
) -> PreTrainedModel:
    """The model in `source` with all linear layers but the head packed; returns it dequantized, in float32."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    state = {name: tensor.clone() for name, tensor in load_file(Path(source) / "model.safetensors").items()}
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if type(module) is torch.nn.Linear and module is not head:
            stored, values = pack(f"{path}.weight", module.weight.data)
            module.weight.data = values.float()
            del state[f"{path}.weight"]
            state |= stored
    if file.endswith(".safetensors"):
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / file)
    else:
        torch.save(state, folder / file)
    if settings is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return model
