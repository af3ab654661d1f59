"""The model of a request that names none."""

from __future__ import annotations

from fastserve.errors import InvalidRequestError, NoWorkerError
from fastserve.gateway.dispatch import Dispatcher
from fastserve.observability.text import printable

_MAX_SHOWN_CHARS = 1000


def only_base(dispatcher: Dispatcher, remedy: str) -> str:
    """The base model, if only one is served. `remedy`: for the error where there are several."""
    bases = dispatcher.base_models()
    if not bases:
        raise NoWorkerError("No worker is known now. Try again in a moment.")
    if len(bases) > 1:
        served = printable(", ".join(bases), _MAX_SHOWN_CHARS)
        raise InvalidRequestError(f"Several models are served: {served}. {remedy}", param="model")
    return bases[0]
