"""The checks at start that the engine's logits equal those of the model's own code.

Some architectures silently compute something else with replaced attention, and fusing or packing could go wrong too. So
the logits of a few prompts are computed before anything in the model is replaced, at the beginning of a text and far
from it, and each way to compute a step must give the same. This is done twice: on a small twin in float32, which has
all kinds of layers and windows short enough to be left (see twin.py), and on the model itself in its dtype.

The limit follows from the model: a few times the effect of rounding, between bounds.
"""

from __future__ import annotations

import logging
import time

import torch

from fastserve.engine.kernels.build import one_thread
from fastserve.engine.layers.linear import threads_for_kernels
from fastserve.engine.loading.loader import LoadedModel
from fastserve.engine.loading.small_twin import TRIAL_ERRORS
from fastserve.engine.ranks.collectives import SINGLE_RANK, Collectives
from fastserve.engine.runner.forward.forward_pass import ForwardPass
from fastserve.engine.runner.runner import ModelRunner
from fastserve.engine.selfcheck.compare import Capacity, Work, difference
from fastserve.engine.selfcheck.twin import NoTwinError, Twin, make_twin
from fastserve.errors import StartupError

logger = logging.getLogger(__name__)

_NOISE_FACTOR = 4.0
"""Ways to compute a model round at more places than the embeddings, where the noise is made."""
_MIN_LIMIT = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_MAX_LIMIT = 0.5
"""Unrelated logits are 1.4 standard deviations apart."""
_MIN_TWIN_LIMIT = {"cpu": 2e-4}
_MIN_TWIN_LIMIT_ELSEWHERE = 2e-2
"""Other devices may multiply float32 with fewer bits."""


def check_model(
    loaded: LoadedModel, runner: ModelRunner, capacity: Capacity, collectives: Collectives = SINGLE_RANK
) -> None:
    """Compare each way to compute a step with the model's own code, and drop those whose logits differ by more than
    rounding; raise StartupError when the last one does. Uses the first blocks of an empty pool; skips prompts that do
    not fit the capacity. A way that one rank drops before the model itself is computed, all drop."""
    begin = time.perf_counter()
    name = type(loaded.model).__name__
    with one_thread():
        has_twin = _check_twin(loaded, runner, name, capacity.max_model_len)
    for way in runner.forward_passes.agree(collectives):
        logger.warning("%s: the forward pass by %s is not used: another rank does not use it", name, way)
    between = time.perf_counter()
    with threads_for_kernels(loaded.model):
        _check_itself(loaded, runner, name, capacity, decodes_on_twin=has_twin)
    own_s, twin_s, engine_s = loaded.reference.seconds, between - begin, time.perf_counter() - between
    logger.info(
        "%s was checked in %.2f s: its own code %.2f s, a small twin %.2f s, the engine %.2f s",
        name, own_s + twin_s + engine_s, own_s, twin_s, engine_s,
    )  # fmt: skip


def limit_of(noise: float, dtype: torch.dtype) -> float:
    """The largest distance that rounding alone may cause."""
    return min(max(_NOISE_FACTOR * noise, _MIN_LIMIT[dtype]), _MAX_LIMIT)


def _check_twin(loaded: LoadedModel, runner: ModelRunner, name: str, max_model_len: int) -> bool:
    """Check each way on a small twin. Returns whether there is one."""
    passes = runner.forward_passes
    try:
        twin = make_twin(loaded, max_model_len)
    except NoTwinError as error:
        logger.warning("No small twin of %s can be made, so only the model itself is checked: %s", name, error)
        for way in [way for way in passes.ways if way.follows_description]:
            _drop(runner, way, name, f"no small twin of it can be made: {error}")
        return False
    for way in list(passes.ways):
        try:
            reason = _twin_differs(twin, way)
        except TRIAL_ERRORS as error:
            logger.warning("A small twin of %s fails in its forward pass by %s: %s", name, way.name, error)
            reason = f"its small twin fails: {error}" if way.follows_description else None
        if reason is not None:
            _drop(runner, way, name, reason)
    return True


def _twin_differs(twin: Twin, way: ForwardPass) -> str | None:
    """The reason why a model must not be computed this way, or None."""
    found = next((found for found in twin.runner.forward_passes.ways if found.name == way.name), None)
    if found is None:
        # A way that follows no description leaves nothing out, and the model itself is still checked.
        return f"its small twin: {twin.runner.forward_passes.refusals[way.name]}" if way.follows_description else None
    if way.follows_description and not twin.has_all_kinds:
        return "its small twin has not all kinds of its layers"
    reference = twin.loaded.reference
    error = difference(reference, twin.runner, found, twin.capacity)
    limit = max(
        limit_of(reference.noise, torch.float32),
        _MIN_TWIN_LIMIT.get(twin.loaded.device.type, _MIN_TWIN_LIMIT_ELSEWHERE),
    )
    logger.debug("%s: the logits of a small twin differ by %s (limit %.2g)", way.name, error, limit)
    return None if error is not None and error <= limit else "its small twin computes something else"


def _check_itself(
    loaded: LoadedModel, runner: ModelRunner, name: str, capacity: Capacity, *, decodes_on_twin: bool
) -> None:
    """Check each way on the model, the slowest first: it supports all steps, and leaves the KV cache that a faster one
    decodes from. If others follow, and `decodes_on_twin`, it does not decode itself."""
    passes = runner.forward_passes
    limit = limit_of(loaded.reference.noise, loaded.dtype)
    cached = False
    for way in reversed(passes.ways.copy()):
        first = Work.PREFILL if decodes_on_twin and way is not passes.ways[0] else Work.ALL
        work = Work.MIXED if cached else first
        try:
            error = difference(loaded.reference, runner, way, capacity, work)
        except TRIAL_ERRORS as cause:
            if len(passes.ways) == 1:
                raise
            logger.debug("%s failed", way.name, exc_info=True)
            _drop(runner, way, name, f"it fails: {cause}")
            continue
        if error is None:
            logger.warning("The configured sizes are too small to check the model's logits at start.")
            return
        logger.debug("%s: the logits differ by %.2g (limit %.2g)", way.name, error, limit)
        if error <= limit:
            cached = True
        else:
            _drop(runner, way, name, f"its logits differ by {error:.2g} standard deviations")


def _drop(runner: ModelRunner, way: ForwardPass, name: str, reason: str) -> None:
    """Drop a way with a line in the log. Raises StartupError for the last one."""
    if len(runner.forward_passes.ways) == 1:
        raise StartupError(
            f"{name} cannot be served: the engine's logits differ from those of the model's own code ({reason}). The "
            "model does something that the engine does not know."
        )
    logger.warning("%s: the forward pass by %s is not used: %s", name, way.name, reason)
    runner.forward_passes.drop(way, reason)
