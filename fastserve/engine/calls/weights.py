"""Replace the weights of the model while the engine serves, and check them."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Literal

from fastserve.engine.calls.handling import CallContext, CallHandler
from fastserve.engine.contract import Call
from fastserve.engine.weight_messages import (
    GroupSettings,
    GroupState,
    UpdateOptions,
    WeightSource,
    WeightsState,
    WeightUpdate,
    WeightValues,
)

_MAX_CHECK_S = 600.0
"""Longest time that reading all weights takes."""


class JoinWeightGroup(Call[GroupState], frozen=True):
    """Join a trainer's process group. The reply comes when all members have.

    Raises ConflictError when the name is taken, EngineTimeoutError when the members do not come in time.
    """

    settings: GroupSettings


class LeaveWeightGroup(Call[GroupState], frozen=True):
    """Raises WeightGroupNotFoundError."""

    group_name: str


class UpdateWeights(Call[WeightUpdate], frozen=True):
    """Replace weights by those of a source: all that it has, or none. The reply comes when they compute.

    Raises ConflictError while another update runs, InvalidRequestError when a weight has no place,
    WeightGroupNotFoundError, and WeightTransferError when the trainer goes away.
    """

    source: WeightSource
    options: UpdateOptions = UpdateOptions()
    is_part: bool = False
    """Only receive the weights, as a part of the update that StartWeightUpdate has begun."""


class StartWeightUpdate(Call[WeightsState], frozen=True):
    """Begin an update of several transfers. One that was not finished is given up."""

    options: UpdateOptions = UpdateOptions()


class FinishWeightUpdate(Call[WeightUpdate], frozen=True):
    """Put in place what has been received since StartWeightUpdate."""


class SetWeightVersion(Call[WeightsState], frozen=True):
    version: str


class GetWeight(Call[WeightValues], frozen=True):
    """Raises WeightNotFoundError."""

    name: str
    num_rows: int


class CheckWeights(Call[WeightsState], frozen=True):
    action: Literal["checksum", "snapshot", "reset_tensors", "compare"]


def _join(call: JoinWeightGroup, context: CallContext) -> Future[GroupState]:
    return context.updates.join(call.settings)


def _leave(call: LeaveWeightGroup, context: CallContext) -> GroupState:
    return context.updates.leave(call.group_name)


def _update(call: UpdateWeights, context: CallContext) -> Future[WeightUpdate]:
    return context.updates.receive(call.source, call.options, context.send_outputs, is_part=call.is_part)


def _start(call: StartWeightUpdate, context: CallContext) -> WeightsState:
    context.updates.start(call.options, context.send_outputs)
    return WeightsState(True, "started", context.updates.version)


def _finish(call: FinishWeightUpdate, context: CallContext) -> Future[WeightUpdate]:
    return context.updates.finish(context.send_outputs)


def _set_version(call: SetWeightVersion, context: CallContext) -> WeightsState:
    context.updates.set_version(call.version)
    return WeightsState(True, "renamed", context.updates.version)


def _get(call: GetWeight, context: CallContext) -> WeightValues:
    return context.updates.checker.values(call.name, call.num_rows)


def _check(call: CheckWeights, context: CallContext) -> WeightsState:
    updates = context.updates
    context.announce(_MAX_CHECK_S)
    match call.action:
        case "checksum":
            checksum = updates.checker.checksum()
            return WeightsState(True, f"SHA-256 {checksum}", updates.version, checksum)
        case "snapshot":
            updates.checker.snapshot()
            return WeightsState(True, "a copy of all weights is kept", updates.version)
        case "compare":
            changed = updates.checker.compare()
            message = f"{len(changed)} weights differ from the snapshot"
            return WeightsState(True, message, updates.version, changed=changed)
        case "reset_tensors":
            updates.randomize()
            return WeightsState(True, "all weights are random numbers", updates.version)


HANDLERS = (
    CallHandler[JoinWeightGroup, GroupState](JoinWeightGroup, _join),
    CallHandler(LeaveWeightGroup, _leave),
    CallHandler[UpdateWeights, WeightUpdate](UpdateWeights, _update),
    CallHandler(StartWeightUpdate, _start),
    CallHandler[FinishWeightUpdate, WeightUpdate](FinishWeightUpdate, _finish),
    CallHandler(SetWeightVersion, _set_version),
    CallHandler(GetWeight, _get),
    CallHandler(CheckWeights, _check),
)
