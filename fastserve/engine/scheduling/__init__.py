"""Scheduling policies, one in each file of this folder but queue.py; the file's name is the value of `--scheduler`.

A policy file has a class `Policy`, which implements `SchedulingPolicy` and is made with `Settings`. It holds the
waiting sequences, and says which of them starts next and which running one is preempted. With n waiting sequences each
call costs O(log n). No clock, no randomness, no tensors.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, cast

from fastserve.config import EngineOptions
from fastserve.engine.sequence import Sequence as RequestSequence
from fastserve.errors import StartupError
from fastserve.options import comma_list

_NO_POLICIES = frozenset({"queue"})
_REFUSED = {
    "pets": "it orders by latencies that were measured beforehand for whole batches, which steps with chunked prefill "
    "do not have",
    "peft": "it merges one adapter at a time into the weights; --scheduler cluster --batch-num-adapters 1 is the "
    "nearest",
}
MAX_WEIGHT = 1e6


@dataclass(frozen=True)
class Settings:
    weights: dict[str, float]
    """Share of the service by client, relative to others; 1 where none is given."""
    batch_num_adapters: int
    """Different adapters among running sequences from which on others wait."""
    first_token_slo_s: float
    """Longest time to the first token that is of use."""
    max_num_batched_tokens: int
    """Tokens of a step."""


class SchedulingPolicy(Protocol):
    """A sequence waits from `add` to `remove`; it has `ended` once, whether it waited, ran or was held back."""

    def add(self, sequence: RequestSequence) -> None:
        """A sequence begins to wait: it is new, was preempted, or was held back."""
        ...

    def remove(self, sequence: RequestSequence) -> None:
        """A sequence waits no more, because it starts, ends or is held back. One that does not wait is no error."""
        ...

    def first(self, running: Sequence[RequestSequence]) -> RequestSequence | None:
        """The waiting sequence that starts next, beside those that run; None if none waits."""
        ...

    def victim(self, running: Sequence[RequestSequence]) -> RequestSequence:
        """The running sequence to preempt. `running` is not empty, and is in the order of `Sequence.order`.

        Until a token is sampled, the order in which sequences are preempted may not change: that of the last place in
        it runs to its end, so preemptions come to an end.
        """
        ...

    def yields_to(self, first: RequestSequence, running: Sequence[RequestSequence]) -> RequestSequence | None:
        """The running sequence to preempt so that `first` gets its place, when `--max-num-seqs` sequences run; None if
        `first` is to wait. Only a sequence that has never begun may get a place, so preemptions come to an end."""
        ...

    def max_prefill_tokens(self, sequence: RequestSequence, prefills: Sequence[tuple[RequestSequence, int]]) -> int:
        """Maximum number of tokens of `sequence`'s prompt in a step that computes these numbers of tokens of others'
        prompts. 0: it does not start; if it runs already, it gets a small part of the step. More than 0 where there are
        no others, so that it goes on."""
        ...

    def served(self, sequence: RequestSequence, num_input_tokens: int, num_output_tokens: int) -> None:
        """Tokens were computed for a sequence: those of its prompt when it starts for the first time, without cached
        ones, and each token of the answer."""
        ...

    def ended(self, sequence: RequestSequence) -> None:
        """A sequence has finished, or was aborted."""
        ...

    def too_late(self, now_s: float) -> Sequence[RequestSequence]:
        """Waiting sequences to give up at this time of the scheduler's clock. Called before each step."""
        ...


def names() -> list[str]:
    """Names of the available policies, in alphabetical order. Imports none of them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NO_POLICIES)


def load(options: EngineOptions, adapters: Sequence[str] = (), *, max_num_batched_tokens: int) -> SchedulingPolicy:
    """The policy that the options ask for. `adapters`: names in the order in which weights without a name count.
    `max_num_batched_tokens`: that of the engine, also where the option is left out.

    Raises StartupError for an unknown policy, and for options that do not go together.
    """
    name = check(options, adapters)
    settings = Settings(
        weights=_read_weights(options.fair_weights, adapters),
        batch_num_adapters=options.batch_num_adapters or options.max_num_seqs,
        first_token_slo_s=options.first_token_slo_s,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    make = cast(Callable[[Settings], SchedulingPolicy], importlib.import_module(f"{__name__}.{name}").Policy)
    return make(settings)


def check(options: EngineOptions, adapters: Sequence[str] | None = None) -> str:
    """Name of the policy that the options ask for. Raises StartupError as `load` does; for the weights only where the
    adapters are known."""
    name = _chosen(options)
    if name in _REFUSED:
        raise StartupError(
            f"--scheduler {name} is not available: {_REFUSED[name]}. Choose one of {', '.join(names())}."
        )
    if name not in names():
        raise StartupError(f"--scheduler {name}: there is no such policy; choose one of {', '.join(names())}.")
    if options.fair_weights and name != "vtc_fair":
        raise StartupError("--fair-weights are for --scheduler vtc_fair: give it too, or leave them out.")
    if adapters is not None:
        _read_weights(options.fair_weights, adapters)
    return name


def _chosen(options: EngineOptions) -> str:
    """As with S-LoRA, --batch-num-adapters and --enable-abort choose a policy too."""
    name = options.scheduler
    asked = {
        "cluster": ("--batch-num-adapters", options.batch_num_adapters is not None),
        "abort": ("--enable-abort", options.enable_abort),
    }
    for policy, (flag, is_given) in asked.items():
        if not is_given:
            continue
        if name not in ("slora", policy):
            raise StartupError(f"{flag} asks for --scheduler {policy}, and {name} is chosen: give one of them.")
        name = policy
    if name == "cluster" and options.batch_num_adapters is None:
        raise StartupError("--scheduler cluster needs --batch-num-adapters.")
    return name


def _read_weights(texts: Sequence[str], adapters: Sequence[str]) -> dict[str, float]:
    """NAME=WEIGHT, or weights alone in the order of the adapters; a text may have several, separated by commas."""
    weights: dict[str, float] = {}
    for at, text in enumerate(chain.from_iterable(map(_split_weights, texts))):
        name, equals, number = text.rpartition("=")
        if not equals:
            if at >= len(adapters):
                raise StartupError(
                    f"--fair-weights {text}: there are {len(adapters)} adapters at the start, and this is weight "
                    f"{at + 1}. Give NAME=WEIGHT for others."
                )
            name = adapters[at]
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not 1 / MAX_WEIGHT <= weight <= MAX_WEIGHT:
            raise StartupError(f"--fair-weights {text}: a weight is a number above 0, {MAX_WEIGHT:g} at most.")
        weights[name] = weight
    return weights


def _split_weights(text: str) -> list[str]:
    """A comma after a name that has no weight yet is part of the name."""
    found: list[str] = []
    for part in comma_list(text):
        if found and not _is_weight(found[-1]):
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def _is_weight(text: str) -> bool:
    """Whether it is a number, or has a name before an equals sign."""
    try:
        float(text)
    except ValueError:
        return "=" in text
    return True
