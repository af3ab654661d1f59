"""A check at start that a model divided over ranks computes what the whole model does.

What a module is follows from names, so an architecture could have a part that is divided wrongly, or one that is left
whole and should not be. A small twin of the model is divided over two ranks, which are threads here, and computed by
its own code whole and divided. In float32, so that rounding hides no difference.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Sequence

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

logger = logging.getLogger(__name__)

_LENGTH = 24
_RANKS = 2
_TOLERANCE = 1e-3
"""Standard deviations of the logits."""


def try_partition(model: PreTrainedModel, collectives: Collectives, *, expert_parallel: bool = False) -> Partition:
    """The partition of a model over the ranks, which all of them ask for together. Its weights may be on the meta
    device; its layers are those of its own code.

    Where the division of some attention modules would compute something else, these are whole on every rank. Raises
    StartupError, on rank 0, when the rest does so too."""
    partition = Partition.of(model, collectives, expert_parallel=expert_parallel)
    if collectives.size == 1:
        return partition
    choices = _choices(model, partition)
    chosen = 0
    if collectives.rank == 0:
        chosen = _first_that_works(model, collectives.size, choices, expert_parallel=expert_parallel)
    chosen = int(collectives.all_reduce_max(torch.tensor([chosen])))
    if chosen > 0:
        partition = Partition.of(model, collectives, expert_parallel=expert_parallel, undivided=choices[chosen])
    plan = partition.plan
    if collectives.rank == 0 and (plan.undivided or not plan.attention):
        logger.warning(
            "%s is not divided: each rank holds its weights and KV cache and computes it whole",
            ", ".join(sorted(plan.undivided)) or "the attention",
        )
    return partition


def _choices(model: PreTrainedModel, partition: Partition) -> list[set[str]]:
    """Sets of classes of attention modules to leave whole, in the order in which they are tried."""
    classes = sorted({type(model.get_submodule(path)).__name__ for path in partition.plan.attention})
    single: list[set[str]] = [{name} for name in classes]
    return [set(), *single, *([set(classes)] if len(classes) > 1 else [])]


def _first_that_works(model: PreTrainedModel, size: int, choices: Sequence[set[str]], *, expert_parallel: bool) -> int:
    """Index of the first choice with which a small twin, divided, computes what it computes whole. Raises StartupError
    for the first one when none does."""
    failures: list[StartupError] = []
    for index, undivided in enumerate(choices):
        try:
            _require_same(model, size, expert_parallel=expert_parallel, undivided=undivided)
        except StartupError as error:
            failures.append(error)
            continue
        return index
    raise failures[0]


def _require_same(model: PreTrainedModel, size: int, *, expert_parallel: bool, undivided: Collection[str] = ()) -> None:
    name = type(model).__name__
    try:
        kv_heads = getattr(model.config.get_text_config(decoder=True), "num_key_value_heads", None)
        shares_kv_heads = isinstance(kv_heads, int) and kv_heads < size
        with building:
            twin = make_small_twin(model, layer_kinds(model), shares_kv_heads=shares_kv_heads)
            error = _difference(twin, expert_parallel=expert_parallel, undivided=undivided)
    except TRIAL_ERRORS as cause:
        raise StartupError(
            f"{name} cannot be divided over ranks: no small twin of it can be tried ({cause})."
        ) from cause
    if not error < _TOLERANCE:
        raise StartupError(
            f"{name} cannot be divided over ranks: its small twin, divided, computes something else (its logits differ "
            f"by {error:.3g} standard deviations). Start it without --tp-size."
        )


def _difference(twin: PreTrainedModel, *, expert_parallel: bool, undivided: Collection[str]) -> float:
    twin.set_attn_implementation("eager")
    tokens = torch.randint(twin.config.vocab_size, (1, _LENGTH), generator=torch.Generator().manual_seed(0))
    plan = plan_partition(twin, _RANKS, expert_parallel=expert_parallel, undivided=undivided)
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
