"""Maps the weights of a checkpoint to those of a model.

Checkpoints may use other names than the model (another prefix, older names) and other shapes (one tensor for each
expert, where the model has one for all). transformers has conversion rules for its architectures; they are applied here
while weights are read, so that only the inputs of one rule are in memory twice.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from transformers.pytorch_utils import Conv1D

from fastserve.engine.loading.formats.source import (
    QuantizedExperts,
    QuantizedTensor,
    Source,
    Value,
    WeightValue,
    join_outputs,
    require_shape,
)
from fastserve.engine.loading.sharding import Shard
from fastserve.engine.loading.tensor_shards import take
from fastserve.errors import StartupError

_STACKED: list[tuple[type, Any]] = [(MergeModulelist, 0)]
_STACKED_AND_JOINED: list[tuple[type, Any]] = [(MergeModulelist, 0), (Concatenate, 1)]
"""Operations of rules that make one tensor of all experts' weights, each perhaps of two with the same inputs."""
_GRANITE = "block_sparse_moe.experts"
_OWN_RULES = (
    ([f"{_GRANITE}.*.gate_proj.weight", f"{_GRANITE}.*.up_proj.weight"], "gate_up_proj", _STACKED_AND_JOINED),
    ([f"{_GRANITE}.*.down_proj.weight"], "down_proj", _STACKED),
)
"""For checkpoints with a tensor for each expert of models whose published ones have one for all."""


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
    transposed: bool = False
    """Whether the model has the weight as (in, out); quantized sources are (out, in)."""
    shards: Mapping[str, Shard] = field(default_factory=dict)
    """The part that this rank keeps, by name, of weights that are divided over ranks."""

    def divide(self, shards: Mapping[str, Shard]) -> None:
        """Load only this rank's part of each weight, after changes are known. Sources of other ranks' experts are
        dropped. Raises StartupError when the experts are not those of config.json."""
        self.shards = shards
        shard = shards.get(self.target)
        gives_out_sources = shard is not None and shard.dim == 0 and self.rule is not None and self.change is None
        if shard is None or not gives_out_sources or self._steps not in (_STACKED, _STACKED_AND_JOINED):
            return
        for pattern, count in Counter(self.patterns).items():
            if count != shard.whole[0]:
                raise StartupError(
                    f"{self.location}: {self.target} is of {shard.whole[0]} experts by config.json, and {count} "
                    f"tensors named {pattern} are in the checkpoint."
                )
        own = {expert for begin, end in shard.ranges for expert in range(begin, end)}
        seen: Counter[str] = Counter()
        kept = []
        for source, pattern in zip(self.sources, self.patterns, strict=True):
            if seen[pattern] in own:
                kept.append((source, pattern))
            seen[pattern] += 1
        self.sources, self.patterns = [source for source, _ in kept], [pattern for _, pattern in kept]
        self.shards = {name: other for name, other in shards.items() if name != self.target}

    @property
    def num_bytes(self) -> int:
        shard = self.shards.get(self.target)
        return int(sum(source.num_bytes for source in self.sources) * (1.0 if shard is None else shard.share))

    @property
    def location(self) -> str:
        return ", ".join(dict.fromkeys(source.location for source in self.sources))

    def load(self) -> list[Value]:
        """Read all sources, and only the rank's part of them where that is possible. Raises StartupError that names
        tensor and file."""
        return [source.load(shard) for source, shard in zip(self.sources, self._source_shards(), strict=True)]

    def finish(self, values: list[Value], model: PreTrainedModel, dtype: torch.dtype) -> Mapping[str, WeightValue]:
        """The model's weights by name, or the rank's parts of them."""
        made = self._make(values, model, dtype)
        if self.change is None:
            return made
        changed = {name: self.change(name, value) for name, value in made.items()}
        return {name: self._part(name, value) for name, value in changed.items()}

    def _make(self, values: list[Value], model: PreTrainedModel, dtype: torch.dtype) -> Mapping[str, WeightValue]:
        """The weights before they are changed: whole if there is a change, which needs all of a weight."""
        shards = self._source_shards()
        self._keep_shards(values, shards, dtype)
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
        whole = {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}
        if any(shards) or self.change is not None:
            return whole  # made of parts, or needed whole
        return {name: self._part(name, value) for name, value in whole.items()}

    def _part(self, name: str, whole: Any) -> Any:
        shard = self.shards.get(name)
        return whole if shard is None else take(shard, whole)

    def _source_shards(self) -> list[Shard | None]:
        """The part of each source that makes up the rank's part of the weight; None for all of it."""
        shard = None if self.change is not None else self.shards.get(self.target)
        if shard is not None and self.transposed and not self.sources[0].is_plain:
            shard = shard.transposed()
        if shard is None or self.rule is None:
            return [shard] * len(self.sources)
        if shard.dim == 0 or self._steps not in (_STACKED, _STACKED_AND_JOINED):
            return [None] * len(self.sources)
        pieces = [pattern for pattern in self.rule.source_patterns if pattern in self.patterns]
        found = shard.without_first_dim()
        if self._steps == _STACKED:
            return [found] * len(self.sources)
        return [found.piece(0, pieces.index(pattern), len(pieces)) for pattern in self.patterns]

    def _keep_shards(self, values: list[Value], shards: Sequence[Shard | None], dtype: torch.dtype) -> None:
        """Reduce values of sources that were read whole to the rank's parts."""
        for index, (source, shard) in enumerate(zip(self.sources, shards, strict=True)):
            if shard is None or source.divide(shard) is not None:
                continue
            value = values[index]
            if isinstance(value, torch.Tensor) and self.transposed and not source.is_plain:
                shard = shard.transposed()
            require_shape(source, shard.whole, value.shape)
            if isinstance(value, torch.Tensor):
                values[index] = take(shard, value).clone(memory_format=torch.contiguous_format)
            else:
                part: Any = value.part(shard, dtype)
                dequantized = isinstance(part, torch.Tensor)
                values[index] = part.t().contiguous() if dequantized and self.transposed else part

    @property
    def _steps(self) -> list[tuple[type, Any]]:
        return steps_of(self.rule)

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
        if self._steps not in (_STACKED, _STACKED_AND_JOINED):
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


class Conversion:
    """Which weight of a model each name of its checkpoints belongs to. Made before layers are replaced."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        rules = [
            *get_model_conversion_mapping(model),
            *(
                WeightConverter(patterns, f"{_GRANITE}.{target}", [kind(dim=dim) for kind, dim in steps])
                for patterns, target, steps in _OWN_RULES
            ),
        ]
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._by_pattern = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        # transformers asks which names have a value. Tensors would keep the memory of weights that are replaced.
        self._state = dict.fromkeys(model.state_dict(), True)
        self._transposed = {f"{path}.weight" for path, module in model.named_modules() if type(module) is Conv1D}

    def match(self, sources: Iterable[Source]) -> tuple[list[WeightLoad], list[Source]]:
        """The weight loads in the order of the files, and the sources that match no weight of the model."""
        found: dict[str, WeightLoad] = {}
        unexpected = []
        for source in sources:
            target, pattern = self.find(source.name)
            if target is None:
                unexpected.append(source)
                continue
            if target in found and pattern is None:
                raise StartupError(
                    f"{source.location}: {source.name} and {found[target].sources[0].name} are both {target}."
                )
            weight_load = found.setdefault(target, WeightLoad(target, transposed=target in self._transposed))
            weight_load.sources.append(source)
            if pattern is not None:
                weight_load.rule = weight_load.rule or self.rule(pattern)
                weight_load.patterns.append(pattern)
        for weight_load in found.values():
            _sort_like_numbers(weight_load)
        return list(found.values()), unexpected

    def find(self, name: str) -> tuple[str | None, str | None]:
        """The model's weight (None: it has no such one), and the pattern of the rule that makes it of this source and
        others (None: they are the same)."""
        target, pattern = rename_source_key(
            name, self._renamings, self._converters, self._model.base_model_prefix, self._state
        )
        if target not in self._state and name in self._state:
            return name, None
        return (target, pattern) if target in self._state else (None, None)

    def rule(self, pattern: str) -> Any:
        """A fresh copy of the rule, to which sources can be given."""
        return copy.deepcopy(self._by_pattern[pattern])

    def place_in_stack(self, name: str, pattern: str) -> tuple[int, int, int] | None:
        """The place of a source of experts' joined weights: its expert, its index among the weights that are
        concatenated along the outputs of each expert, and their number. None for rules that do something else."""
        rule = self._by_pattern[pattern]
        if not stacks_experts(rule) or "*" not in pattern:
            return None
        found = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
        if found is None:
            return None
        joined = list(rule.source_patterns) if steps_of(rule) == _STACKED_AND_JOINED else [pattern]
        return int(found[1]), joined.index(pattern), len(joined)


def stacks_experts(rule: WeightConverter) -> bool:
    """Whether a rule makes one tensor of all experts' weights, each perhaps of several one after the other."""
    return steps_of(rule) in (_STACKED, _STACKED_AND_JOINED)


def steps_of(rule: Any) -> list[tuple[type, Any]]:
    return [(type(step), getattr(step, "dim", None)) for step in rule.operations]


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
