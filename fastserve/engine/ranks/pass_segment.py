"""How the ranks of one machine get the segment of their group when none of them has started the others.

The machine's first rank makes a segment for each generation of the group, and passes its descriptor over a Unix socket
in a folder that only their user can enter. The socket's name has the generation, so no rank gets an older segment.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from fastserve.engine.ranks.collectives import RankLostError
from fastserve.engine.ranks.segment import Segment

_RETRY_S = 0.02
_CHECK_S = 0.1
_CONNECTION_S = 5.0
"""Longest wait for an answer of the first rank, which answers at once."""
IsLost = Callable[[], bool]
"""Whether the group is lost, so that nobody should wait for it."""


def _never() -> bool:
    return False


def pass_segment(
    segment: Segment, folder: Path, generation: int, num_others: int, timeout_s: float, is_lost: IsLost = _never
) -> None:
    """Pass it to the other ranks of this machine. Raises RankLostError when they have not all asked in time."""
    if num_others == 0:
        return
    deadline = time.monotonic() + timeout_s
    path = _path(folder, generation)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        path.unlink(missing_ok=True)  # of a first rank that was killed
        listener.bind(str(path))
        try:
            listener.listen(num_others)
            for number in range(num_others):
                connection = _accept(listener, deadline, is_lost)
                if connection is None:
                    raise RankLostError(
                        f"{num_others - number} of the {num_others} other ranks of this machine did not ask for the "
                        f"segment within {timeout_s:g} s."
                    )
                with connection:
                    socket.send_fds(connection, [b"."], [segment.descriptor])
        finally:
            path.unlink(missing_ok=True)


def _accept(listener: socket.socket, deadline: float, is_lost: IsLost) -> socket.socket | None:
    """The next connection; None at the deadline."""
    listener.settimeout(_CHECK_S)
    while True:
        try:
            return listener.accept()[0]
        except TimeoutError:
            if time.monotonic() > deadline:
                return None
            _require(is_lost)


def _require(is_lost: IsLost) -> None:
    if is_lost():
        raise RankLostError("Another rank of the model was lost while the ranks of this machine met.")


def receive_segment(
    folder: Path, generation: int, num_ranks: int, timeout_s: float, is_lost: IsLost = _never
) -> Segment:
    """The segment from the first rank of this machine. Raises RankLostError when it has not passed it in time."""
    deadline = time.monotonic() + timeout_s
    path = str(_path(folder, generation))
    while True:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise RankLostError(f"The first rank of this machine did not pass its segment within {timeout_s:g} s.")
        _require(is_lost)
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
            connection.settimeout(min(remaining_s, _CONNECTION_S))
            try:
                connection.connect(path)
                _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
            except OSError:  # it has not come so far, or is gone
                descriptors = []
        if descriptors:
            os.set_inheritable(descriptors[0], False)
            return Segment(descriptors[0], num_ranks)
        time.sleep(_RETRY_S)


def _path(folder: Path, generation: int) -> Path:
    return folder / f"{generation:x}"
