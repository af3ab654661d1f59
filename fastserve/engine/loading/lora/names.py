"""The names of weights: in an adapter, in the checkpoint of its base model, and in the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from fastserve.engine.loading.conversion import stacks_experts


@dataclass(frozen=True, slots=True)
class ExpertName:
    """A linear layer of one expert."""

    weight: str
    """The model's weight of all experts."""
    expert: int
    part: int
    """Which of the `num_parts` parts of an expert's weight it is."""
    num_parts: int


class Names:
    """Finds weights of the model by the names that an adapter has for them: those of the model, or older ones."""

    def __init__(self, model: PreTrainedModel) -> None:
        rules = get_model_conversion_mapping(model)
        self.state = model.state_dict()
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._prefix = model.base_model_prefix
        self.places = {name: place for place, name in enumerate(self.state)}
        """Index of each weight in the model's order."""
        self._found: dict[str, str | None] = {}

    def find(self, name: str) -> str | None:
        """The model's name of a weight, None if it has none of its own."""
        if name in self.state:
            return name
        if name not in self._found:
            found, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self.state)
            self._found[name] = found if found in self.state and pattern is None else None
        return self._found[name]

    def find_expert(self, path: str) -> ExpertName | None:
        """The place of a linear layer that the checkpoint has, but that is a part of a joint weight in the model."""
        name = f"{path}.weight"
        weight, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self.state)
        rule = next((rule for rule in self._converters if pattern in rule.source_patterns), None)
        if rule is None or weight not in self.state or not stacks_experts(rule):
            return None
        found = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), self.in_checkpoint(name))
        if found is None or found.re.groups != 1:
            return None
        return ExpertName(weight, int(found[1]), rule.source_patterns.index(pattern), len(rule.source_patterns))

    def targeted_parameters(self, path: str, targets: Sequence[str] | None) -> list[str]:
        """The parameters of a module that `target_parameters` names, in the model's order: PEFT wraps the module once
        for each, the first one innermost."""
        leaves = {target.rpartition(".")[2] for target in targets or ()}
        found = {name for leaf in leaves if (name := self.find(f"{path}.{leaf}")) is not None}
        matched = {
            name
            for name in found
            for key in (name, f"{path}.{name.rpartition('.')[2]}")
            if any(key == target or key.endswith(f".{target}") for target in targets or ())
        }
        return sorted(matched, key=self.places.__getitem__)

    def in_checkpoint(self, name: str) -> str:
        """A single name for all spellings of a weight that is only a part of one of the model's."""
        renamed: str = rename_source_key(name, self._renamings, [], self._prefix, self.state)[0]
        return renamed.removeprefix(f"{self._prefix}.")


def is_below(name: str, module: str) -> bool:
    """Whether a weight is in a module of `modules_to_save`, which PEFT finds by the ends of names."""
    parts = name.split(".")
    return any(".".join(parts[:end]).endswith(module) for end in range(1, len(parts)))


def tied_groups(model: PreTrainedModel) -> dict[str, list[str]]:
    """For each parameter, all names of it, in the model's order."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: group for group in groups.values() for name in group}
