"""Weight updates of a model that is divided over ranks.

Every rank is a member of the trainer's group, receives all bytes, and keeps its part of each weight: a trainer counts
on one member for each rank, and a broadcast to more members costs little more. Ranks put new weights in place at the
same point of the order of rank 0's commands, and only if all of them have received them.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import torch

from fastserve.engine.ranks.collectives import Collectives
from fastserve.engine.ranks.messages import (
    CommitWeights,
    DiscardWeights,
    JoinGroup,
    LeaveGroup,
    RankCommand,
    ReceiveWeights,
    WeightCommand,
)
from fastserve.engine.weight_messages import FromGroup, GroupSettings, GroupState, Received, WeightSource
from fastserve.engine.weight_updates.receiver import LocalReceiver
from fastserve.errors import FastserveError, WeightTransferError


class RankedReceiver:
    """A `WeightReceiver` on rank 0."""

    def __init__(self, local: LocalReceiver, send: Callable[[RankCommand], None], collectives: Collectives) -> None:
        """`send`: to all other ranks."""
        self._local = local
        self._send = send
        self._collectives = collectives
        self._has_sent = False
        self._group_name: str | None = None

    def join(self, settings: GroupSettings) -> Future[GroupState]:
        joined = self._local.join(settings)
        self._send(JoinGroup(settings))
        return joined

    def leave(self, name: str) -> GroupState:
        state = self._local.leave(name)
        self._send(LeaveGroup(name))
        return state

    def receive(self, source: WeightSource, *, is_direct: bool = False) -> Future[Received]:
        """Raises ShortageError when there is no memory for a second copy of the weights."""
        self._local.prepare(source)  # nothing is sent to ranks that would wait for a broadcast in vain
        received = self._local.receive(source)
        self._send(ReceiveWeights(source))
        self._has_sent = True
        self._group_name = source.group_name if isinstance(source, FromGroup) else None
        return received

    def commit(self) -> None:
        """Raises WeightTransferError when another rank has not received all."""
        if not self._has_sent:
            return
        self._send(CommitWeights())
        self._has_sent = False
        if not _all_are_ready(self._collectives, is_ready=True):
            self._local.discard()
            if self._group_name is not None:  # its members are no longer at the same broadcast
                self._leave_quietly(self._group_name)
            raise WeightTransferError("Another rank of the model has not received all weights: join the group again.")
        self._local.commit()

    def discard(self) -> None:
        self._local.discard()
        if self._has_sent:
            self._send(DiscardWeights())
        self._has_sent = False

    @property
    def is_complete(self) -> bool:
        return self._local.is_complete

    def _leave_quietly(self, name: str) -> None:
        if self._local.has_group(name):
            self.leave(name)


class RankWeights:
    """Carries out rank 0's commands about weights on another rank."""

    def __init__(self, local: LocalReceiver, collectives: Collectives) -> None:
        self._local = local
        self._collectives = collectives
        self._received: list[Future[Received]] = []
        self._group_name: str | None = None

    def handle(self, command: WeightCommand) -> None:
        match command:
            case JoinGroup(settings):
                self._leave(settings.group_name)
                self._local.join(settings)
            case LeaveGroup(name):
                self._leave(name)
            case ReceiveWeights(source):
                self._group_name = source.group_name if isinstance(source, FromGroup) else None
                self._received.append(self._begin(source))
            case CommitWeights():
                failed = [future for future in self._received if future.exception() is not None]
                self._received.clear()
                if _all_are_ready(self._collectives, is_ready=not failed):
                    self._local.commit()
                else:
                    self._local.discard()
            case DiscardWeights():
                self._received.clear()
                self._local.discard()
                if self._group_name is not None:  # a thread may still wait for a broadcast
                    self._leave(self._group_name)

    def _begin(self, source: WeightSource) -> Future[Received]:
        try:
            return self._local.receive(source)
        except FastserveError as error:  # it has not joined the group, for example
            failed: Future[Received] = Future()
            failed.set_exception(error)
            return failed

    def _leave(self, name: str) -> None:
        if self._local.has_group(name):
            self._local.leave(name)


def _all_are_ready(collectives: Collectives, *, is_ready: bool) -> bool:
    return not bool(collectives.all_reduce_max(torch.tensor([0.0 if is_ready else 1.0])).item())
