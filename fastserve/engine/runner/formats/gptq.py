"""GPTQ (Frantar et al., 2022), as AutoGPTQ, GPTQModel and transformers write it; also bare files of older tools.

For a layer of (out, in): `qweight` (in * bits / 32, out) int32, packed along the inputs; `qzeros` (groups, out * bits / 32)
int32, packed along the outputs; `scales` (groups, out); `g_idx` (in,) int32, the group of each input. In format "gptq"
zero points are stored less 1, in "gptq_v2" as they are.
"""

from __future__ import annotations

import torch

from fastserve.engine.runner.checkpoint import StoredTensor, Tensors
from fastserve.engine.runner.formats.source import (
    Codes,
    Settings,
    Source,
    layers_of,
    plain_source,
    require_parts,
    source_of,
    unpack_bits,
)
from fastserve.errors import StartupError

BITS = (2, 3, 4, 8)


def sources(tensors: Tensors, settings: Settings) -> list[Source]:
    """`settings`: bits, group_size, checkpoint_format; a bit width or a group size of None is read off the shapes.
    Raises StartupError when tensors contradict them."""
    layers, rest = layers_of(tensors, "qweight", ("qzeros", "scales", "g_idx"))
    zero_shift = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    found = []
    for layer, parts in layers.items():
        require_parts(layer, parts, ("qzeros", "scales"))
        bits = _bits(layer, parts, settings)
        keys = [key for key in ("qweight", "qzeros", "scales", "g_idx") if key in parts]
        found.append(source_of(f"{layer}.weight", (parts[key] for key in keys), _maker(bits, zero_shift)))
    if not layers:
        raise StartupError("GPTQ: no tensor of the checkpoint ends in .qweight, so nothing in it is packed that way.")
    # Packers write a bias of zeros for layers that have none.
    return found + [plain_source(tensor) for tensor in rest.values()]


def _bits(layer: str, parts: dict[str, StoredTensor], settings: Settings) -> int:
    """From the shapes, which cannot be wrong: qzeros (groups, out * bits / 32) beside scales (groups, out)."""
    groups, out = parts["scales"].shape
    bits, rest = divmod(parts["qzeros"].shape[1] * 32, out)
    file = parts["qweight"].file
    if rest or bits not in BITS or parts["qzeros"].shape[0] != groups or parts["qweight"].shape[1] != out:
        shapes = ", ".join(f"{name} {tensor.shape}" for name, tensor in parts.items())
        raise StartupError(f"{file}: the shapes of {layer} are not those of GPTQ with 2, 3, 4 or 8 bits: {shapes}.")
    if settings.get("bits") not in (None, bits):
        raise StartupError(
            f"--gptq-wbits {settings['bits']}: {layer} in {file} is packed in {bits} bits; give --gptq-wbits {bits}."
        )
    width = parts["qweight"].shape[0] * 32 // bits
    stated = settings.get("group_size")
    group = width if stated in (-1, 0) else stated
    if group is not None and -(-width // group) != groups:
        actual = "a full row (-1)" if groups == 1 else str(-(-width // groups))
        raise StartupError(
            f"--gptq-groupsize {stated}: {layer} in {file} has {groups} groups of {width} inputs; give {actual}."
        )
    return bits


def _maker(bits: int, zero_shift: int):  # type: ignore[no-untyped-def]
    def make(
        qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor | None = None
    ) -> Codes:
        codes = unpack_bits(qweight, bits)
        width = codes.shape[0]
        zeros = (unpack_bits(qzeros.t(), bits).t().int() + zero_shift) & ((1 << bits) - 1)
        groups = scales.shape[0]
        group = -(-width // groups)
        order = None if g_idx is None else _input_order(g_idx.long(), group, groups)
        if order is not None:
            codes = codes[order]
        return Codes(
            codes.t().contiguous(), scales.t().contiguous(), zeros.t().contiguous(), max(bits, 4), group, order
        )

    return make


def _input_order(g_idx: torch.Tensor, group: int, groups: int) -> torch.Tensor | None:
    """The order of inputs in which each group's are neighbours; None when they are already."""
    if torch.equal(g_idx, torch.arange(len(g_idx)) // group):
        return None
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[order], torch.arange(len(g_idx)) // group):
        counts = torch.bincount(g_idx.clamp_min(0), minlength=groups).tolist()
        raise ValueError(f"g_idx puts {min(counts)} to {max(counts)} inputs in a group, not {group} in each")
    return order
