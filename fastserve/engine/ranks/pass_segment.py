"""How the ranks of one machine get the segment of their group when none of them has started the others.

The machine's first rank makes a segment for each generation of the group, and passes its descriptor over a Unix socket
in a folder that only their user can enter. The socket's name has the generation, so no rank gets an older segment.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

from fastserve.engine.ranks.collectives import RankLostError
from fastserve.engine.ranks.segment import Segment

_RETRY_S = 0.02


def pass_segment(segment: Segment, folder: Path, generation: int, num_others: int, timeout_s: float) -> None:
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
                listener.settimeout(max(_RETRY_S, deadline - time.monotonic()))
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    raise RankLostError(
                        f"{num_others - number} of the {num_others} other ranks of this machine did not ask for the "
                        f"segment within {timeout_s:g} s."
                    ) from None
                with connection:
                    socket.send_fds(connection, [b"."], [segment.descriptor])
        finally:
            path.unlink(missing_ok=True)


def receive_segment(folder: Path, generation: int, num_ranks: int, timeout_s: float) -> Segment:
    """The segment from the first rank of this machine. Raises RankLostError when it has not passed it in time."""
    deadline = time.monotonic() + timeout_s
    path = str(_path(folder, generation))
    while True:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise RankLostError(f"The first rank of this machine did not pass its segment within {timeout_s:g} s.")
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
            connection.settimeout(remaining_s)
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
