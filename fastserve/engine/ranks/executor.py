"""Rank 0's side of a step, and of access to weights: the other ranks do the same at the same time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fastserve.engine.calls.handling import Weights
from fastserve.engine.executor import Executor, PendingStep
from fastserve.engine.plan import StepPlan, StepResult
from fastserve.engine.ranks.messages import ExecuteStep, RankCommand, ReadWeight, WriteWeight
from fastserve.engine.ranks.step_deadline import StepDeadline


class Send(Protocol):
    """Sends a command to all other ranks, or to one, without waiting."""

    def __call__(self, command: RankCommand, rank: int | None = None) -> None: ...


class RankedExecutor:
    """An `Executor`: sends each plan to the other ranks, then computes its own part of it.

    Only this rank samples, so ranks cannot come to different tokens; the next plan carries them. Therefore steps must
    not overlap.
    """

    def __init__(self, executor: Executor, send: Send, deadline: StepDeadline) -> None:
        self._executor = executor
        self._send = send
        self._deadline = deadline
        self._sampled: dict[int, list[int]] = {}

    def launch(self, plan: StepPlan) -> RankedStep:
        self._send(ExecuteStep(plan, self._sampled))
        self._deadline.begin()
        return RankedStep(self, self._executor.launch(plan))

    def end_step(self, result: StepResult) -> None:
        self._deadline.end()
        self._sampled = result.token_ids


@dataclass(frozen=True, slots=True)
class RankedStep:
    _executor: RankedExecutor
    _pending: PendingStep

    def result(self) -> StepResult:
        result = self._pending.result()
        self._executor.end_step(result)
        return result


class RankedWeights:
    """`Weights` whose parts are on several ranks."""

    def __init__(self, own: Weights, send: Send) -> None:
        self._own = own
        self._send = send

    def names(self) -> list[str]:
        return self._own.names()

    def get(self, name: str) -> Any:
        self._require(name)
        self._send(ReadWeight(name))
        return self._own.get(name)

    def set(self, name: str, tensor: Any) -> None:
        self._require(name)
        self._send(WriteWeight(name, *_to_bytes(tensor)))
        self._own.set(name, tensor)

    def _require(self, name: str) -> None:
        if name not in self._own.names():
            raise KeyError(f"the model has no weight {name!r}")


def _to_bytes(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    plain = tensor.detach().cpu().contiguous()
    data = plain.flatten().view(torch.uint8).numpy().tobytes()
    return str(plain.dtype).removeprefix("torch."), tuple(plain.shape), data


def weight_of(message: WriteWeight) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(message.data), dtype=getattr(torch, message.dtype))
    return flat.view(message.shape)
