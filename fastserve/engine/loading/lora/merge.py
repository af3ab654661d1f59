"""Merges an adapter into the weights of its base model, as PEFT's merge_and_unload does.

Changes are applied to the model's weights when they are made from those of the checkpoint, so names, joint experts and
orientations are the model's. Only what was trained on single experts is applied before they are joined.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastserve.engine.loading.checkpoint import StoredTensor
from fastserve.engine.loading.conversion import WeightLoad
from fastserve.engine.loading.formats.source import Source, Value, WeightValue, source_of
from fastserve.engine.loading.lora.changed_bases import WithoutMinor, WithoutOrthonormal, WithoutPrincipal
from fastserve.engine.loading.lora.low_rank import LowRank, LowRankBias, LowRankExperts
from fastserve.engine.loading.lora.names import Names, is_below, tied_groups
from fastserve.engine.loading.lora.parts import AdapterParts, LowRankParts, read_parts
from fastserve.engine.loading.lora.settings import MERGE_IT, AdapterSettings, read_settings
from fastserve.engine.loading.lora.whole import Rows, Whole
from fastserve.errors import StartupError

logger = logging.getLogger(__name__)


class Step(Protocol):
    """One change of one weight."""

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The changed weight, in float32 if it is computed; `weight` stays as it is. Raises StartupError."""
        ...


@dataclass(slots=True)
class WeightChange:
    """All changes of one weight, in the order in which PEFT makes them."""

    folder: Path
    whole: Whole | None = None
    bases: list[Step] = field(default_factory=list)
    """Changes from before the training; those of a weight that the adapter replaces are in the replacement."""
    merged: list[Step] = field(default_factory=list)

    def apply(self, name: str, value: WeightValue, dtype: torch.dtype) -> torch.Tensor:
        """Raises StartupError for quantized weights."""
        weight: WeightValue = value
        if self.whole is not None:
            weight = self.whole.stored.read()
        steps = [*([] if self.whole else self.bases), *self.merged]
        if not isinstance(weight, torch.Tensor):
            raise StartupError(
                f"The adapter in {self.folder} cannot be added to {name}, which is quantized; use the unquantized base "
                "model, with --load-8bit or --load-4bit where memory is short."
            )
        if not steps:
            return weight
        weight = weight.float()
        for step in steps:
            weight = step.apply(name, weight)
        return weight.to(dtype).contiguous()


def merge_adapter(model: PreTrainedModel, weight_loads: list[WeightLoad], folder: Path) -> list[WeightLoad]:
    """`weight_loads` with the adapter in `folder` merged into them. Unties weights of `model` of which the adapter
    replaces only one.

    Raises StartupError for an adapter that is not LoRA, or that cannot be merged as PEFT does it, or that has tensors
    without a place in the model.
    """
    settings = read_settings(folder / "adapter_config.json")
    plan = _Plan(model, weight_loads, folder, settings)
    parts = read_parts(folder)
    plan.untie(parts)
    plan.replace_weights(parts)
    plan.add_low_rank(parts)
    plan.replace_rows(parts)
    return plan.finish()


class _Plan:
    """Collects the changes by weight. Tied weights share theirs."""

    def __init__(
        self, model: PreTrainedModel, weight_loads: list[WeightLoad], folder: Path, settings: AdapterSettings
    ) -> None:
        self._model = model
        self._loads = list(weight_loads)
        self._folder = folder
        self._settings = settings
        self._names = Names(model)
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._groups = tied_groups(model)
        self._changes: dict[str, WeightChange] = {}
        """By the first name of each group of tied weights."""
        self._unmatched: list[str] = []
        self._low_rank_of: dict[str, LowRankParts] = {}
        """By the model's name of the changed weight."""

    # ---- whole weights ------------------------------------------------------------------------------------------

    def untie(self, parts: AdapterParts) -> None:
        """Untie the weights that the adapter replaces one by one, and those that differ in the checkpoint."""
        names = {self._names.find(name) or name: name for name in parts.whole}
        saved = {name for name, own in names.items() if own in parts.saved or self._is_saved(name)}
        self._require_saved(set(names), parts)
        alone = set() if self._settings.ensure_weight_tying else saved
        changed = {*names, *(self._names.find(f"{path}.weight") for path in (*parts.rows, *parts.paths))}
        for group in {id(group): group for group in self._groups.values() if len(group) > 1}.values():
            if not changed.intersection(group):
                continue
            loads = {load.target: load for load in self._loads if load.target in group}
            if len(loads) > 1 and not _are_equal(list(loads.values())):
                alone |= set(group)
            base = next(iter(loads.values()), None)
            left = [name for name in group if name not in alone]
            for name in [name for name in group if name in alone]:
                self._set_apart(name)
                if name not in loads and name in names:
                    stored = parts.whole[names[name]]
                    self._loads.append(WeightLoad(name, [source_of(name, [stored], lambda value: value)]))
            if base is not None and left and not loads.keys() & set(left):
                self._loads.append(WeightLoad(left[0], base.sources, base.rule, base.patterns))
        self._groups = tied_groups(self._model)

    def _set_apart(self, name: str) -> None:
        path, _, leaf = name.rpartition(".")
        parameters = self._modules[path]._parameters
        old = parameters[leaf]
        assert old is not None
        parameters[leaf] = torch.nn.Parameter(torch.empty_like(old), requires_grad=False)
        for config in (self._model.config, self._model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False
        logger.info("%s is not tied to other weights: it has a value of its own.", name)

    def _is_saved(self, name: str) -> bool:
        return any(is_below(name, saved) for saved in self._settings.modules_to_save or ())

    def _require_saved(self, found: set[str], parts: AdapterParts) -> None:
        """Require all weights of `modules_to_save` to be in the file."""
        with_rows = {
            other for path in parts.rows for other in self._groups.get(self._names.find(f"{path}.weight") or "", ())
        }
        for saved in self._settings.modules_to_save or ():
            missing = [name for name in self._names.state if is_below(name, saved) and name not in found]
            if with_rows.intersection(missing):
                raise StartupError(
                    f"The adapter in {self._folder} has modules_to_save ({saved}) and trainable_token_indices for the "
                    f"same weight, {missing[0]}. Train it with one of the two."
                )
            if missing:
                raise StartupError(
                    f"The adapter in {self._folder} lacks {missing[0]} ({len(missing)} such in all), which its "
                    f"modules_to_save ({saved}) names. Save the adapter again."
                )

    def replace_weights(self, parts: AdapterParts) -> None:
        for own_name, stored in parts.whole.items():
            name = self._names.find(own_name)
            if name is None:
                self._unmatched.append(own_name)
                continue
            shape = tuple(self._names.state[name].shape)
            if stored.shape != shape:
                raise StartupError(
                    f"{stored.file}: {stored.name} has the shape {stored.shape}, and {name} of the base model has "
                    f"{shape}: the adapter is of another model, or of one whose vocabulary was resized. {MERGE_IT}"
                )
            self._change(name).whole = Whole(stored)

    def replace_rows(self, parts: AdapterParts) -> None:
        if self._settings.trainable_token_indices and not parts.rows:
            raise StartupError(
                f"The adapter in {self._folder} has no rows of the tokens that its trainable_token_indices names. Save "
                "the adapter again."
            )
        for path, stored in parts.rows.items():
            name = self._names.find(f"{path}.weight")
            if name is None:
                self._unmatched.append(path)
                continue
            if any(not isinstance(step, Rows) for step in self._change(name).merged):
                raise StartupError(
                    f"The adapter in {self._folder} has rows for some tokens of {name} (trainable_token_indices) and a "
                    "low-rank change of it, or of the weight that it is tied to: PEFT's merge_and_unload loses the "
                    "latter. Train it with one of the two."
                )
            self._change(name).merged.append(Rows(stored, self._token_indices(path, stored)))

    def _token_indices(self, path: str, stored: StoredTensor) -> tuple[int, ...]:
        stated = self._settings.trainable_token_indices
        if isinstance(stated, dict):
            stated = next((indices for name, indices in stated.items() if path.endswith(name)), None)
        if stated is None:
            raise StartupError(
                f"{stored.file} has {stored.name}, and trainable_token_indices of its adapter_config.json does not say "
                "for which tokens. Save the adapter again."
            )
        return tuple(stated)

    # ---- low-rank changes ---------------------------------------------------------------------------------------

    def add_low_rank(self, parts: AdapterParts) -> None:
        # In the model's order, as PEFT does: several changes of tied weights are not always commutative.
        for low_rank in sorted(parts.low_rank, key=lambda one: self._place(f"{one.path}.weight")):
            self._add(low_rank)

    def _place(self, own_name: str) -> int:
        return self._names.places.get(self._names.find(own_name) or "", -1)

    def _add(self, parts: LowRankParts) -> None:
        parameters = self._names.targeted_parameters(parts.path, self._settings.target_parameters)
        if parameters and parts.nesting < len(parameters):
            self._add_to_parameter(parts, parameters[-1 - parts.nesting])
            return
        name = self._names.find(f"{parts.path}.weight") if parts.nesting == 0 else None
        if name is not None:
            self._report_tied(name)
            self._require_targeted(parts, name)
            self._add_to_module(parts, name)
        elif parts.nesting == 0 and self._add_to_expert(parts):
            self._require_targeted(parts, None)
        else:
            self._unmatched.append(f"{parts.path}.weight")

    def _require_first(self, parts: LowRankParts, name: str) -> None:
        other = self._low_rank_of.setdefault(name, parts)
        if other is not parts:
            raise StartupError(
                f"{parts.a.file}: {other.a.name} and {parts.a.name} both change {name}. Save the adapter again."
            )

    def _add_to_parameter(self, parts: LowRankParts, name: str) -> None:
        self._require_first(parts, name)
        shape = self._names.state[name].shape
        self._require_plain(parts, name)
        experts = shape[0] if len(shape) == 3 else 1
        own_name = f"{parts.path}.{name.rpartition('.')[2]}"
        rank = self._rank(parts, (own_name, name), experts)
        scale = self._settings.scale_of((own_name, name), rank)
        step: Step = LowRank(parts.a, parts.b, scale)
        if len(shape) == 3:
            is_transposed = bool(getattr(self._modules[name.rpartition(".")[0]], "is_transposed", False))
            step = LowRankExperts(parts.a, parts.b, scale, is_transposed)
        self._change(name).merged.append(step)

    def _require_plain(self, parts: LowRankParts, name: str) -> None:
        settings = self._settings
        variant = (
            "use_dora" if settings.use_dora else "lora_bias" if settings.lora_bias else "use_bdlora"
            if settings.use_bdlora is not None else "kasa_config" if settings.kasa_config is not None
            else "init_lora_weights" if settings.changed_base is not None else None
        )  # fmt: skip
        if variant is not None:
            raise StartupError(
                f"The adapter in {self._folder} has {variant}, which PEFT does not combine with target_parameters "
                f"({name}). Save the adapter again."
            )

    def _add_to_module(self, parts: LowRankParts, name: str) -> None:
        self._require_first(parts, name)
        path = name.removesuffix(".weight")
        rank = self._rank(parts, (parts.path, path))
        scale = self._settings.scale_of((parts.path, path), rank)
        is_transposed = parts.of_embedding or type(self._modules[path]) is Conv1D
        change = self._change(name)
        change.bases += self._base_changes(parts, rank, scale)
        change.merged.append(self._low_rank(parts, scale, is_transposed=is_transposed))
        bias = parts.get("lora_B.bias")
        if bias is not None:
            bias_name = f"{path}.bias"
            if bias_name not in self._names.state:
                raise StartupError(
                    f"{bias.file}: {bias.name} cannot be merged (lora_bias), since {path} of the base "
                    "model has no bias."
                )
            self._change(bias_name).merged.append(LowRankBias(bias, scale))

    def _low_rank(self, parts: LowRankParts, scale: float, *, is_transposed: bool) -> LowRank:
        settings = self._settings
        magnitude, diagonal = parts.get("lora_magnitude_vector"), parts.get("lora_diag")
        for field_name, is_set, part, tensor in (
            ("use_dora", settings.use_dora, "lora_magnitude_vector", magnitude),
            ("kasa_config", settings.kasa_config is not None, "lora_diag", diagonal),
            ("lora_bias", settings.lora_bias, "lora_B.bias", parts.get("lora_B.bias")),
        ):
            if is_set != (tensor is not None):
                has = "has a" if tensor is not None else "has no"
                raise StartupError(
                    f"{parts.a.file} {has} {part} for {parts.path}, and {field_name} of its adapter_config.json says "
                    "otherwise. Save the adapter again."
                )
        blocks = settings.use_bdlora
        blocks_of_a = blocks_of_b = 1
        if blocks is not None:
            in_a, in_b = (
                any(name in parts.path for name in names or ())
                for names in (blocks.target_modules_bd_a, blocks.target_modules_bd_b)
            )
            blocks_of_a, blocks_of_b = (blocks.nblocks if found else 1 for found in (in_a, in_b))
        return LowRank(parts.a, parts.b, scale, is_transposed, magnitude, diagonal, blocks_of_a, blocks_of_b)

    def _base_changes(self, parts: LowRankParts, rank: int, scale: float) -> list[Step]:
        """Those of linear layers; PEFT makes none in embeddings."""
        if parts.of_embedding:
            return []
        found: list[Step] = []
        if self._settings.changed_base == "pissa":
            found.append(WithoutPrincipal(rank))
        elif self._settings.changed_base == "olora":
            found.append(WithoutOrthonormal(rank, scale))
        if self._settings.kasa_config is not None:
            found.append(WithoutMinor(rank))
        return found

    def _rank(self, parts: LowRankParts, names: Iterable[str], experts: int = 1) -> int:
        """Raises StartupError if the file has another rank than adapter_config.json."""
        rank = self._settings.rank_of(names)
        if parts.a.shape[0] != rank * experts:
            raise StartupError(
                f"{parts.a.file}: {parts.a.name} has the shape {parts.a.shape}, and the rank is {rank} by its "
                "adapter_config.json (r, rank_pattern). Save the adapter again."
            )
        return rank

    def _require_targeted(self, parts: LowRankParts, name: str | None) -> None:
        paths = [parts.path] if name is None else [parts.path, name.removesuffix(".weight")]
        if any(self._settings.targets(path) for path in paths):
            return
        raise StartupError(
            f"{parts.a.file} has {parts.a.name}, and by its adapter_config.json the adapter is not for {parts.path} "
            "(target_modules, exclude_modules, modules_to_save, layers_to_transform). Save the adapter again."
        )

    def _report_tied(self, name: str) -> None:
        """PEFT merges into the shared tensor: the other one changes too. Raises StartupError where it does so twice."""
        group = self._groups.get(name, [name])
        if len(group) == 1:
            return
        others = " and ".join(other for other in group if other != name)
        if self._settings.ensure_weight_tying:
            raise StartupError(
                f"The adapter in {self._folder} changes {name}, which is tied to {others}, with ensure_weight_tying: "
                "PEFT's merge_and_unload adds this change twice, which is not what was trained. Train it with "
                "modules_to_save for these weights, or without ensure_weight_tying."
            )
        logger.warning(
            "The adapter in %s changes %s, which is tied: %s changes with it, as when PEFT merges it. If only one was "
            "to change, untie the base model (tie_word_embeddings) first.", self._folder, name, others,
        )  # fmt: skip

    # ---- single experts -----------------------------------------------------------------------------------------

    def _add_to_expert(self, parts: LowRankParts) -> bool:
        """Add the change of a linear layer that the checkpoint has, but that is part of a joint weight in the model.
        False if there is none."""
        place = self._sources.get(self._names.in_checkpoint(f"{parts.path}.weight"))
        if place is None:
            return False
        load, index = place
        rank = self._rank(parts, (parts.path,))
        scale = self._settings.scale_of((parts.path,), rank)
        change = WeightChange(self._folder, None, self._base_changes(parts, rank, scale))
        change.merged.append(self._low_rank(parts, scale, is_transposed=False))
        load.sources[index] = _changed_source(load.sources[index], change)
        return True

    @cached_property
    def _sources(self) -> dict[str, tuple[WeightLoad, int]]:
        """The sources that are joined to weights of the model, and their places."""
        return {
            self._names.in_checkpoint(source.name): (load, index)
            for load in self._loads
            if load.rule is not None
            for index, source in enumerate(load.sources)
        }

    # ---- result -------------------------------------------------------------------------------------------------

    def _change(self, name: str) -> WeightChange:
        return self._changes.setdefault(self._groups.get(name, [name])[0], WeightChange(self._folder))

    def finish(self) -> list[WeightLoad]:
        """Raises StartupError if a part of the adapter has no place in the model."""
        if self._unmatched:
            raise StartupError(
                f"The adapter in {self._folder} changes {self._unmatched[0]} ({len(self._unmatched)} such in all), "
                "which its base model does not have."
            )
        changes = {name: change for first, change in self._changes.items() for name in self._groups.get(first, [first])}
        dtypes = {name: self._names.state[name].dtype for name in changes}

        def change_weight(name: str, value: WeightValue) -> WeightValue:
            return changes[name].apply(name, value, dtypes[name]) if name in changes else value

        return [replace(load, change=change_weight) for load in self._loads]


def _changed_source(source: Source, change: WeightChange) -> Source:
    def make(*stored: torch.Tensor) -> Value:
        return change.apply(source.name, source.make(*stored), torch.float32)

    return Source(source.name, source.stored, make, source.num_bytes)


def _are_equal(loads: list[WeightLoad]) -> bool:
    """Whether the checkpoint has the same values for weights that config.json ties."""
    values = [load.load() for load in loads]
    tensors = [value for found in values for value in found if isinstance(value, torch.Tensor)]
    return len(tensors) == len(loads) and all(torch.equal(tensors[0], other) for other in tensors[1:])
