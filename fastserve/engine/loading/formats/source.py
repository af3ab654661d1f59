"""The weights of a checkpoint, as its format gives them to the loader: one source each, made from one or more
tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, TypeAlias

import torch

from fastserve.engine.layers import quantization
from fastserve.engine.layers.layouts.layout import WeightLayout
from fastserve.engine.layers.layouts.quantization_scheme import row_slices
from fastserve.engine.loading.checkpoint import StoredTensor, Tensors
from fastserve.engine.loading.sharding import Shard
from fastserve.engine.loading.tensor_shards import take
from fastserve.errors import StartupError

_DENSE_ENTRIES = 1 << 22
"""Entries dequantized at once."""
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

    def part(self, shard: Shard, dtype: torch.dtype) -> Value:
        """A rank's part of the weight. Where it has some inputs of a weight in activation order, groups are no longer
        of one size, and the part is dequantized to `dtype`."""
        if shard.dim == 0:
            codes, scales, zeros = (
                None if tensor is None else take(shard, tensor) for tensor in (self.codes, self.scales, self.zeros)
            )
            return replace(self, codes=codes, scales=scales, zeros=zeros)
        [(begin, end)] = shard.ranges
        if self.input_order is not None:
            return torch.cat([self.dense(dtype, rows)[:, begin:end] for rows in row_slices(self.shape, _DENSE_ENTRIES)])
        # Finer groups, if a group continues in another rank's part.
        group = self.group if begin // self.group == (end - 1) // self.group else math.gcd(begin, self.group)
        groups = torch.arange(begin, end, group, device=self.scales.device) // self.group
        scales, zeros = (None if tensor is None else tensor[:, groups] for tensor in (self.scales, self.zeros))
        return replace(self, codes=self.codes[:, begin:end], scales=scales, zeros=zeros, group=min(group, end - begin))


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


Divide = Callable[[Shard], Sequence[Shard | None] | None]
"""(part of a weight (out, in), or in the shape of a plain weight) -> for each stored tensor, the part from which the
part of the weight is made (None: all of it); None if it is not made of parts"""


def _read_whole(shard: Shard) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Source:
    """A weight of a checkpoint."""

    name: str
    """Name of the weight in an unquantized checkpoint."""
    stored: tuple[StoredTensor, ...]
    make: Callable[..., Value]
    """Makes the weight from the `stored` tensors, in their order."""
    num_bytes: int
    divide: Divide = _read_whole
    """How to read only a part of the weight."""
    is_plain: bool = False
    """Whether the weight is its single stored tensor, unchanged."""

    def load(self, shard: Shard | None = None) -> Value:
        """Read the weight; only its part `shard` if the source `divide`s it so. Raises StartupError that names tensor
        and file."""
        shards = None if shard is None else self.divide(shard)
        try:
            return self.make(*map(_read, self.stored, shards or [None] * len(self.stored)))
        except (ValueError, RuntimeError, IndexError) as error:
            raise StartupError(
                f"{self.location}: what is stored for {self.name} does not fit together: {error}"
            ) from error

    @property
    def location(self) -> str:
        """The weight's files, for messages."""
        return ", ".join(dict.fromkeys(str(tensor.file) for tensor in self.stored)) or "random weights"


def require_shape(source: Source, needed: Sequence[int], found: Sequence[int]) -> None:
    if tuple(found) != tuple(needed):
        raise StartupError(
            f"{source.location}: {source.name} has the shape {tuple(needed)} by config.json, and {tuple(found)} in the "
            "checkpoint."
        )


def source_of(
    name: str, stored: Iterable[StoredTensor], make: Callable[..., Value], divide: Divide = _read_whole
) -> Source:
    tensors = tuple(stored)
    return Source(name, tensors, make, sum(tensor.num_bytes for tensor in tensors), divide)


def _read(tensor: StoredTensor, shard: Shard | None) -> torch.Tensor:
    if shard is None:
        return tensor.read()
    assert tensor.read_shard is not None
    return tensor.read_shard(shard)


@dataclass(frozen=True, slots=True)
class PackedParts:
    """The stored tensors of a packed weight: codes (in, out), zero points and scales (groups, out)."""

    codes: StoredTensor
    zeros: StoredTensor
    scales: StoredTensor
    inputs: Fraction
    """Rows of `codes` for each input."""
    outputs: Fraction
    """Columns of `codes` for each output."""
    zero_outputs: Fraction
    """Columns of `zeros` for each output."""

    def divide(self, shard: Shard) -> list[Shard | None] | None:
        """The parts of codes, zero points and scales for a part of the weight (see `Divide`). None where the part does
        not begin and end with whole words and groups."""
        width, (groups, out) = int(self.codes.shape[0] / self.inputs), self.scales.shape
        tensors = (self.codes, self.zeros, self.scales)
        if shard.whole != (out, width) or any(tensor.read_shard is None for tensor in tensors):
            return None
        if shard.dim == 0:
            dim, factors = 1, (self.outputs, self.zero_outputs, Fraction(1))
        else:
            of_groups = Fraction(groups, width)
            dim, factors = 0, (self.inputs, of_groups, of_groups)
        found: list[Shard | None] = []
        for tensor, factor in zip(tensors, factors, strict=True):
            edges = [(begin * factor, end * factor) for begin, end in shard.ranges]
            if shard.dim == 1 and groups == 1 and tensor is not self.codes:
                edges = [(Fraction(0), Fraction(1))]
            if any(edge.denominator != 1 for pair in edges for edge in pair):
                return None
            found.append(Shard(tensor.shape, dim, tuple((int(begin), int(end)) for begin, end in edges)))
        return found


def plain_source(tensor: StoredTensor) -> Source:
    def divide(shard: Shard) -> list[Shard | None] | None:
        return [shard] if shard.whole == tensor.shape and tensor.read_shard is not None else None

    return Source(tensor.name, (tensor,), lambda value: value, tensor.num_bytes, divide, is_plain=True)


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
