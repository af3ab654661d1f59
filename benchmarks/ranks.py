"""Several ranks compared with one of as many threads: `python -m benchmarks.ranks --model FOLDER`.

Workers with --tp-size 1 and --tp-size N, one at a time and interleaved, speculation off, all CPUs used by both: output
tokens/s with 1, 8 and 32 clients, start to first token, and memory. With --over-tcp, also N ranks that exchange over
TCP as those of N machines do (machines.py). Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
from pathlib import Path

from benchmarks.compare import Arm, Figures, Load, keep_rounds, our_worker, read_rounds, run_round

ONE = "1 rank"
RATE = "output_tokens_per_s"
START, MEMORY = "start to first token, s", "resident after, MiB"


def loads(tokens: int) -> list[Load]:
    def client(concurrency: int, requests: int) -> list[str]:
        counts = ["--concurrency", str(concurrency), "--requests", str(requests), "--prompt-words", "32"]
        return [*counts, "--max-tokens", str(tokens), "--ignore-eos"]

    return [
        Load("1 client, tokens/s", client(1, 3), RATE),
        Load("8 clients, tokens/s", client(8, 16), RATE),
        Load("32 clients, tokens/s", client(32, 32), RATE),
    ]


def print_table(arms: list[Arm], titles: list[str], found: Figures) -> None:
    print("\n| | " + " | ".join(arm.name for arm in arms) + " | ratio of medians to the first |")
    print("|---|" + "---|" * (len(arms) + 1))
    for title in titles:
        middles = [statistics.median(found[arm.name, title]) for arm in arms]
        ratios = ", ".join(f"{middle / middles[0]:.2f}" for middle in middles[1:])
        print(f"| {title} | " + " | ".join(f"{middle:.4g}" for middle in middles), f"| {ratios} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Several ranks compared with one of as many threads.")
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--over-tcp", action="store_true", help="also ranks that exchange over TCP")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--keep", type=Path, help="file of rounds: earlier ones are included, and new ones added")
    args = parser.parse_args()
    args.ours = []
    # On SIGTERM, unwind the stack so that no servers are left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cpus = os.cpu_count() or 1
    one, several = our_worker(args, "off"), our_worker(args, "off")
    threads = max(1, cpus // args.tp_size)
    arms = [
        Arm(ONE, *one),
        Arm(
            f"{args.tp_size} ranks",
            [*several[0], "--tp-size", str(args.tp_size)],
            several[1],
            threads=threads,
        ),
    ]
    if args.over_tcp:
        (_, _, _, *flags), port = our_worker(args, "off")
        command = [sys.executable, "-m", "benchmarks.machines", str(args.tp_size), *flags]
        arms.append(Arm(f"{args.tp_size} ranks over TCP", command, port, threads=threads))
    rows = loads(args.max_tokens)
    found = read_rounds(args.keep)
    done = max((len(values) for values in found.values()), default=0)
    for seed in range(done + 1, done + args.rounds + 1):
        # Each goes first in every second round.
        run_round(arms[:: 1 if seed % 2 else -1], rows, seed, found)
        keep_rounds(args.keep, found)
    print_table(arms, [*(load.title for load in rows), START, MEMORY], found)


if __name__ == "__main__":
    main()
