"""AWQ (Lin et al., 2023), as AutoAWQ and transformers write it (version "gemm").

A layer (out, in) has: `qweight` (in, out / 8) int32 and `qzeros` (groups, out / 8) int32, packed along the outputs
with the eight of a word interleaved; `scales` (groups, out).
"""

from __future__ import annotations

from fractions import Fraction

import torch

from fastserve.engine.loading.checkpoint import StoredTensor, Tensors
from fastserve.engine.loading.formats.source import (
    PackedParts,
    QuantizedTensor,
    Settings,
    Source,
    layers_of,
    plain_source,
    require_parts,
    source_of,
)
from fastserve.engine.settings import PackedCheckpoint
from fastserve.errors import StartupError

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, of eight, that the first, second, ... four bits of a word hold."""


def sources(tensors: Tensors, settings: Settings, stated: PackedCheckpoint) -> list[Source]:
    """`settings` uses bits (w_bit) and version; `stated`: the flags. Raises StartupError for unsupported settings, and
    when the shapes contradict the flags."""
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if version != "gemm":
        raise StartupError(
            f"AWQ checkpoints of version {version} are not served: version gemm is, which AutoAWQ writes by default."
        )
    bits = settings.get("bits", settings.get("w_bit"))
    if bits not in (None, 4):
        raise StartupError(
            f"AWQ with {bits} bits is not served: 4 bits are. Use such a checkpoint, or the unquantized one with "
            "--load-8bit."
        )
    layers, rest = layers_of(tensors, "qweight", ("qzeros", "scales"))
    if not layers:
        raise StartupError(
            "AWQ: no tensor of the checkpoint ends in .qweight, so nothing in it is packed that way; leave "
            "the awq flags out."
        )
    found = []
    for layer, parts in layers.items():
        require_parts(layer, parts, ("qzeros", "scales"))
        _check(layer, parts, stated)
        stored = (parts["qweight"], parts["qzeros"], parts["scales"])
        eighth = Fraction(1, 8)
        divide = PackedParts(*stored, inputs=Fraction(1), outputs=eighth, zero_outputs=eighth).divide
        found.append(source_of(f"{layer}.weight", stored, _make, divide))
    return found + [plain_source(tensor) for tensor in rest.values()]


def _check(layer: str, parts: dict[str, StoredTensor], stated: PackedCheckpoint) -> None:
    groups, out = parts["scales"].shape
    width = parts["qweight"].shape[0]
    file = parts["qweight"].file
    if parts["qweight"].shape[1] * 8 != out or parts["qzeros"].shape != (groups, out // 8):
        shapes = ", ".join(f"{name} {tensor.shape}" for name, tensor in parts.items())
        raise StartupError(f"{file}: the shapes of {layer} are not those of AWQ with 4 bits (gemm): {shapes}.")
    if stated.group_size is not None and -(-width // stated.group_size) != groups:
        raise StartupError(
            f"--awq-groupsize {stated.group_size}: {layer} in {file} has {groups} groups of {width} inputs; start with "
            f"--awq-groupsize {-1 if groups == 1 else -(-width // groups)}."
        )


def _make(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> QuantizedTensor:
    codes = _unpack(qweight).t().contiguous()
    group = -(-codes.shape[1] // scales.shape[0])
    return QuantizedTensor(codes, scales.t().contiguous(), _unpack(qzeros).t().contiguous(), 4, group)


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """(rows, out / 8) int32 -> (rows, out) uint8"""
    found = torch.empty(*words.shape, 8, dtype=torch.uint8)
    for index, output in enumerate(ORDER):
        found[..., output] = (words >> (4 * index)) & 15
    return found.flatten(1)
