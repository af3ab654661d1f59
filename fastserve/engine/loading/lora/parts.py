"""The tensors of an adapter's file, by the module that they belong to."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from fastserve.engine.loading.checkpoint import StoredTensor, open_file
from fastserve.engine.loading.lora.settings import MERGE_IT
from fastserve.errors import StartupError
from fastserve.observability.text import printable

_PREFIX = "base_model.model."
_LOW_RANK = re.compile(
    r"(?P<path>.+?)(?P<nesting>(?:\.base_layer)*)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|lora_diag)"
)
_ROWS = re.compile(r"(?P<path>.+?)(?:\.token_adapter)?\.trainable_tokens_delta")
_ONLY_TRAINING = re.compile(r".+\.(?:lora_velora_embed|lora_monteclora_sampler\..+)")
_WHOLE = re.compile(r"(?P<path>.+?)(?P<saved>\.modules_to_save)?(?:\.base_layer)?\.(?P<leaf>\w+)")
_ADAPTER_NAME = re.compile(r"(lora_\w+|modules_to_save|trainable_tokens_delta)\.default(?=\.|$)")
"""The adapter's name in files of old releases, which newer ones leave out."""


_MAX_NAME_CHARS = 500


@dataclass(slots=True)
class LowRankParts:
    """The tensors of one low-rank change."""

    path: str
    """The module, by the name in the file."""
    nesting: int
    """For a module with several changed parameters: 0 for the last of them, 1 for the one before, ..."""
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    @property
    def of_embedding(self) -> bool:
        return "lora_embedding_A" in self.tensors

    @property
    def a(self) -> StoredTensor:
        return self.tensors["lora_embedding_A" if self.of_embedding else "lora_A.weight"]

    @property
    def b(self) -> StoredTensor:
        return self.tensors["lora_embedding_B" if self.of_embedding else "lora_B.weight"]

    def get(self, part: str) -> StoredTensor | None:
        return self.tensors.get(part)


@dataclass(slots=True)
class AdapterParts:
    low_rank: list[LowRankParts]
    whole: dict[str, StoredTensor]
    """Weights that are replaced entirely, by name."""
    saved: set[str]
    """Names of those that the file marks as `modules_to_save`."""
    rows: dict[str, StoredTensor]
    """Rows of embeddings that are replaced, by module."""

    @property
    def paths(self) -> list[str]:
        """The modules with low-rank changes."""
        return [parts.path for parts in self.low_rank]


def read_parts(folder: Path) -> AdapterParts:
    """Raises StartupError that names file and tensor for one that is no part of a LoRA adapter."""
    low_rank: dict[tuple[str, int], LowRankParts] = {}
    found = AdapterParts([], {}, set(), {})
    file = _find_file(folder)
    for full_name, tensor in open_file(file).items():
        if len(full_name) > _MAX_NAME_CHARS or not full_name.isprintable():
            raise StartupError(
                f"{tensor.file} has a tensor of the name {printable(full_name)}, which is too long or has characters "
                "that cannot be printed. Save the adapter again."
            )
        name = _ADAPTER_NAME.sub(r"\1", full_name.removeprefix(_PREFIX)).replace("vector.weight", "vector")
        if (match := _LOW_RANK.fullmatch(name)) is not None:
            key = (match["path"], match["nesting"].count("base_layer"))
            low_rank.setdefault(key, LowRankParts(*key)).tensors[match["part"]] = tensor
        elif (match := _ROWS.fullmatch(name)) is not None:
            found.rows[match["path"]] = tensor
        elif _ONLY_TRAINING.fullmatch(name) is not None:
            continue
        elif (match := _WHOLE.fullmatch(name)) is not None and ".lora_" not in name:
            weight = f"{match['path']}.{match['leaf']}"
            found.whole[weight] = tensor
            if match["saved"]:
                found.saved.add(weight)
        else:
            raise StartupError(
                f"{tensor.file}: {full_name} is no part of a LoRA adapter that can be merged here. {MERGE_IT}"
            )
    found.low_rank = list(low_rank.values())
    if not (found.low_rank or found.whole or found.rows):
        raise StartupError(f"{file} holds no part of an adapter. Save the adapter again.")
    for parts in found.low_rank:
        _require_both(parts)
    return found


def _find_file(folder: Path) -> Path:
    files = [folder / f"adapter_model{suffix}" for suffix in (".safetensors", ".bin")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise StartupError(f"{folder} has an adapter_config.json, but no adapter_model.safetensors. Download it again.")
    return file


def _require_both(parts: LowRankParts) -> None:
    """Require both matrices, of one rank."""
    tensor = next(iter(parts.tensors.values()))
    a, b = ("lora_embedding_A", "lora_embedding_B") if parts.of_embedding else ("lora_A.weight", "lora_B.weight")
    if a not in parts.tensors and b not in parts.tensors:
        raise StartupError(
            f"{tensor.file}: {tensor.name} is no part of a LoRA adapter that can be merged here: there is no lora_A "
            f"beside it. {MERGE_IT}"
        )
    if a not in parts.tensors or b not in parts.tensors:
        raise StartupError(
            f"{tensor.file}: {parts.path} has only one of {a.removesuffix('.weight')} and {b.removesuffix('.weight')}. "
            "Save the adapter again."
        )
    for stored in parts.tensors.values():
        if not stored.dtype.is_floating_point:
            raise StartupError(
                f"{stored.file}: {stored.name} is of {str(stored.dtype).removeprefix('torch.')}, and an adapter "
                "has matrices of floating-point numbers. Save the adapter again."
            )
    if len(parts.a.shape) != 2 or len(parts.b.shape) != 2 or 0 in (*parts.a.shape, *parts.b.shape):
        raise StartupError(
            f"{tensor.file}: {parts.a.name} and {parts.b.name} have the shapes {parts.a.shape} and {parts.b.shape}, "
            "which are those of no matrices. Save the adapter again."
        )
