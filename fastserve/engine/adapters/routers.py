"""Modules that choose experts: they multiply with a weight of their own, in their own code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastserve.engine.layers.fusion import MODEL_CODE_ERRORS

Delta = Callable[[torch.Tensor, torch.Tensor], None]
"""Adds an adapter's product to a layer's output, in place: the arguments are the layer's input and its output."""


class RouterWeight(torch.Tensor):  # type: ignore[misc]  # torch is not followed by mypy
    """A weight to whose products (`F.linear`) the output of the batch's adapters is added."""

    delta: Delta

    @classmethod
    def of(cls, weight: torch.Tensor, delta: Delta) -> RouterWeight:
        """It shares the memory of `weight`."""
        made: RouterWeight = weight.detach().as_subclass(cls)
        made.delta = delta
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
            if func is F.linear and isinstance(args[1], RouterWeight):
                args[1].delta(args[0], out)
        return out


def set_router_delta(router: torch.nn.Module, delta: Delta) -> None:
    """Have `delta` add to the products of the module's weight."""
    router._parameters["weight"] = RouterWeight.of(router.weight, delta)


def multiplies_with_weight(router: torch.nn.Module) -> bool:
    """Whether the module multiplies its input once with its weight in the weight's dtype, as a trial shows."""
    weight = router.weight
    seen: list[torch.Tensor] = []
    x = torch.randn(2, weight.shape[1], dtype=weight.dtype, device=weight.device)
    set_router_delta(router, lambda given, out: seen.append(given))
    try:
        with torch.inference_mode():
            router(x)
    except MODEL_CODE_ERRORS:
        return False
    finally:
        router._parameters["weight"] = weight
    return len(seen) == 1 and seen[0].dtype == x.dtype and torch.equal(seen[0].reshape(x.shape), x)
