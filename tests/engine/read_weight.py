"""A call in one file: request, reply and handler. It reads a weight by its Hugging Face name."""

from __future__ import annotations

import msgspec

from fastserve.engine.calls.handling import CallContext, CallHandler
from fastserve.engine.contract import Call
from fastserve.errors import InvalidRequestError


class WeightValues(msgspec.Struct, frozen=True):
    shape: tuple[int, ...]
    values: list[float]
    """The first ones."""


class ReadWeight(Call[WeightValues], frozen=True):
    name: str
    max_values: int = 10


def _read(call: ReadWeight, context: CallContext) -> WeightValues:
    if call.name not in context.weights.names():
        raise InvalidRequestError(f"The model has no weight {call.name!r}.", param="name")
    weight = context.weights.get(call.name)
    return WeightValues(tuple(weight.shape), weight.flatten()[: call.max_values].float().tolist())


HANDLERS = (CallHandler(ReadWeight, _read),)
