"""The engine's decode steps compared with the machine's limits: `python -m benchmarks.limits --model FOLDER`.

A decode step of one sequence cannot be faster than reading the weights once; one of many sequences cannot be faster
than the matrix products alone. Both are measured here on the loaded weights, interleaved with steps of the engine.
Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable

import torch

from fastserve.engine.contract import SamplingParams
from fastserve.engine.layers.layouts.packed import GroupedWeight
from fastserve.engine.layers.linear import Linear
from fastserve.engine.loading.loader import load_model
from fastserve.engine.plan import Chunk, NewSequence, StepPlan
from fastserve.engine.runner.runner import ModelRunner

BLOCK_SIZE = 16
BATCHES = (1, 8, 32)
_LARGE = 1 << 23


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median duration of `repeats` runs, in seconds."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _memory(linear: Linear) -> torch.Tensor:
    """The memory of a packed weight; empty for other layouts."""
    if not isinstance(linear.layout, GroupedWeight):
        return torch.empty(0, dtype=torch.int64)
    struct = linear.layout.struct(None)
    size = struct.out * getattr(struct, "in") * linear.layout.get().itemsize // 8 * 8
    return torch.frombuffer((ctypes.c_char * size).from_address(struct.data), dtype=torch.int64)


class Bench:
    def __init__(self, model: str, dtype: str | None, context: int) -> None:
        self._loaded = load_model(model, "cpu", dtype, trust_remote_code=False, progress=lambda *_: None)
        self._context = context
        self._blocks = -(-(context + 1) // BLOCK_SIZE)
        self.runner = ModelRunner(
            self._loaded,
            num_blocks=self._blocks * max(BATCHES),
            block_size=BLOCK_SIZE,
            max_num_seqs=max(BATCHES),
            max_model_len=context + 1,
        )
        modules = self._loaded.model.modules()
        self.linears = [module for module in modules if isinstance(module, Linear)]
        entries = sum(linear.layout.get().numel() for linear in self.linears)
        self.weight_bytes = entries * int(self._loaded.dtype.itemsize)

    def _width(self, linear: Linear) -> int:
        return int(linear.layout.get().shape[1])

    def _input(self, linear: Linear, rows: int) -> torch.Tensor:
        return torch.randn(rows, self._width(linear), dtype=self._loaded.dtype)

    def read_s(self) -> float:
        """Seconds to read all weights, at the rate at which all threads sum up the large ones."""
        large = [memory for memory in map(_memory, self.linears) if memory.numel() * 8 > _LARGE]

        def read() -> None:
            for memory in large:
                memory.sum()

        read_bytes: int = sum(memory.numel() * 8 for memory in large)
        all_bytes: int = self.weight_bytes
        return seconds(read, 7) * all_bytes / read_bytes

    def products_s(self, rows: int) -> float:
        inputs = [self._input(linear, rows) for linear in self.linears]

        def multiply() -> None:
            for linear, x in zip(self.linears, inputs, strict=True):
                linear.layout.product(x, linear.bias)

        with torch.inference_mode():
            return seconds(multiply, 7)

    def step_s(self, batch: int) -> float:
        """Seconds of a decode step of `batch` sequences with the context's tokens each, without sampling."""
        params = SamplingParams(max_tokens=1)
        length = self._context + 1
        new = [NewSequence(i, [1] * length, length, params, 0) for i in range(batch)]
        blocks = [list(range(i * self._blocks, (i + 1) * self._blocks)) for i in range(batch)]
        self.runner.forward(StepPlan([], new, [Chunk(i, 0, length, blocks[i], sample=True) for i in range(batch)]))
        plan = StepPlan([], [], [Chunk(i, self._context, 1, [], sample=True) for i in range(batch)])
        try:
            return seconds(lambda: self.runner.forward(plan), 15)
        finally:
            self.runner.forget(list(range(batch)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode steps compared with the machine's limits.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=160, help="tokens before the decoded one")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    bench = Bench(args.model, args.dtype, args.context)
    rounds = []
    for _ in range(args.rounds):
        read = bench.read_s()
        rounds.append((read, {batch: (bench.products_s(batch), bench.step_s(batch)) for batch in BATCHES}))
    read = statistics.median(found for found, _ in rounds)
    print(
        f"weights {bench.weight_bytes / 2**20:.0f} MiB, "
        f"read in {read * 1e3:.1f} ms ({bench.weight_bytes / read / 1e9:.1f} GB/s)"
    )
    print("| sequences | products alone, ms | step, ms | products / step | read / step |")
    print("|---|---|---|---|---|")
    for batch in BATCHES:
        products = statistics.median(found[batch][0] for _, found in rounds)
        step = statistics.median(found[batch][1] for _, found in rounds)
        print(f"| {batch} | {products * 1e3:.1f} | {step * 1e3:.1f} | {products / step:.2f} | {read / step:.2f} |")


if __name__ == "__main__":
    main()
