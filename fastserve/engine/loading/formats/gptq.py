"""GPTQ (Frantar et al., 2022), as AutoGPTQ, GPTQModel and transformers write it; also bare files of older tools.

A layer (out, in) has: `qweight` (in * bits / 32, out) int32, packed along the inputs; `qzeros` (groups, out * bits /
32) int32, packed along the outputs; `scales` (groups, out); `g_idx` (in,) int32, the group of each input. In format
"gptq" zero points are stored minus 1, in "gptq_v2" unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch

from fastserve.engine.loading.checkpoint import StoredTensor, Tensors
from fastserve.engine.loading.formats.source import (
    Divide,
    PackedParts,
    QuantizedTensor,
    Settings,
    Source,
    input_order_of,
    layers_of,
    plain_source,
    require_parts,
    source_of,
    unpack_bits,
)
from fastserve.engine.loading.sharding import Shard
from fastserve.engine.settings import PackedCheckpoint
from fastserve.errors import StartupError

BITS = (2, 3, 4, 8)
_ZERO_SHIFTS = {"gptq": 1, "gptq_v2": 0}


def sources(tensors: Tensors, settings: Settings, stated: PackedCheckpoint) -> list[Source]:
    """`settings` is used for the format only; all else follows from the shapes. `stated`: the flags. Raises
    StartupError for unsupported formats, and when the shapes contradict the flags."""
    layers, rest = layers_of(tensors, "qweight", ("qzeros", "scales", "g_idx"))
    if not layers:
        raise StartupError(
            "GPTQ: no tensor of the checkpoint ends in .qweight, so nothing in it is packed that way; leave "
            "the gptq flags out."
        )
    zero_shift = _zero_shift(settings)
    found = []
    for layer, parts in layers.items():
        require_parts(layer, parts, ("qzeros", "scales", *(["g_idx"] if stated.act_order else [])))
        bits = _bits(layer, parts, stated)
        keys = [key for key in ("qweight", "qzeros", "scales", "g_idx") if key in parts]
        stored = [parts[key] for key in keys]
        found.append(source_of(f"{layer}.weight", stored, _maker(bits, zero_shift), _divider(bits, *stored)))
    return found + [plain_source(tensor) for tensor in rest.values()]


def _zero_shift(settings: Settings) -> int:
    """Number to add to stored zero points. Newer tools write `format` instead of `checkpoint_format`."""
    name = str(settings.get("checkpoint_format") or settings.get("format") or "gptq")
    if name not in _ZERO_SHIFTS:
        raise StartupError(
            f"GPTQ checkpoints of the format {name} are not served: {' and '.join(_ZERO_SHIFTS)} are. Save it in one "
            "of them with the tool that made it."
        )
    return _ZERO_SHIFTS[name]


def _bits(layer: str, parts: dict[str, StoredTensor], stated: PackedCheckpoint) -> int:
    """Bits of a code, from the shapes, which cannot be wrong: qzeros (groups, out * bits / 32) and scales (groups,
    out)."""
    groups, out = parts["scales"].shape
    bits, rest = divmod(parts["qzeros"].shape[1] * 32, out)
    file = parts["qweight"].file
    if rest or bits not in BITS or parts["qzeros"].shape[0] != groups or parts["qweight"].shape[1] != out:
        shapes = ", ".join(f"{name} {tensor.shape}" for name, tensor in parts.items())
        raise StartupError(f"{file}: the shapes of {layer} are not those of GPTQ with 2, 3, 4 or 8 bits: {shapes}.")
    if stated.bits not in (None, bits):
        raise StartupError(
            f"--gptq-wbits {stated.bits}: {layer} in {file} is packed in {bits} bits; start with --gptq-wbits {bits}."
        )
    width = parts["qweight"].shape[0] * 32 // bits
    if stated.group_size is not None and -(-width // stated.group_size) != groups:
        raise StartupError(
            f"--gptq-groupsize {stated.group_size}: {layer} in {file} has {groups} groups of {width} inputs; "
            f"start with --gptq-groupsize {-1 if groups == 1 else -(-width // groups)}."
        )
    return bits


def _divider(
    bits: int, qweight: StoredTensor, qzeros: StoredTensor, scales: StoredTensor, g_idx: StoredTensor | None = None
) -> Divide:
    words = Fraction(bits, 32)
    parts = PackedParts(qweight, qzeros, scales, inputs=words, outputs=Fraction(1), zero_outputs=words)

    def divide(shard: Shard) -> list[Shard | None] | None:
        found = parts.divide(shard)
        if found is None or g_idx is None:
            return found
        if shard.dim == 0:
            return [*found, None]
        if input_order_of(g_idx.read().long(), -(-shard.whole[1] // scales.shape[0]), scales.shape[0]) is not None:
            return None  # groups are spread over all inputs
        return [*found, Shard(g_idx.shape, 0, shard.ranges)]

    return divide


def _maker(bits: int, zero_shift: int) -> Callable[..., QuantizedTensor]:
    def make(
        qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor | None = None
    ) -> QuantizedTensor:
        codes = unpack_bits(qweight, bits)
        width = codes.shape[0]
        zeros = (unpack_bits(qzeros.t(), bits).t().int() + zero_shift) & ((1 << bits) - 1)
        groups = scales.shape[0]
        group = -(-width // groups)
        # A part of the inputs may begin with a later group.
        order = None if g_idx is None else input_order_of(g_idx.long() - g_idx.min(), group, groups)
        if order is not None:
            codes = codes[order]
        return QuantizedTensor(
            codes.t().contiguous(), scales.t().contiguous(), zeros.t().contiguous(), max(bits, 4), group, order
        )

    return make
