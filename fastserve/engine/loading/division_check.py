"""A check at start that a model divided over ranks computes what the whole model does.

What a module is follows from names, so an architecture could have a part that is divided wrongly, or one that is left
whole and should not be. A small twin of the model is divided over two ranks, which are threads here, and computed by
its own code whole and divided. In float32, so that rounding hides no difference.
"""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from fastserve.engine.loading.assembly import install
from fastserve.engine.loading.layer_kinds import layer_kinds
from fastserve.engine.loading.partition import Partition
from fastserve.engine.loading.partition_plan import plan_partition
from fastserve.engine.loading.skeleton import building
from fastserve.engine.loading.small_twin import TRIAL_ERRORS, make_small_twin
from fastserve.engine.ranks.collectives import Collectives
from fastserve.engine.ranks.thread_collectives import run_ranks
from fastserve.errors import StartupError

_LENGTH = 24
_RANKS = 2
_TOLERANCE = 1e-3
"""Standard deviations of the logits."""


def require_divisible(model: PreTrainedModel, size: int, *, expert_parallel: bool = False) -> None:
    """Raise StartupError if a model, divided over `size` ranks, would compute something else. Its weights may be on the
    meta device; its layers are those of its own code."""
    name = type(model).__name__
    try:
        kv_heads = getattr(model.config.get_text_config(decoder=True), "num_key_value_heads", None)
        shares_kv_heads = isinstance(kv_heads, int) and kv_heads < size
        with building:
            twin = make_small_twin(model, layer_kinds(model), shares_kv_heads=shares_kv_heads)
            error = _difference(twin, expert_parallel=expert_parallel)
    except TRIAL_ERRORS as cause:
        raise StartupError(
            f"{name} cannot be divided over ranks: no small twin of it can be tried ({cause})."
        ) from cause
    if not error < _TOLERANCE:
        raise StartupError(
            f"{name} cannot be divided over ranks: its small twin, divided, computes something else (its logits differ "
            f"by {error:.3g} standard deviations). Start it without --tp-size."
        )


def _difference(twin: PreTrainedModel, *, expert_parallel: bool) -> float:
    twin.set_attn_implementation("eager")
    tokens = torch.randint(twin.config.vocab_size, (1, _LENGTH), generator=torch.Generator().manual_seed(0))
    plan = plan_partition(twin, _RANKS, expert_parallel=expert_parallel)
    # Copied here: building modules in several threads at once is not safe.
    parts = [copy.deepcopy(twin) for _ in range(_RANKS)]

    def logits_of(model: PreTrainedModel) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits[0]
        return logits

    def divided_logits(collectives: Collectives) -> torch.Tensor:
        partition = Partition(plan, collectives)
        part = parts[collectives.rank]
        partition.divide(part)
        install(part, None, partition).finish()
        return logits_of(part)

    whole = logits_of(twin)
    found = run_ranks(_RANKS, divided_logits)
    if not all(torch.equal(found[0], logits) for logits in found):
        return float("inf")
    return float((found[0] - whole).abs().max() / whole.std().clamp_min(1e-6))
