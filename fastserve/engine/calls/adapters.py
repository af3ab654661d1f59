"""Load, unload and list adapters while the engine serves."""

from __future__ import annotations

from concurrent.futures import Future

from fastserve.engine.calls.handling import CallContext, CallHandler
from fastserve.engine.contract import AdapterInfo, AdapterList, Call


class LoadAdapter(Call[AdapterInfo], frozen=True):
    """Read an adapter from its folder and serve it. The reply comes once its weights are in host memory.

    Raises ConflictError when the name is taken, InvalidRequestError when the folder cannot be served.
    """

    name: str
    path: str
    """A folder with adapter_config.json and the adapter's weights, on the engine's machine."""
    replace: bool = False
    """Replace an adapter of this name: new requests get the new one, running ones end with the old one."""


class UnloadAdapter(Call[AdapterInfo], frozen=True):
    """Stop serving an adapter. The reply comes when its last request is done; new requests for it fail at once.

    Raises ModelNotFoundError for an unknown name.
    """

    name: str


class ListAdapters(Call[AdapterList], frozen=True):
    pass


def _load(call: LoadAdapter, context: CallContext) -> Future[AdapterInfo]:
    return context.adapters.load(call.name, call.path, replace=call.replace)


def _unload(call: UnloadAdapter, context: CallContext) -> Future[AdapterInfo]:
    return context.adapters.unload(call.name)


def _list(call: ListAdapters, context: CallContext) -> AdapterList:
    return AdapterList(context.adapters.infos())


HANDLERS = (
    CallHandler[LoadAdapter, AdapterInfo](LoadAdapter, _load),
    CallHandler[UnloadAdapter, AdapterInfo](UnloadAdapter, _unload),
    CallHandler(ListAdapters, _list),
)
