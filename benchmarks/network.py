"""The all-reduce of two ranks over loopback TCP, as on two machines: `python -m benchmarks.network`.

Two processes of one thread, with and without encryption, and beside them gloo. Means of a call in microseconds.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fastserve.distributed.keys import CurveKeys
from fastserve.engine.kernels.build import cpu_library
from fastserve.engine.ranks.collectives import Collectives
from fastserve.engine.ranks.network import Machines, NetworkCollectives, NetworkRelay
from fastserve.engine.ranks.process_group import ProcessGroupCollectives
from fastserve.engine.ranks.segment import Segment

WAYS = ("plain", "encrypted", "gloo")
ROWS = (1, 8, 32, 512)
HIDDEN = 896
TIMEOUT_S = 30.0


def join(way: str, rank: int, folder: Path) -> Collectives:
    if way == "gloo":
        return ProcessGroupCollectives.join(folder / "meet", rank, 2, torch.device("cpu"), TIMEOUT_S)
    segment = Segment.create(2)
    keys = CurveKeys.derive("5e" * 32) if way == "encrypted" else None
    relay = NetworkRelay(segment, rank, Machines([1, 1], generation=1), keys)
    (folder / f"new{rank}").write_text(relay.address)
    (folder / f"new{rank}").rename(folder / f"{rank}")
    while not all((folder / f"{one}").exists() for one in range(2)):
        time.sleep(0.01)
    relay.join([(folder / f"{one}").read_text() for one in range(2)], TIMEOUT_S)
    library = cpu_library(torch.float32)
    assert library is not None
    return NetworkCollectives(library, segment, rank, TIMEOUT_S, relay)


def run_rank(way: str, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = join(way, rank, folder)
    for rows in ROWS:
        x = torch.ones(rows, HIDDEN)
        repeats = 300 if rows < 100 else 40
        for _ in range(5):
            ranks.all_reduce(x)
        begin = time.perf_counter()
        for _ in range(repeats):
            ranks.all_reduce(x)
        if rank == 0:
            print(f"{way:10} {rows:4} rows {(time.perf_counter() - begin) / repeats * 1e6:8.0f} us", flush=True)
    ranks.close()


def main() -> None:
    if len(sys.argv) > 1:
        run_rank(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
        return
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.network", way]
            processes = [subprocess.Popen([*command, str(rank), folder]) for rank in range(2)]
            for process in processes:
                process.wait(120)


if __name__ == "__main__":
    main()
