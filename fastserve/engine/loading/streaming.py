"""Loads the weights of a checkpoint into a model, in parallel and with bounded memory.

Several threads take the weights in the order of the files; each reads one, and packs or quantizes it. Weights that are
very large, go to another device, or need an exchange between ranks are only read by them, and added by the main
thread, in the order of the files. At most `_MAX_AHEAD_BYTES`, or two weights if these are larger, are in flight.
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
from fastserve.engine.loading.checkpoint import buffer_pool
from fastserve.engine.loading.conversion import WeightLoad
from fastserve.engine.loading.formats.source import Source, Value
from fastserve.engine.memory import return_freed_memory
from fastserve.errors import StartupError

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""(stage, bytes done, total bytes)"""

_MAX_AHEAD_BYTES = 32 << 20
_THREADS = max(2, min(16, os.cpu_count() or 1))
_STAGE = "Loading weights"
_MAX_NAMES = 3
"""Names that an error lists."""


def stream_weights(
    model: PreTrainedModel,
    weight_loads: Sequence[WeightLoad],
    unexpected: Sequence[Source],
    assembly: Assembly,
    progress: Progress,
) -> None:
    """Add all weights to `assembly`. Raises StartupError that names tensor and file when one cannot be read, has
    another shape than the model's, or is missing."""
    total = sum(weight_load.num_bytes for weight_load in weight_loads)
    done = returned = 0
    progress(_STAGE, 0, total)
    with work_is_shared():
        for weight_load in _load_and_add(weight_loads, model, assembly):
            done += weight_load.num_bytes
            if done - returned > _MAX_AHEAD_BYTES:
                return_freed_memory()  # temporaries of dequantizing and quantizing
                returned = done
            progress(_STAGE, done, total)
    _require_all(model, assembly, weight_loads, unexpected)
    report_unexpected(model, unexpected)


def _add(weight_load: WeightLoad, values: list[Value], model: PreTrainedModel, assembly: Assembly) -> None:
    for name, value in weight_load.finish(values, model, assembly.dtype_of(weight_load.target)).items():
        try:
            assembly.add(name, value)
        except ValueError as error:
            raise StartupError(f"{weight_load.location}: {error}.") from error


def _load_and_add(
    weight_loads: Sequence[WeightLoad], model: PreTrainedModel, assembly: Assembly
) -> Iterator[WeightLoad]:
    """Yields each weight load once it is in the model."""

    def take(weight_load: WeightLoad) -> list[Value] | None:
        values = weight_load.load()
        in_order = assembly.needs_all_ranks(weight_load.target)
        if in_order or not assembly.packs_weights or weight_load.num_bytes > _MAX_AHEAD_BYTES:
            return values
        _add(weight_load, values, model, assembly)
        return None

    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="weights", initializer=work_alone)
    waiting: deque[tuple[WeightLoad, Future[list[Value] | None]]] = deque()
    coming = iter(weight_loads)
    upcoming = next(coming, None)
    ahead = 0
    try:
        while waiting or upcoming is not None:
            while upcoming is not None and (len(waiting) < 2 or ahead + upcoming.num_bytes <= _MAX_AHEAD_BYTES):
                waiting.append((upcoming, pool.submit(take, upcoming)))
                ahead += upcoming.num_bytes
                upcoming = next(coming, None)
            weight_load, future = waiting.popleft()
            values = future.result()
            del future  # it holds the values too
            if values is not None:
                _add(weight_load, values, model, assembly)
                del values
            yield weight_load
            ahead -= weight_load.num_bytes
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        buffer_pool.clear()
        close_mappings()


def _require_all(
    model: PreTrainedModel, assembly: Assembly, weight_loads: Sequence[WeightLoad], unexpected: Sequence[Source]
) -> None:
    missing = assembly.missing
    if not missing:
        return
    files = sorted(
        {str(tensor.file) for weight_load in weight_loads for item in weight_load.sources for tensor in item.stored}
    )
    where = files[0] if len(files) == 1 else f"the {len(files)} files of {os.path.dirname(files[0])}" if files else "it"
    others = f" It has {_names(item.name for item in unexpected)}, for which there is no place." if unexpected else ""
    raise StartupError(
        f"The checkpoint is not complete for {type(model).__name__} by its config.json: in {where} there is no "
        f"{_names(missing)}.{others}"
    )


def report_unexpected(model: PreTrainedModel, unexpected: Sequence[Source]) -> None:
    """Log a warning for weights of the checkpoint that the model does not have, except known useless ones. A bias must
    be zero, which quantization tools write for layers without one; otherwise raises StartupError."""
    known = [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$", r"\.attn\.(masked_)?bias$"]
    known += list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in known))
    reported = [source for source in unexpected if not ignored.search(source.name)]
    for source in [source for source in reported if source.name.endswith(".bias")]:
        value = source.load()
        bias = value if isinstance(value, torch.Tensor) else value.dense(torch.float32)
        if bool((bias != 0).any()):
            raise StartupError(
                f"{source.location}: {source.name} is not zero, and {type(model).__name__} has no such bias by "
                "config.json."
            )
        reported.remove(source)
    if reported:
        logger.warning(
            "%s: %s has no place for %s",
            reported[0].location,
            type(model).__name__,
            _names(source.name for source in reported),
        )


def _names(names: Iterable[str]) -> str:
    found = list(names)
    more = len(found) - _MAX_NAMES
    return ", ".join(found[:_MAX_NAMES]) + (f" (and {more} more)" if more > 0 else "")
