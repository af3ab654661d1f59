"""Maps the weights of a checkpoint to those of a model.

Checkpoints may use other names than the model (another prefix, older names) and other shapes (one tensor for each
expert, where the model has one for all). transformers has conversion rules for its architectures; they are applied here
while weights are read, so that only the inputs of one rule are in memory twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from fastserve.engine.loading.formats.source import (
    QuantizedExperts,
    QuantizedTensor,
    Source,
    Value,
    WeightValue,
    join_outputs,
)
from fastserve.errors import StartupError


@dataclass(slots=True)
class WeightLoad:
    """The sources of one weight of the model, or of those that one rule makes together."""

    target: str
    """Name of the model's weight, or of the first that the rule makes."""
    sources: list[Source] = field(default_factory=list)
    rule: Any = None
    """transformers' WeightConverter; None if the single source is the weight."""
    patterns: list[str] = field(default_factory=list)
    """For each source, the pattern of the rule that it matched."""
    change: Callable[[str, WeightValue], WeightValue] | None = None
    """Changes each weight (by its name) after it is made, as an adapter does."""

    @property
    def num_bytes(self) -> int:
        return sum(source.num_bytes for source in self.sources)

    @property
    def location(self) -> str:
        return ", ".join(dict.fromkeys(source.location for source in self.sources))

    def load(self) -> list[Value]:
        """Read all sources. Raises StartupError that names tensor and file."""
        return [source.load() for source in self.sources]

    def finish(self, values: list[Value], model: PreTrainedModel, dtype: torch.dtype) -> Mapping[str, WeightValue]:
        """The model's weights by name."""
        made = self._make(values, model, dtype)
        return made if self.change is None else {name: self.change(name, value) for name, value in made.items()}

    def _make(self, values: list[Value], model: PreTrainedModel, dtype: torch.dtype) -> Mapping[str, WeightValue]:
        if self.rule is None:
            return {self.target: values[0]}
        self._require_like_shapes(values)
        if (experts := self._join_codes(values)) is not None:
            values.clear()
            return {self.target: experts}
        for source, pattern, value in zip(self.sources, self.patterns, values, strict=True):
            tensor = value if isinstance(value, torch.Tensor) else value.dense(dtype)
            self.rule.add_tensor(self.target, source.name, pattern, _constant(tensor.to(dtype)))
        values.clear()
        try:
            made: dict[str, Any] = self.rule.convert(self.target, model=model, config=model.config)
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
            names = f"{self.sources[0].name} to {self.sources[-1].name}"
            raise StartupError(f"{self.location}: {names} cannot be joined to {self.target}: {error}.") from error
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

    def _require_like_shapes(self, values: list[Value]) -> None:
        """Require one shape for all sources that match the same pattern."""
        first: dict[str, tuple[str, tuple[int, ...]]] = {}
        for source, pattern, value in zip(self.sources, self.patterns, values, strict=True):
            shape = tuple(value.shape)
            name, expected = first.setdefault(pattern, (source.name, shape))
            if shape != expected:
                raise StartupError(
                    f"{source.location}: {source.name} has the shape {shape}, and {name} has {expected}."
                )

    def _join_codes(self, values: list[Value]) -> QuantizedExperts | None:
        """Keep experts quantized if the rule only stacks them and concatenates each expert's outputs; None if the rule
        does something else."""
        steps = [(type(step), getattr(step, "dim", None)) for step in self.rule.operations]
        if steps not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
            return None
        codes = [value for value in values if isinstance(value, QuantizedTensor)]
        if len(codes) != len(values) or len(self.rule.target_patterns) != 1:
            return None
        patterns = [pattern for pattern in self.rule.source_patterns if pattern in self.patterns]
        columns = [[value for value, of in zip(codes, self.patterns, strict=True) if of == one] for one in patterns]
        if len({len(column) for column in columns}) != 1:
            return None
        joined = [join_outputs(parts) for parts in zip(*columns, strict=True)]
        experts = tuple(one for one in joined if one is not None)
        return QuantizedExperts(experts) if len(experts) == len(joined) else None


def match(model: PreTrainedModel, sources: Iterable[Source]) -> tuple[list[WeightLoad], list[Source]]:
    """The weight loads in the order of the files, and the sources that match no weight of the model."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    found: dict[str, WeightLoad] = {}
    unexpected = []
    for source in sources:
        target, pattern = rename_source_key(source.name, renamings, converters, prefix, state)
        if target not in state and source.name in state:
            target, pattern = source.name, None
        if target not in state:
            unexpected.append(source)
            continue
        if target in found and pattern is None:
            raise StartupError(
                f"{source.location}: {source.name} and {found[target].sources[0].name} are both {target}."
            )
        weight_load = found.setdefault(target, WeightLoad(target))
        weight_load.sources.append(source)
        if pattern is not None:
            weight_load.rule = weight_load.rule or copy.deepcopy(by_pattern[pattern])
            weight_load.patterns.append(pattern)
    for weight_load in found.values():
        _sort_like_numbers(weight_load)
    return list(found.values()), unexpected


def _sort_like_numbers(weight_load: WeightLoad) -> None:
    """Order the sources of a rule by the numbers in their names (expert 2 before 10), as the rule stacks them in
    order."""
    if weight_load.rule is not None:
        pairs = sorted(
            zip(weight_load.sources, weight_load.patterns, strict=True), key=lambda pair: _natural(pair[0].name)
        )
        weight_load.sources, weight_load.patterns = [list(column) for column in zip(*pairs, strict=True)]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in name.split(".")]


def _constant(tensor: torch.Tensor) -> Any:
    return lambda: tensor
