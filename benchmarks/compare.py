"""fastserve compared with its peers on one machine, arms interleaved: `python -m benchmarks.compare --help`.

Each round starts one server after the other, runs every load on it, and stops it; the table shows medians over the
rounds and the ratio to fastserve. A peer takes part when its program is given. All of them serve the same weights;
prompts and answers have fixed lengths, and all answers are greedy. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

MODEL = "m"
OURS = "fastserve"
START_TIMEOUT_S = 300.0
LOAD_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Arm:
    name: str
    command: list[str]
    port: int
    keepalive: bool = True
    threads: int | None = None
    """Of each process that computes; None: as many as there are CPUs."""


@dataclass(frozen=True)
class Load:
    """One row of the table: the client's flags, and the figure to report."""

    title: str
    flags: list[str]
    figure: str
    higher_is_better: bool = True
    background: tuple[str, ...] = ()
    """Flags of a second client that runs at the same time and is not measured."""


def loads(tokens: int) -> list[Load]:
    def client(concurrency: int, requests: int, words: int = 128, *more: str) -> list[str]:
        counts = ["--concurrency", str(concurrency), "--requests", str(requests), "--prompt-words", str(words)]
        return [*counts, "--max-tokens", str(tokens), "--ignore-eos", *more]

    rate = "output_tokens_per_s"
    long = ("--concurrency", "1", "--requests", "6", "--prompt-words", "2000", "--max-tokens", "1", "--ignore-eos")
    return [
        Load("1 client, tokens/s", client(1, 4), rate),
        Load("8 clients, tokens/s", client(8, 18), rate),
        Load("32 clients, tokens/s", client(32, 64), rate),
        Load("32 clients, TTFT p99, s", client(32, 64), "ttft_p99_s", higher_is_better=False),
        Load("16 clients, 512 shared, tokens/s", client(16, 32, 32, "--shared-prefix", "512"), rate),
        Load("gap p99 beside prompts of 2000, s", client(4, 12), "gap_p99_s", higher_is_better=False, background=long),
    ]


# ---- servers ----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def our_worker(args: argparse.Namespace, speculative_method: str) -> tuple[list[str], int]:
    """A worker that sends a chunk for each token, as the peers do."""
    port = free_port()
    command = [sys.executable, "-m", "fastserve.model_worker", "--model-path", args.model, "--model-names", MODEL]
    command += ["--dtype", args.dtype, "--port", str(port), "--no-register", "--max-total-tokens", "32768"]
    command += ["--stream-interval", "1", "--speculative-method", speculative_method, *args.ours]
    return command, port


def make_arms(args: argparse.Namespace) -> list[Arm]:
    arms = [Arm(OURS, *our_worker(args, "off"))]
    if args.speculation:
        arms.append(Arm(f"{OURS}, n-gram", *our_worker(args, "ngram")))
    if args.llama_server:
        port = free_port()
        command = [args.llama_server, "-m", args.gguf, "-t", str(os.cpu_count()), "-np", "32", "-c", "98304", "-cb"]
        arms.append(Arm("llama.cpp", [*command, "--port", str(port)], port, keepalive=False))
    if args.vllm:
        port = free_port()
        command = [args.vllm, "serve", args.model, "--served-model-name", MODEL, "--dtype", args.dtype]
        arms.append(Arm("vLLM", [*command, "--max-model-len", "4096", "--port", str(port)], port))
    return arms


@contextlib.contextmanager
def serving(arm: Arm) -> Iterator[psutil.Process]:
    cores = os.cpu_count() or 1
    environ = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
        # Left alone, vLLM keeps one core free of its threads.
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
        "OMP_NUM_THREADS": str(arm.threads or cores),
    }
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(arm.command, stdout=log, stderr=log, env=environ, start_new_session=True)
        try:
            wait_ready(arm, process, log)
            yield psutil.Process(process.pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_ready(arm: Arm, process: subprocess.Popen[bytes], log: Any) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    # Ours is healthy while its model loads; the others have no other route.
    path = "health" if arm.name in ("llama.cpp", "vLLM") else "ready"
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{arm.port}/{path}", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    log.seek(0)
    sys.exit(f"{arm.name} did not start:\n{log.read()[-3000:].decode(errors='replace')}")


def resident_mib(process: psutil.Process) -> float:
    """Proportional memory (PSS) of the process tree in MiB; shared memory counts once."""
    return sum(member.memory_full_info().pss for member in [process, *process.children(recursive=True)]) / 2**20


# ---- rounds -----------------------------------------------------------------------------------------------------


def client_command(arm: Arm, flags: list[str], seed: int) -> list[str]:
    base = [sys.executable, "-m", "benchmarks.load", "--base-url", f"http://127.0.0.1:{arm.port}/v1", "--model", MODEL]
    return [*base, "--seed", str(seed), *flags, *([] if arm.keepalive else ["--no-keepalive"])]


def run_load(arm: Arm, load: Load, seed: int) -> dict[str, Any]:
    background = subprocess.Popen(client_command(arm, list(load.background), seed + 50)) if load.background else None
    try:
        done = subprocess.run(
            client_command(arm, load.flags, seed), capture_output=True, text=True, timeout=LOAD_TIMEOUT_S, check=False
        )
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[0])
        if row["errors"]:
            print(f"{arm.name}, {load.title}: {row['errors']} errors: {done.stderr}", file=sys.stderr)
        return row
    finally:
        if background is not None:
            background.terminate()
            background.wait()


def run_round(arms: list[Arm], rows: list[Load], seed: int, found: Figures) -> None:
    for arm in arms:
        begin = time.monotonic()
        with serving(arm) as process:
            subprocess.run(
                client_command(arm, ["--concurrency", "1", "--requests", "1", "--max-tokens", "1"], 0),
                check=True,
                stdout=subprocess.DEVNULL,
            )
            found.setdefault((arm.name, "start to first token, s"), []).append(time.monotonic() - begin)
            results: dict[str, dict[str, Any]] = {}
            for number, load in enumerate(rows):
                key = " ".join([*load.flags, *load.background])
                # Each load has its own prompts; otherwise they would be in the prefix cache.
                results[key] = results.get(key) or run_load(arm, load, seed * 100 + number)
                value = float(results[key][load.figure])
                found.setdefault((arm.name, load.title), []).append(value)
                print(f"round {seed}: {arm.name:10} {load.title:36} {value:10.4g}", flush=True)
            found.setdefault((arm.name, "resident after, MiB"), []).append(resident_mib(process))


Figures = dict[tuple[str, str], list[float]]
"""Figures by (arm, title), one for each round."""


def read_rounds(file: Path | None) -> Figures:
    if file is None or not file.exists():
        return {}
    return {(arm, title): values for arm, title, values in json.loads(file.read_text())}


def keep_rounds(file: Path | None, found: Figures) -> None:
    if file is not None:
        file.write_text(json.dumps([[arm, title, values] for (arm, title), values in found.items()]))


def print_table(arms: list[Arm], rows: list[Load], found: Figures) -> None:
    lower = {load.title for load in rows if not load.higher_is_better}
    titles = [*(load.title for load in rows), "start to first token, s", "resident after, MiB"]
    print("\n| load | " + " | ".join(f"{arm.name} (lowest..highest)" for arm in arms) + " |")
    print("|---|" + "---|" * len(arms))
    for title in titles:
        cells = []
        ours = statistics.median(found[OURS, title])
        for arm in arms:
            values = found[arm.name, title]
            middle = statistics.median(values)
            cell = f"{middle:.4g} ({min(values):.4g}..{max(values):.4g})"
            if arm.name != OURS:
                word = "of its" if title in lower or title in titles[-2:] else "x"
                cell += f", fastserve {ours / middle:.2f} {word}"
            cells.append(cell)
        print(f"| {title} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="fastserve compared with its peers, arms interleaved, medians over rounds."
    )
    parser.add_argument("--model", required=True, help="folder of the model, for fastserve and vLLM")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--llama-server", help="program of llama.cpp's server")
    parser.add_argument("--gguf", help="the model converted for llama.cpp, in the same dtype")
    parser.add_argument("--vllm", help="vLLM's program")
    parser.add_argument("--speculation", action="store_true", help="a second arm of ours, with speculation")
    parser.add_argument("--keep", type=Path, help="file of rounds: earlier ones are included, and new ones added")
    parser.add_argument("--ours", nargs="*", default=[], help="more flags for fastserve's worker")
    args = parser.parse_args()
    # On SIGTERM, unwind the stack so that no servers are left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if args.llama_server and not (args.gguf and Path(args.gguf).exists()):
        parser.error("--llama-server needs --gguf with the converted model")
    arms, rows = make_arms(args), loads(args.max_tokens)
    found = read_rounds(args.keep)
    done = max((len(values) for values in found.values()), default=0)
    for seed in range(done + 1, done + args.rounds + 1):
        run_round(arms, rows, seed, found)
        keep_rounds(args.keep, found)
    print_table(arms, rows, found)


if __name__ == "__main__":
    main()
