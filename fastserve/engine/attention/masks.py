"""The mask of each attention layer, read from the function by which transformers would make it.

Some models hand a sliding window to the attention function, others apply it (or chunks) by their mask alone. So one
forward pass is observed with a mask function of our own: transformers calls it with the rule that says which positions
see which, and the mask that it returns is only a label, by which the layers that get it are known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_MAX_POSITION = 1 << 20
"""Rules are compared at positions up to here."""
_NUM_DENSE = 24
"""The first positions are all compared."""
_CAUSES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError)
Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(batch, head, query position, key position) -> whether the query sees the key"""


class UnknownMaskError(Exception):
    """A layer's mask is neither causal, nor a window or chunks of causal attention."""


@dataclass(frozen=True, slots=True)
class CausalMask:
    """Which keys a query sees: those up to its own position, within its window and chunk."""

    window: int | None = None
    """Number of positions that each query sees, its own included."""
    chunk: int | None = None
    """Size of the chunks of positions: no query sees beyond the beginning of its own."""

    def sees(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = key <= query
        if self.window is not None:
            seen = seen & (key > query - self.window)
        if self.chunk is not None:
            seen = seen & (key >= query // self.chunk * self.chunk)
        return seen


def find_mask(rule: Rule, size: int | None) -> CausalMask | None:
    """The mask that follows `rule`, or None if the engine has none like it. `size`: window or chunk size, as
    transformers knows it."""
    positions = _test_positions(size)
    query, key = positions.unsqueeze(1), positions.unsqueeze(0)
    zero = torch.zeros((), dtype=torch.long)
    try:
        with _TextBeyondTheEnd():
            found = rule(zero, zero, query, key)
        expected = torch.as_tensor(found).expand(len(positions), len(positions)).bool()
    except _CAUSES:
        return None
    candidates = [CausalMask()] if size is None else [CausalMask(window=size), CausalMask(chunk=size), CausalMask()]
    return next((mask for mask in candidates if torch.equal(mask.sees(query, key), expected)), None)


class _TextBeyondTheEnd(TorchFunctionMode):  # type: ignore[misc]
    """Lets a rule look up per-token inputs (such as the image that a token is of) at positions beyond the tokens of the
    observed pass. All its tokens are text: an input that is the same for all of them has this value at other positions
    too. One that differs between them raises IndexError, as without this mode."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except IndexError:
            if func is not torch.Tensor.__getitem__:
                raise
            per_token, index = args
            parts = index if isinstance(index, tuple) else (index,)
            value = per_token.flatten()[:1]
            if len(parts) != per_token.dim() or not bool((per_token == value).all()):
                raise
            return value.expand(torch.broadcast_shapes(*(torch.as_tensor(part).shape for part in parts)))


def _test_positions(size: int | None) -> torch.Tensor:
    """Positions around each boundary that a mask of this size can have."""
    found = set(range(_NUM_DENSE))
    step = 1
    while step < _MAX_POSITION:
        found |= {step - 1, step, step + 1}
        step *= 2
    if size is not None:
        found |= {times * size + more for times in (1, 2, 3, 5) for more in (-2, -1, 0, 1, 2)}
    return torch.tensor(sorted(position for position in found if position >= 0))


class MaskLabels:
    """Labels that stand in for masks in an observed forward pass."""

    def __init__(self) -> None:
        self._masks: list[CausalMask | None] = []

    def label(self, device: torch.device, rule: Rule, size: int | None) -> torch.Tensor:
        """A tensor in a mask's place. Its value is the label, so it may be moved between devices or cut."""
        self._masks.append(find_mask(rule, size))
        return torch.full((1, 1, 1, 1), len(self._masks), dtype=torch.int64, device=device)

    def mask(self, label: Any) -> CausalMask | None:
        """The mask of a label; None for anything else, which a model passes that makes no mask by transformers'
        functions. Raises UnknownMaskError for a rule that the engine cannot compute."""
        if not isinstance(label, torch.Tensor) or label.dtype != torch.int64 or label.numel() != 1:
            return None
        index = int(label) - 1
        if not 0 <= index < len(self._masks):
            return None
        mask = self._masks[index]
        if mask is None:
            raise UnknownMaskError
        return mask
