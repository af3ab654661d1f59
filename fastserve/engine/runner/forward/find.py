"""The list of ways to compute a forward pass, and the selection of those that a model supports."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch

from fastserve.engine.layers.fusion import MODEL_CODE_ERRORS
from fastserve.engine.ranks.collectives import Collectives
from fastserve.engine.runner.forward.forward_pass import AbsentError, ForwardParts, ForwardPass, UnsupportedError
from fastserve.engine.runner.forward.graphs import GraphForward
from fastserve.engine.runner.forward.modules import ModulesForward
from fastserve.engine.runner.forward.whole_step import WholeStepForward
from fastserve.engine.runner.packed_step import PackedStep
from fastserve.errors import StartupError

logger = logging.getLogger(__name__)

FORWARD_PASSES: tuple[type[ForwardPass], ...] = (WholeStepForward, GraphForward, ModulesForward)
"""Fastest first."""


@dataclass(slots=True)
class ForwardPasses:
    """The ways that one model supports, fastest first. Each step uses the first that supports the step."""

    ways: list[ForwardPass]
    refusals: dict[str, str] = field(default_factory=dict)
    """Reasons why other ways are not used, by name."""
    absent: set[str] = field(default_factory=set)
    """Names of ways that this machine does not have for any model."""

    @classmethod
    def of(cls, parts: ForwardParts) -> ForwardPasses:
        """The ways that can be built; one that fails is left out. Raises StartupError when the slowest one fails."""
        found = cls([])
        for way in FORWARD_PASSES:
            try:
                found.ways.append(way.build(parts))
            except UnsupportedError as error:
                found.refusals[way.name] = str(error)
                if isinstance(error, AbsentError):
                    found.absent.add(way.name)
                logger.debug("%s: no %s: %s", type(parts.model).__name__, way.name, error)
            except MODEL_CODE_ERRORS as error:
                if way is FORWARD_PASSES[-1]:
                    raise StartupError(
                        f"{type(parts.model).__name__} cannot be served: its code failed when its forward pass by "
                        f"{way.name} was made ({type(error).__name__}: {error})."
                    ) from error
                found.refusals[way.name] = f"it fails for this model ({type(error).__name__}: {error})"
                logger.warning(
                    "%s is not computed by %s, which fails for it: slower ways are used.",
                    type(parts.model).__name__, way.name, exc_info=error,
                )  # fmt: skip
        return found

    def agree(self, collectives: Collectives) -> list[str]:
        """Keep only ways that all ranks have, since each way exchanges tensors at other places. Returns the names of
        the others; raises StartupError when none is left."""
        own = {way.name: way for way in self.ways}
        is_missing = collectives.all_reduce_max(torch.tensor([float(way.name not in own) for way in FORWARD_PASSES]))
        common = {way.name for way, missing in zip(FORWARD_PASSES, is_missing.tolist(), strict=True) if not missing}
        dropped = [name for name in own if name not in common]
        if len(dropped) == len(own):
            raise StartupError(
                f"The ranks of the model have no way to compute a step in common; this rank has {', '.join(own)}. The "
                "log of each rank says why it does not use the others: start all ranks with the same software."
            )
        for name in dropped:
            self.drop(own[name], "another rank does not use it")
        return dropped

    def drop(self, way: ForwardPass, reason: str) -> None:
        """Remove a way whose results are wrong. Raises ValueError for the last one."""
        if len(self.ways) == 1:
            raise ValueError(f"{way.name} is the only way left")
        self.ways.remove(way)
        self.refusals[way.name] = reason

    def logits(self, step: PackedStep, first: ForwardPass | None = None) -> torch.Tensor:
        """Logits (rows, vocabulary) of a step, by the first way that supports it, starting from `first`."""
        ways = self.ways if first is None else self.ways[self.ways.index(first) :]
        for way in ways:
            reason = way.supports(step)
            if reason is None:
                return way(step)
            logger.debug("a step of %d tokens is not computed by %s: %s", len(step.input_ids), way.name, reason)
        raise RuntimeError("no way computes this step")
