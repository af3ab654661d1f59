"""The names of weights: in an adapter, in the checkpoint of its base model, and in the model."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


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
