"""S-LoRA's measurements on one worker: `python -m benchmarks.slora EXPERIMENT --model FOLDER`.

Requests of a generated trace (benchmarks/adapter_trace.py) are sent to `/generate_stream` at their times, whether or
not earlier ones are done. The arms of an experiment run one after the other, each on a worker of its own, and the table
has the medians over `--rounds`. Adapters have random values; each has files of its own.

- adapters: throughput with 5, 200 and 2,000 adapters of rank 8 on the attention's layers (the paper's setting S1), and
  with parts of the machinery left out. The rate is above what the machine can serve.
- prefetch: 200 adapters on disk, of which 16 are on the device at a time, and host memory has room for 16 more. The
  system is made to forget an adapter's files before each request, so that they really come from the disk.
- fairness: nine clients, alone and beside one with ten times the load of each. The models and adapters of these
  measurements have random values, whose tokens are often parts of characters: a stream would hold them back, and the
  time to the first token would be that of the first whole character. So a bias has all answers consist of words.
- memory: resident memory with 16 and 2,000 registered adapters, after a request for each of them.

Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
from transformers import AutoConfig, AutoTokenizer

from benchmarks.adapter_trace import Served, TraceRequest, TraceSettings, figures, make_trace
from benchmarks.adapters import ALL_LINEARS, ATTENTION, Kind, write_adapter
from benchmarks.compare import MODEL, Arm, free_port, resident_mib, serving
from benchmarks.load import WORDS

S1 = Kind("r8", 8, ATTENTION)
LARGE = Kind("r16-all", 16, ALL_LINEARS)
NUM_LIGHT_CLIENTS = 9
HEAVY_FACTOR = 10
MAX_OPEN_REQUESTS = 4000
NUM_ANSWER_WORDS = 64
"""Different words in answers of words."""
METRICS = {
    "loads": "fastserve_engine_lora_loads_total",
    "preemptions": "fastserve_engine_num_preemptions_total",
}
"""Counters of the worker that are shown, by title."""


@dataclass(frozen=True)
class Run:
    """One arm of an experiment."""

    name: str
    flags: tuple[str, ...]
    kind: Kind
    num_adapters: int
    trace: tuple[TraceRequest, ...]
    duration_s: float
    cut_s: float
    counted: frozenset[int] | None = None
    """Adapters whose requests the times are of; throughput is always of all. None: all of them."""
    drain_s: float = 0.0
    """Longest wait for the answers after the trace."""
    answers_words: bool = False
    """Whether each token of an answer is a word, so that it is sent at once; by `/v1/completions`."""
    is_cold: bool = False
    """Whether the system forgets the files of an adapter before each request for it."""


Result = dict[str, float]
"""Figures of one run, by title."""


# ---- experiments ------------------------------------------------------------------------------------------------


def adapters_runs(args: argparse.Namespace) -> list[Run]:
    def run(name: str, num_adapters: int, *flags: str) -> Run:
        flags = ("--max-num-seqs", "32", "--max-cpu-loras", str(max(num_adapters, 32)), *flags)
        trace = make_trace(replace(settings_of(args), num_adapters=num_adapters))
        return Run(name, flags, S1, num_adapters, tuple(trace), args.duration_s, args.cut_s)

    return [
        run("5 adapters", 5),
        run("200 adapters", 200),
        run("2000 adapters", 2000),
        run("200, no-lora-compute", 200, "--no-lora-compute"),
        run("200, no-mem-pool", 200, "--no-mem-pool"),
        run("200, bmm", 200, "--bmm"),
    ]


def prefetch_runs(args: argparse.Namespace) -> list[Run]:
    trace = tuple(make_trace(replace(settings_of(args), num_adapters=200)))
    bounds = ("--max-loras", "16", "--max-cpu-loras", "32")
    return [
        Run(name, (*bounds, flag), LARGE, 200, trace, args.duration_s, args.cut_s, drain_s=20.0, is_cold=True)
        for name, flag in (("without prefetch", "--no-prefetch"), ("with prefetch", "--prefetch"))
    ]


def fairness_runs(args: argparse.Namespace) -> list[Run]:
    settings = replace(settings_of(args), num_adapters=1)
    light = range(NUM_LIGHT_CLIENTS)
    requests = [
        replace(request, adapter=client)
        for client in range(NUM_LIGHT_CLIENTS + 1)
        for request in make_trace(
            replace(
                settings,
                seed=args.seed + client,
                rate=settings.rate / NUM_LIGHT_CLIENTS * (1 if client in light else HEAVY_FACTOR),
            )
        )
    ]
    trace = tuple(sorted(requests, key=lambda request: request.arrival_s))
    alone = tuple(request for request in trace if request.adapter in light)

    def run(name: str, scheduler: str, trace: tuple[TraceRequest, ...]) -> Run:
        flags = ("--max-num-seqs", "32", "--stream-interval", "1", "--scheduler", scheduler)
        number, bounds = NUM_LIGHT_CLIENTS + 1, (args.duration_s, args.cut_s)
        return Run(name, flags, S1, number, trace, *bounds, frozenset(light), args.cut_s, answers_words=True)

    return [
        run("nine alone", "vtc_fair", alone),
        run("ten, first come", "slora", trace),
        run("ten, fair", "vtc_fair", trace),
    ]


def memory_runs(args: argparse.Namespace) -> list[Run]:
    def run(num_adapters: int) -> Run:
        every = tuple(TraceRequest(index * 0.05, index, 8, 1) for index in range(num_adapters))
        flags = ("--max-loras", "16", "--max-cpu-loras", "16")
        return Run(f"{num_adapters} adapters", flags, S1, num_adapters, every, 2 * args.cut_s + 1, args.cut_s, None, 90)

    return [run(16), run(2000)]


EXPERIMENTS: dict[str, Callable[[argparse.Namespace], list[Run]]] = {
    "adapters": adapters_runs,
    "prefetch": prefetch_runs,
    "fairness": fairness_runs,
    "memory": memory_runs,
}


def settings_of(args: argparse.Namespace) -> TraceSettings:
    return TraceSettings(
        num_adapters=1,
        rate=args.rate,
        duration_s=args.duration_s,
        alpha=args.alpha,
        cv=args.cv,
        input_tokens=tuple(args.input_tokens),
        output_tokens=tuple(args.output_tokens),
        seed=args.seed,
    )


# ---- adapters ---------------------------------------------------------------------------------------------------


def name_of(index: int) -> str:
    return f"a{index}"


def adapter_folders(root: Path, model: str, kind: Kind, count: int) -> list[Path]:
    """Folders of `count` adapters; what is missing is written."""
    folder = root / kind.name
    first = folder / name_of(0)
    if not first.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_adapter(first, kind, AutoConfig.from_pretrained(model))
    found = [folder / name_of(index) for index in range(count)]
    for path in found:
        if not path.exists():
            shutil.copytree(first, path)
    return found


# ---- one run ----------------------------------------------------------------------------------------------------


def worker_arm(run: Run, args: argparse.Namespace, folders: Sequence[Path]) -> Arm:
    port = free_port()
    command = [sys.executable, "-m", "fastserve.model_worker", "--model-path", args.model, "--model-names", MODEL]
    command += ["--dtype", args.dtype, "--port", str(port), "--no-register", "--no-prefix-cache"]
    command += ["--max-total-tokens", str(args.max_total_tokens), "--speculative-method", "off", *run.flags]
    return Arm(run.name, [*command, "--lora-dirs", *map(str, folders)], port)


def body_of(request: TraceRequest, bias: dict[int, float] | None) -> dict[str, Any]:
    """`bias`: of tokens that are words, for `/v1/completions`; None: for `/generate_stream`."""
    rng = random.Random(repr(request))
    prompt, adapter = " ".join(rng.choices(WORDS, k=request.num_input_tokens)), name_of(request.adapter)
    if bias is None:
        parameters = {"max_new_tokens": request.num_output_tokens, "ignore_eos": True}
        return {"inputs": prompt, "lora_dir": adapter, "parameters": parameters}
    return {
        "model": adapter, "prompt": prompt, "max_tokens": request.num_output_tokens, "ignore_eos": True,
        "temperature": 0, "stream": True, "logit_bias": bias,
    }  # fmt: skip


def bias_of_words(model: str) -> dict[int, float]:
    """A bias by which answers consist of words, each a token."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = ((token_id, tokenizer.decode([token_id])) for token_id in range(len(tokenizer)))
    words = [token_id for token_id, text in texts if text[:1] == " " and text[1:].isascii() and text[1:].isalpha()]
    return dict.fromkeys(words[:NUM_ANSWER_WORDS], 100.0)


def forget(folder: Path) -> None:
    """The system keeps no pages of the folder's weights: reading them is reading from the disk."""
    with (folder / "adapter_model.safetensors").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


async def send(
    session: aiohttp.ClientSession,
    url: str,
    served: Served,
    begin_s: float,
    bias: dict[int, float] | None,
    cold: Sequence[Path] | None,
) -> None:
    await asyncio.sleep(begin_s + served.request.arrival_s - time.perf_counter())
    if cold is not None:
        forget(cold[served.request.adapter])
    body = body_of(served.request, bias)
    try:
        async with session.post(url, json=body) as response:
            if response.status != 200:
                served.error = f"{response.status}: {(await response.text())[:200]}"
                return
            async for line in response.content:
                if not line.startswith(b"data:") or (bias is not None and b'"text":" ' not in line):
                    continue
                if b'"finished":-1' in line:
                    served.error = line.decode()[:200]
                    return
                served.token_times_s.append(time.perf_counter() - begin_s)
    except aiohttp.ClientError as error:
        served.error = f"{type(error).__name__}: {error}"


async def drive(run: Run, port: int, bias: dict[int, float] | None, cold: Sequence[Path] | None) -> list[Served]:
    """Send the trace; answers that are not done in time are cut off. `cold`: folders that are read from the disk."""
    served = [Served(request) for request in run.trace]
    connector = aiohttp.TCPConnector(limit=MAX_OPEN_REQUESTS)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        url = f"http://127.0.0.1:{port}/{'generate_stream' if bias is None else 'v1/completions'}"
        begin_s = time.perf_counter() + 0.1
        tasks = [asyncio.create_task(send(session, url, item, begin_s, bias, cold)) for item in served]
        _, pending = await asyncio.wait(tasks, timeout=0.1 + run.duration_s + run.drain_s)
        for task in pending:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return served


def read_counters(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return {
        title: sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))
        for title, name in METRICS.items()
    }


def warm_up(port: int) -> None:
    """The first request of a worker is answered without an adapter."""
    body = json.dumps({"inputs": "warm up", "parameters": {"max_new_tokens": 8}}).encode()
    head = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/generate", body, head), timeout=60):
        pass


def measure(run: Run, args: argparse.Namespace, folders: Sequence[Path]) -> Result:
    arm = worker_arm(run, args, folders)
    begin = time.monotonic()
    with serving(arm) as process:
        start_s = time.monotonic() - begin
        warm_up(arm.port)
        before_mib = resident_mib(process)
        bias = bias_of_words(args.model) if run.answers_words else None
        served = asyncio.run(drive(run, arm.port, bias, folders if run.is_cold else None))
        counters = read_counters(arm.port)
        after_mib = resident_mib(process)
    errors = [item.error for item in served if item.error is not None]
    for error in errors[:3]:
        print(f"{run.name}: {error}", file=sys.stderr)
    counted = [item for item in served if run.counted is None or item.request.adapter in run.counted]
    bounds = {"duration_s": run.duration_s, "cut_s": run.cut_s, "slo_s": args.slo_s}
    of_all, of_counted = figures(served, **bounds), figures(counted, **bounds)
    found = replace(of_counted, requests_per_s=of_all.requests_per_s, output_tokens_per_s=of_all.output_tokens_per_s)
    more = {"start_s": start_s, "resident_before_mib": before_mib, "resident_mib": after_mib, "errors": len(errors)}
    return {**asdict(found), **counters, **more}


def table(names: Sequence[str], kept: dict[str, list[Result]]) -> str:
    titles = list(next(iter(kept.values()))[0])
    rows = [f"| arm | {' | '.join(titles)} | runs |", "|---" * (len(titles) + 2) + "|"]
    for name in names:
        if name in kept:
            medians = [statistics.median(result[title] for result in kept[name]) for title in titles]
            rows.append(f"| {name} | {' | '.join(f'{value:.4g}' for value in medians)} | {len(kept[name])} |")
    return "\n".join(rows)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--adapters", type=Path, help="folder where the adapters are kept; by default for this run only"
    )
    parser.add_argument("--arms", nargs="*", help="names of the arms to run; by default all")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="file of rounds: earlier ones are included, and new ones added")
    parser.add_argument("--rate", type=float, default=8.0, help="requests per second; of the nine clients together")
    parser.add_argument("--duration-s", type=float, default=40.0)
    parser.add_argument("--cut-s", type=float, default=8.0, help="time at begin and end that is not counted")
    parser.add_argument("--slo-s", type=float, default=6.0, help="longest time to the first token that is of use")
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--cv", type=float, default=1.0)
    parser.add_argument("--input-tokens", type=int, nargs=2, default=(8, 128))
    parser.add_argument("--output-tokens", type=int, nargs=2, default=(8, 128))
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--max-total-tokens", type=int, default=16384, help="of KV cache and adapters together")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    # On SIGTERM, unwind the stack so that no server is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    runs = EXPERIMENTS[args.experiment](args)
    kept: dict[str, list[Result]] = {}
    if args.keep is not None and args.keep.exists():
        kept = json.loads(args.keep.read_text())
    with tempfile.TemporaryDirectory(prefix="fastserve-slora-") as temporary:
        for _ in range(args.rounds):
            for run in runs:
                if args.arms and run.name not in args.arms:
                    continue
                folders = adapter_folders(args.adapters or Path(temporary), args.model, run.kind, run.num_adapters)
                kept.setdefault(run.name, []).append(measure(run, args, folders))
                print(run.name, kept[run.name][-1], file=sys.stderr, flush=True)
                if args.keep is not None:
                    args.keep.write_text(json.dumps(kept))
    print(table([run.name for run in runs], kept))


if __name__ == "__main__":
    main()
