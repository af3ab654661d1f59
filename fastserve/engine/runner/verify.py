"""A check at start that the paged, packed forward pass computes what the model's own forward pass does.

Some architectures run with replaced attention and compute something else without a word. A model is served only after
two short sequences, packed into one batch, in two chunks each, gave the logits of the model's own attention.
"""

from __future__ import annotations

import torch

from fastserve.engine.contract import SamplingParams
from fastserve.engine.plan import Chunk, NewSequence, StepPlan
from fastserve.engine.runner.loading import LoadedModel
from fastserve.engine.runner.runner import ModelRunner
from fastserve.errors import StartupError

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1.5e-1}
_SPLIT = 5


def verify_paging(
    loaded: LoadedModel, runner: ModelRunner, *, block_size: int, num_blocks: int, max_num_seqs: int, max_model_len: int
) -> None:
    """Raise StartupError when the logits differ by more than rounding. Uses the first blocks of an empty pool."""
    vocabulary = loaded.model.config.get_text_config(decoder=True).vocab_size
    capacity = num_blocks * block_size
    lengths = [min(length, max_model_len) for length in (19, 8)]
    if max_num_seqs == 1 or capacity < sum(lengths) + 2 * block_size:
        del lengths[1]
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
    expected = _own_logits(loaded, prompts)
    found = _paged_logits(runner, prompts, block_size)
    spread = expected.std().clamp_min(1e-6)
    error = float((found - expected).abs().max() / spread)
    if not error <= _TOLERANCE[loaded.dtype]:
        raise StartupError(
            f"{type(loaded.model).__name__} cannot be served: with a paged KV cache its logits differ from its own "
            f"forward pass by {error:.3g} standard deviations. Its attention does something the engine does not know."
        )


def _own_logits(loaded: LoadedModel, prompts: list[list[int]]) -> torch.Tensor:
    model = loaded.model
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        rows = []
        with torch.inference_mode():
            for prompt in prompts:
                output = model(input_ids=torch.tensor([prompt], device=loaded.device), use_cache=False)
                rows.append(output.logits[0, -1])
        return torch.stack(rows).float()
    finally:
        model.set_attn_implementation(ours)


def _paged_logits(runner: ModelRunner, prompts: list[list[int]], block_size: int) -> torch.Tensor:
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
        runner.forward(StepPlan([], new, begin))
        return runner.forward(StepPlan([], [], rest)).float()
    finally:
        runner.forget(list(ids))
