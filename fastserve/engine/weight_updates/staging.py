"""Weights of a checkpoint on their way into a model: their places, and a copy of the model's weights that takes them.

A tensor of a checkpoint is a whole weight of the model, a part of a stack of experts, or one of several sources of a
rule of transformers. The first two may come in any number: what does not come keeps its value. The sources of other
rules must come in one update.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastserve.engine.layers.layouts.layout import Memo
from fastserve.engine.loading.conversion import Conversion, WeightLoad
from fastserve.engine.loading.formats.source import Source
from fastserve.engine.loading.weight_table import WeightSlot, WeightTable
from fastserve.engine.weight_messages import TensorSpec
from fastserve.errors import FastserveError, InvalidRequestError
from fastserve.observability.text import printable

_SHOWN_CHARS = 120
_BYTE_FLOATS = {
    name: getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu") if hasattr(torch, name)
}
_DTYPES: dict[str, torch.dtype] = (
    _BYTE_FLOATS
    | {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16")}
    | {"int8": torch.int8, "uint8": torch.uint8, "bool": torch.bool, "half": torch.float16, "float": torch.float32}
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of a checkpoint goes."""

    target: str
    """The model's weight."""
    pattern: str | None = None
    """The rule that makes the weight of several tensors; None: the tensor is the weight."""
    stack: tuple[int, int, int] | None = None
    """See Conversion.place_in_stack."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """A tensor that is announced."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    place: Place
    num_bytes: int


class WeightNames:
    """Finds the places of tensors, by the names of checkpoints and of the model."""

    def __init__(
        self, table: WeightTable, conversion: Conversion | None, model: Any, *, is_divided: bool = False
    ) -> None:
        """`is_divided`: this is one of several ranks, which cannot read whole weights in a thread."""
        self._is_divided = is_divided
        self.table = table
        self.model = model
        self._conversion = conversion
        self._places: dict[str, Place | None] = {}

    def find(self, name: str) -> Place | None:
        """The place of a tensor; None if the model has none for it."""
        if name not in self._places:
            found = self._look_up(name)
            if found is None:  # names that callers make up are not kept
                return None
            self._places[name] = found
        return self._places[name]

    def _look_up(self, name: str) -> Place | None:
        if name in self.table:
            return Place(name)
        if self._conversion is None:
            return None
        target, pattern = self._conversion.find(name)
        if target is None or target not in self.table:
            return None
        stack = None if pattern is None else self._conversion.place_in_stack(name, pattern)
        return Place(target, pattern, stack)

    def check(self, tensors: Sequence[TensorSpec], *, converts: bool = False) -> list[Incoming]:
        """The places of announced tensors. `converts`: they may have any floating-point dtype. Raises
        InvalidRequestError that names the first one that has no place, or another shape or dtype than the model's."""
        found = [self._check(spec, converts=converts) for spec in tensors]
        names = {spec.name for spec in tensors}
        if len(names) != len(tensors):
            twice = next(spec.name for spec in tensors if [other.name for other in tensors].count(spec.name) > 1)
            raise InvalidRequestError(f"The weight {_shown(twice)} is named twice. Send each once.", param="names")
        self._check_rules(found)
        if self._is_divided:
            self._require_whole_stacks(found)
        return found

    def _require_whole_stacks(self, tensors: Iterable[Incoming]) -> None:
        stacks = [item.place for item in tensors if item.place.stack is not None]
        counts = Counter(place.target for place in stacks)
        parts = {place.target: place.stack[2] for place in stacks if place.stack is not None}
        partial = next((one for one in counts if counts[one] < self.table.shape(one)[0] * parts[one]), None)
        if partial is not None:
            raise InvalidRequestError(
                f"Only some of the experts of {partial} are there. Send all of a layer's in one update, because this "
                "model is divided over ranks.",
                param="names",
            )

    def _check(self, spec: TensorSpec, *, converts: bool) -> Incoming:
        place = self.find(spec.name)
        if place is None:
            raise InvalidRequestError(
                f"The model has no weight {_shown(spec.name)}. Send the names of its checkpoint, such as "
                f"{self.table.names()[0]}.",
                param="names",
            )
        dtype = _DTYPES.get(spec.dtype.removeprefix("torch."))
        if dtype is None:
            raise InvalidRequestError(
                f"{_shown(spec.name)}: there is no dtype {_shown(spec.dtype)}. Known are {', '.join(_DTYPES)}.",
                param="dtypes",
            )
        own = self.table.dtype(place.target)
        if dtype != own and not (converts and dtype.is_floating_point):
            raise InvalidRequestError(
                f"{_shown(spec.name)} is {_dtype_name(own)} in this engine, not {_dtype_name(dtype)}. Convert it "
                "before it is sent, or start the worker with another --dtype.",
                param="dtypes",
            )
        needed = self._shape(place)
        if needed is not None and spec.shape != needed:
            raise InvalidRequestError(
                f"{_shown(spec.name)} has the shape {needed} in this model, not {spec.shape}. Send the whole weight of "
                "a model with the same configuration.",
                param="shapes",
            )
        return Incoming(spec.name, dtype, spec.shape, place, math.prod(spec.shape) * dtype.itemsize)

    def _shape(self, place: Place) -> tuple[int, ...] | None:
        """None: it shows only once all sources of the rule are there."""
        whole = tuple(self.table.shape(place.target))
        if place.pattern is None:
            return whole
        if place.stack is None:
            return None
        expert, _, parts = place.stack
        if expert >= whole[0]:
            raise InvalidRequestError(
                f"{place.target} has {whole[0]} experts, and no expert {expert}: send those of this model.",
                param="names",
            )
        return (whole[1] // parts, *whole[2:])

    def _check_rules(self, tensors: Iterable[Incoming]) -> None:
        """Apply the rules to tensors without memory."""
        for target, sources in _by_rule(tensors).items():
            values = [torch.empty(item.shape, dtype=item.dtype, device="meta") for item in sources]
            for name, value in self.make(target, sources, values).items():
                if name not in self.table or value.shape != self.table.shape(name):
                    raise InvalidRequestError(
                        f"{_shown(sources[0].name)} and the others of its layer make {name} of shape "
                        f"{tuple(value.shape)}, which is not the model's. Send all of them in one update.",
                        param="names",
                    )

    def make(self, target: str, sources: Sequence[Incoming], values: Sequence[torch.Tensor]) -> Mapping[str, Any]:
        """The weights that a rule makes of its sources."""
        assert self._conversion is not None
        no_files = [Source(item.name, (), lambda: None, 0) for item in sources]
        loads, _ = self._conversion.match(no_files)
        [weight_load] = [load for load in loads if load.target == target]
        by_name = {item.name: value for item, value in zip(sources, values, strict=True)}
        ordered = [by_name[source.name] for source in weight_load.sources]
        return _finish(weight_load, ordered, self.model, self.table.dtype(target))


def _finish(weight_load: WeightLoad, values: list[Any], model: Any, dtype: torch.dtype) -> Mapping[str, Any]:
    try:
        return weight_load.finish(values, model, dtype)
    except FastserveError as error:
        raise InvalidRequestError(error.message, param="names") from error


def _by_rule(tensors: Iterable[Incoming]) -> dict[str, list[Incoming]]:
    found: dict[str, list[Incoming]] = defaultdict(list)
    for item in tensors:
        if item.place.pattern is not None and item.place.stack is None:
            found[item.place.target].append(item)
    return found


@dataclass(slots=True)
class _Pieces:
    """Sources of one weight that have arrived so far, of `num_expected`."""

    num_expected: int
    num_arrived: int = 0
    whole: torch.Tensor | None = None
    """The stack of experts that is being filled."""
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    """Sources of another rule."""


class StagedWeights:
    """New weights beside those that compute, until they take their place. One thread at a time may use it."""

    def __init__(self, names: WeightNames, memo: Memo) -> None:
        """`memo`: memory that copies may use."""
        self._names = names
        self._is_direct = False
        self._memo = memo
        self._copies: dict[WeightSlot, WeightSlot] = {}
        self._pieces: dict[str, _Pieces] = {}
        self.arrived: set[str] = set()
        """The model's weights that are there whole."""
        self.load_s = 0.0

    def write_directly(self) -> None:
        """Put in place what is here and, for want of memory, what is added from now on. No step may run until all has
        come."""
        self.commit()
        self._is_direct = True

    def expect(self, tensors: Sequence[Incoming]) -> None:
        """Called before the tensors of a transfer are added."""
        counts: dict[str, int] = defaultdict(int)
        for item in tensors:
            if item.place.pattern is not None:
                counts[item.place.target] += 1
        self._pieces = {target: _Pieces(count) for target, count in counts.items()}

    def add(self, item: Incoming, value: torch.Tensor) -> None:
        """Called without gradients. The memory of `value` may be written to afterwards."""
        begin = time.perf_counter()
        self._add(item, value)
        self.load_s += time.perf_counter() - begin

    def _add(self, item: Incoming, value: torch.Tensor) -> None:
        table, target = self._names.table, item.place.target
        if item.place.pattern is None:
            self._set(target, value)
            return
        pieces = self._pieces[target]
        pieces.num_arrived += 1
        is_last = pieces.num_arrived == pieces.num_expected
        if item.place.stack is None:
            pieces.values[item.name] = value.clone()
            if is_last:
                self._make(target, pieces)
            return
        expert, part, parts = item.place.stack
        shape = table.shape(target)
        is_complete = pieces.num_expected == shape[0] * parts
        if pieces.whole is None:
            dtype = table.dtype(target)
            pieces.whole = torch.empty(shape, dtype=dtype) if is_complete else self.get(target).to(dtype).clone()
        size = shape[1] // parts
        pieces.whole[expert, part * size : (part + 1) * size] = value
        if is_last:
            self._set(target, pieces.whole, is_complete=is_complete)
            pieces.whole = None

    def _make(self, target: str, pieces: _Pieces) -> None:
        sources = [
            Incoming(name, value.dtype, tuple(value.shape), Place(target), value.nbytes)
            for name, value in pieces.values.items()
        ]
        for name, weight in self._names.make(target, sources, list(pieces.values.values())).items():
            self._set(name, weight)
        pieces.values.clear()

    def _set(self, target: str, weight: torch.Tensor, *, is_complete: bool = True) -> None:
        table = self._names.table
        weight = weight.to(table.dtype(target))
        for slot in table.slots(target):
            self._copy(slot).set(weight)
        if is_complete:
            self.arrived.update(table.tied_names(target))

    def _copy(self, slot: WeightSlot) -> WeightSlot:
        if self._is_direct:
            return slot
        if slot not in self._copies:
            self._copies[slot] = slot.copied(self._memo)
        return self._copies[slot]

    def get(self, target: str) -> torch.Tensor:
        """The new weight or, where there is none, the one that computes."""
        slot = self._names.table.slots(target)[0]
        return self._copies.get(slot, slot).get()

    @property
    def is_complete(self) -> bool:
        return len(self.arrived) == len(self._names.table.names())

    def commit(self) -> Memo:
        """Put the new weights in place; return the memory of their copies. No step may be in flight."""
        with torch.no_grad():
            for slot, copied in self._copies.items():
                slot.take_over(copied)
        self._copies.clear()
        memo, self._memo = self._memo, {}
        return memo


def dtype_of(name: str) -> torch.dtype:
    """Raises KeyError."""
    return _DTYPES[name.removeprefix("torch.")]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(text: str) -> str:
    return printable(text, _SHOWN_CHARS)
