"""The all-reduce of ranks over shared memory compared with gloo's own: `python -m benchmarks.all_reduce`.

Two processes of one thread, which may use all CPUs (gloo has a thread for its sockets), add up tensors of one step's
rows, as after the layers of a model: our kernel with sums in rank order, and torch.distributed's all-reduce in place,
interleaved. Medians of a call in microseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from fastserve.engine.ranks.segment import Segment
from fastserve.engine.ranks.shared_memory import SharedMemoryCollectives

SIZE = 2
ROWS = (1, 8, 32, 256)
TIMEOUT_S = 60.0


def run_rank(rank: int, segment: Segment, file: Path, hidden: int, repeats: int) -> dict[str, dict[str, float]]:
    """Medians in microseconds by rows, then by way."""
    torch.set_num_threads(1)
    ours = SharedMemoryCollectives.load(segment, rank, TIMEOUT_S)
    if ours is None:
        sys.exit("there is no C++ compiler")
    gloo = dist.ProcessGroupGloo(dist.FileStore(str(file), SIZE), rank, SIZE, timedelta(seconds=TIMEOUT_S))
    found: dict[str, dict[str, float]] = {}
    for rows in ROWS:
        x = torch.ones(rows, hidden)
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda x=x: ours.all_reduce(x),  # type: ignore[misc]
            "gloo": lambda x=x: gloo.allreduce([x.fill_(1.0)]).wait(),  # type: ignore[misc]
        }
        found[str(rows)] = {}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, call in ways.items():
                for _ in range(10):
                    ours.barrier()
                    begin = time.perf_counter()
                    call()
                    times[way].append((time.perf_counter() - begin) * 1e6)
        found[str(rows)] = {way: statistics.median(values) for way, values in times.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Our all-reduce compared with gloo's.")
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--other", help=argparse.SUPPRESS)  # descriptor and file, in the process of rank 1
    args = parser.parse_args()
    if args.other:
        descriptor, file = json.loads(args.other)
        run_rank(1, Segment(descriptor, SIZE), Path(file), args.hidden, args.repeats)
        return
    segment = Segment.create(SIZE)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "meet"
        command = [sys.executable, "-m", "benchmarks.all_reduce", "--hidden", str(args.hidden)]
        command += ["--repeats", str(args.repeats), "--other", json.dumps([segment.descriptor, str(file)])]
        with subprocess.Popen(command, pass_fds=(segment.descriptor,)) as other:
            found = run_rank(0, segment, file, args.hidden, args.repeats)
            other.wait(TIMEOUT_S)
    print(f"| rows of {args.hidden} in float32 | ours, us | gloo, us | ratio |\n|---|---|---|---|")
    for rows, times in found.items():
        print(f"| {rows} | {times['ours']:.1f} | {times['gloo']:.1f} | {times['ours'] / times['gloo']:.2f} |")


if __name__ == "__main__":
    main()
