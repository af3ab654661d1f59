"""The weights of a checkpoint, as its format gives them to the loader: one source each, made from one or more
tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from fastserve.engine.layers import quantization
from fastserve.engine.layers.layouts.layout import WeightLayout
from fastserve.engine.loading.checkpoint import StoredTensor, Tensors
from fastserve.errors import StartupError

Settings = Mapping[str, Any]
"""`quantization_config` in the config.json of a quantized checkpoint."""


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A quantized weight (out, in): value = (code - zero) * scale. Column j belongs to input `input_order[j]`."""

    codes: torch.Tensor
    """(out, in), uint8 or int8"""
    scales: torch.Tensor
    """(out, groups)"""
    zeros: torch.Tensor | None
    """(out, groups)"""
    bits: int
    """Storage width of codes in the engine: 8 or 4"""
    group: int
    """Number of adjacent columns that share a scale."""
    input_order: torch.Tensor | None = None
    """(in,)"""

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def layout(self, dtype: torch.dtype, device: torch.device) -> WeightLayout:
        return quantization.from_codes(
            self.codes.to(device),
            self.scales.to(device),
            None if self.zeros is None else self.zeros.to(device),
            bits=self.bits,
            dtype=dtype,
            input_order=None if self.input_order is None else self.input_order.to(device),
            group=self.group,
        )

    def dense(self, dtype: torch.dtype, rows: slice = slice(None)) -> torch.Tensor:
        """The dequantized weight (out, in), or some of its rows."""
        values = self.codes[rows].float()
        width = values.shape[1]
        if self.zeros is not None:
            values -= self.zeros[rows].float().repeat_interleave(self.group, dim=1)[:, :width]
        values *= self.scales[rows].float().repeat_interleave(self.group, dim=1)[:, :width]
        if self.input_order is None:
            return values.to(dtype)
        weight = torch.empty_like(values, dtype=dtype)
        weight[:, self.input_order] = values.to(dtype)
        return weight


@dataclass(frozen=True, slots=True)
class QuantizedExperts:
    """A quantized weight (experts, out, in)."""

    experts: tuple[QuantizedTensor, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.experts), *self.experts[0].shape

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.stack([codes.dense(dtype) for codes in self.experts])


def join_outputs(parts: Sequence[QuantizedTensor]) -> QuantizedTensor | None:
    """Concatenate weights with the same inputs along their outputs; None if their quantization differs."""
    first = parts[0]
    for other in parts[1:]:
        orders = (first.input_order, other.input_order)
        same_order = torch.equal(*orders) if all(order is not None for order in orders) else orders == (None, None)
        kinds = {
            (part.bits, part.group, part.shape[1], part.codes.dtype, part.zeros is None) for part in (first, other)
        }
        if not same_order or len(kinds) != 1:
            return None
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=torch.cat(zeros) if zeros else None,
    )


Value: TypeAlias = torch.Tensor | QuantizedTensor
WeightValue: TypeAlias = Value | QuantizedExperts
"""Value of one weight of the model."""


@dataclass(frozen=True, slots=True)
class Source:
    """A weight of a checkpoint."""

    name: str
    """Name of the weight in an unquantized checkpoint."""
    stored: tuple[StoredTensor, ...]
    make: Callable[..., Value]
    """Makes the weight from the `stored` tensors, in their order."""
    num_bytes: int

    def load(self) -> Value:
        """Read the weight. Raises StartupError that names tensor and file."""
        try:
            return self.make(*(tensor.read() for tensor in self.stored))
        except (ValueError, RuntimeError, IndexError) as error:
            raise StartupError(
                f"{self.location}: what is stored for {self.name} does not fit together: {error}"
            ) from error

    @property
    def location(self) -> str:
        """The weight's files, for messages."""
        return ", ".join(dict.fromkeys(str(tensor.file) for tensor in self.stored)) or "random weights"


def source_of(name: str, stored: Iterable[StoredTensor], make: Callable[..., Value]) -> Source:
    tensors = tuple(stored)
    return Source(name, tensors, make, sum(tensor.num_bytes for tensor in tensors))


def plain_source(tensor: StoredTensor) -> Source:
    return source_of(tensor.name, [tensor], lambda value: value)


def layers_of(tensors: Tensors, mark: str, parts: Iterable[str]) -> tuple[dict[str, dict[str, StoredTensor]], Tensors]:
    """The tensors `mark` and `parts` of each layer that has a `mark`, by layer and part; and all other tensors."""
    layers: dict[str, dict[str, StoredTensor]] = {}
    rest = dict(tensors)
    for name in tensors:
        layer, _, part = name.rpartition(".")
        if part == mark:
            layers[layer] = {
                other: rest.pop(f"{layer}.{other}") for other in (mark, *parts) if f"{layer}.{other}" in rest
            }
    return layers, rest


def require_parts(layer: str, found: Mapping[str, StoredTensor], needed: Iterable[str]) -> None:
    for part in needed:
        if part not in found:
            file = next(iter(found.values())).file
            raise StartupError(f"{file}: the layer {layer} has {', '.join(found)}, but no tensor {layer}.{part}.")


def unpack_bits(words: torch.Tensor, bits: int) -> torch.Tensor:
    """32-bit words (rows, columns) -> unsigned `bits`-bit numbers (rows * 32 / bits, columns), uint8. Each column is a
    bit stream, beginning with the lowest bit of the first row; a number may span two words."""
    period = math.lcm(bits, 32) // 32
    count = period * 32 // bits
    rows, columns = words.shape
    if rows % period:
        raise ValueError(f"{rows} rows of 32 bits hold no whole numbers of {bits} bits")
    found = torch.empty(rows // period, count, columns, dtype=torch.uint8)
    groups = words.reshape(rows // period, period, columns)
    for index in range(count):
        word, shift = divmod(index * bits, 32)
        value = groups[:, word] >> shift
        if shift + bits > 32:
            # A right shift fills with the sign bit: keep only the bits that come from this word.
            value = (value & ((1 << (32 - shift)) - 1)) | (groups[:, word + 1] << (32 - shift))
        found[:, index] = value & ((1 << bits) - 1)
    return found.view(rows * 32 // bits, columns)


def input_order_of(g_idx: torch.Tensor, group: int, groups: int) -> torch.Tensor | None:
    """`g_idx` (in,): group of each input -> the order of inputs that makes each group contiguous; None if it is
    already. Raises ValueError when groups differ in size."""
    contiguous = torch.arange(len(g_idx)) // group
    if torch.equal(g_idx, contiguous):
        return None
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[order], contiguous):
        counts = torch.bincount(g_idx.clamp_min(0), minlength=groups).tolist()
        raise ValueError(f"g_idx puts {min(counts)} to {max(counts)} inputs in a group, not {group} in each")
    return order
