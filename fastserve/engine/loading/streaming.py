"""Brings the weights of a checkpoint into a model while they are read.

Several threads take the weights in the order of the files: each reads one, and packs or quantizes it. What is very
large, or goes to another device, they only read, and one thread puts it in its place. No more is on its way than
`_AHEAD_BYTES`, or two weights where these are larger.
"""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from transformers import PreTrainedModel

from fastserve.engine.huge_pages import close_mappings
from fastserve.engine.kernels.build import work_alone, work_is_shared
from fastserve.engine.loading.assembly import Assembly
from fastserve.engine.loading.checkpoint import page_pool
from fastserve.engine.loading.conversion import WeightLoad
from fastserve.engine.loading.formats.source import Source, Value
from fastserve.engine.memory import return_freed_memory
from fastserve.errors import StartupError

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""what is going on, bytes done, bytes in all"""

_AHEAD_BYTES = 32 << 20
_THREADS = max(2, min(16, os.cpu_count() or 1))
_WHAT = "Loading weights"
_KEPT_NAMES = 3
"""How many names an error lists."""


def stream_weights(
    model: PreTrainedModel,
    deliveries: Sequence[WeightLoad],
    unexpected: Sequence[Source],
    assembly: Assembly,
    progress: Progress,
) -> None:
    """Give `assembly` all weights. Raises StartupError that names tensor and file when one cannot be read, has another
    shape than the model's, or is missing."""
    total = sum(delivery.num_bytes for delivery in deliveries)
    done = returned = 0
    progress(_WHAT, 0, total)
    with work_is_shared():
        for delivery in _take_in(deliveries, model, assembly):
            done += delivery.num_bytes
            if done - returned > _AHEAD_BYTES:
                return_freed_memory()  # what dequantizing and quantizing took on the way
                returned = done
            progress(_WHAT, done, total)
    _require_all(model, assembly, deliveries, unexpected)
    _look_at_unexpected(model, unexpected)


def _add(delivery: WeightLoad, values: list[Value], model: PreTrainedModel, assembly: Assembly) -> None:
    for name, value in delivery.finish(values, model, assembly.dtype_of(delivery.target)).items():
        try:
            assembly.add(name, value)
        except ValueError as error:
            raise StartupError(f"{delivery.place}: {error}.") from error


def _take_in(deliveries: Sequence[WeightLoad], model: PreTrainedModel, assembly: Assembly) -> Iterator[WeightLoad]:
    """Yields what is in its place."""

    def take(delivery: WeightLoad) -> list[Value] | None:
        values = delivery.load()
        if not assembly.packs_weights or delivery.num_bytes > _AHEAD_BYTES:
            return values
        _add(delivery, values, model, assembly)
        return None

    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="weights", initializer=work_alone)
    waiting: deque[tuple[WeightLoad, Future[list[Value] | None]]] = deque()
    coming = iter(deliveries)
    upcoming = next(coming, None)
    ahead = 0
    try:
        while waiting or upcoming is not None:
            while upcoming is not None and (len(waiting) < 2 or ahead + upcoming.num_bytes <= _AHEAD_BYTES):
                waiting.append((upcoming, pool.submit(take, upcoming)))
                ahead += upcoming.num_bytes
                upcoming = next(coming, None)
            delivery, future = waiting.popleft()
            values = future.result()
            del future  # it holds the values too
            if values is not None:
                _add(delivery, values, model, assembly)
                del values
            yield delivery
            ahead -= delivery.num_bytes
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        page_pool.clear()
        close_mappings()


def _require_all(
    model: PreTrainedModel, assembly: Assembly, deliveries: Sequence[WeightLoad], unexpected: Sequence[Source]
) -> None:
    missing = assembly.missing
    if not missing:
        return
    files = sorted({str(tensor.file) for delivery in deliveries for item in delivery.sources for tensor in item.stored})
    where = files[0] if len(files) == 1 else f"the {len(files)} files of {os.path.dirname(files[0])}" if files else "it"
    others = f" It has {_names(item.name for item in unexpected)}, for which there is no place." if unexpected else ""
    raise StartupError(
        f"The checkpoint is not complete for {type(model).__name__} by its config.json: in {where} there is no "
        f"{_names(missing)}.{others}"
    )


def _look_at_unexpected(model: PreTrainedModel, unexpected: Sequence[Source]) -> None:
    """Some are known to be of no use; others are told. A bias that the model does not have must be zero: that is what
    packers write for layers that have none."""
    known = [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$", r"\.attn\.(masked_)?bias$"]
    known += list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in known))
    told = [source for source in unexpected if not ignored.search(source.name)]
    for source in [source for source in told if source.name.endswith(".bias")]:
        value = source.load()
        bias = value if isinstance(value, torch.Tensor) else value.dense(torch.float32)
        if bool((bias != 0).any()):
            raise StartupError(
                f"{source.place}: {source.name} is not zero, and {type(model).__name__} has no such bias by "
                "config.json."
            )
        told.remove(source)
    if told:
        logger.warning(
            "%s: %s has no place for %s", told[0].place, type(model).__name__, _names(source.name for source in told)
        )


def _names(names: Iterable[str]) -> str:
    found = list(names)
    more = len(found) - _KEPT_NAMES
    return ", ".join(found[:_KEPT_NAMES]) + (f" (and {more} more)" if more > 0 else "")
