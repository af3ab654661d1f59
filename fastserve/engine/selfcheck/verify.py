"""A check at start that the engine's logits equal those of the model's own code.

Some architectures silently compute something else with replaced attention, and fusing or packing could go wrong too. So
the logits of two short sequences are recorded before anything in the model is replaced, and the model is served only
when the engine computes the same, with both sequences packed into one batch in two chunks each.
"""

from __future__ import annotations

import logging

import torch

from fastserve.engine.contract import SamplingParams
from fastserve.engine.loading.reference import Reference
from fastserve.engine.plan import Chunk, NewSequence, StepPlan
from fastserve.engine.runner.forward.forward_pass import ForwardPass
from fastserve.engine.runner.runner import ModelRunner
from fastserve.errors import StartupError

logger = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}
"""Maximum difference in standard deviations of the logits. Small dtypes round differently in fused kernels."""
_SPLIT = 5


def verify(
    reference: Reference,
    runner: ModelRunner,
    name: str,
    dtype: torch.dtype,
    *,
    block_size: int,
    num_blocks: int,
    max_num_seqs: int,
    max_model_len: int,
) -> None:
    """Compare each way to compute a step with the model's own code, and drop those whose logits differ by more than
    rounding; raise StartupError when the last one does. Uses the first blocks of an empty pool; skips prompts that do
    not fit the sizes."""
    limit = max(_TOLERANCE[dtype], 4 * reference.noise)
    ways = runner.forward_passes
    for way in list(ways.ways):
        error = difference(
            reference,
            runner,
            way,
            block_size=block_size,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
        )
        if error is None:
            logger.warning("The configured sizes are too small to check the model's logits at start.")
            return
        if error <= limit:
            continue
        if len(ways.ways) == 1:
            raise StartupError(
                f"{name} cannot be served: the engine's logits differ from those of the model's own code by "
                f"{error:.3g} standard deviations. The model does something that the engine does not know."
            )
        logger.warning("%s computes something that its forward pass by %s does not: others are used.", name, way.name)
        ways.drop(way, "its logits differ from the model's")


def difference(
    reference: Reference,
    runner: ModelRunner,
    way: ForwardPass,
    *,
    block_size: int,
    num_blocks: int,
    max_num_seqs: int,
    max_model_len: int,
) -> float | None:
    """The largest difference of a way's logits from the reference, in standard deviations of the logits; None when no
    prompt fits the sizes."""
    which: list[int] = []
    free = num_blocks
    for index, prompt in enumerate(reference.prompts):
        needed = -(-len(prompt) // block_size)
        if 1 < len(prompt) <= max_model_len and needed <= free and len(which) < max_num_seqs:
            which.append(index)
            free -= needed
    if not which:
        return None
    expected = reference.logits[which]
    found = _engine_logits(runner, way, [reference.prompts[index] for index in which], block_size)
    return float((found - expected).abs().max() / expected.std().clamp_min(1e-6))


def _engine_logits(runner: ModelRunner, way: ForwardPass, prompts: list[list[int]], block_size: int) -> torch.Tensor:
    ids = range(len(prompts))
    blocks: list[list[int]] = []
    first = 0
    for prompt in prompts:
        count = -(-len(prompt) // block_size)
        blocks.append(list(range(first, first + count)))
        first += count
    params = SamplingParams(max_tokens=1)
    new = [NewSequence(i, prompts[i], len(prompts[i]), params, 0) for i in ids]
    begin = [Chunk(i, 0, min(_SPLIT, len(prompts[i]) - 1), blocks[i], sample=False) for i in ids]
    rest = [Chunk(i, begin[i].num_tokens, len(prompts[i]) - begin[i].num_tokens, [], sample=True) for i in ids]
    try:
        runner.forward(StepPlan([], new, begin), way)
        return runner.forward(StepPlan([], [], rest), way).float()
    finally:
        runner.forget(list(ids))
