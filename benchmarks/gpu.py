"""The engine on one GPU, compared with the machine's limits and transformers' continuous batching.

Usage: `python -m benchmarks.gpu`. Both arms create a model with the shape of Llama 3.1 8B (or with fewer layers:
`--layers`) and random weights, and run interleaved. Each prefills prompts of random tokens and decodes greedily; a row
is the median over the rounds. The limit of decoding is the memory traffic of a step (all weights except the embedding
table, of which only rows are read, and the KV cache of all contexts) divided by the memory bandwidth; that of prefill
is the prompt's matrix products divided by the tensor cores' rate. With `--quantize`, fastserve's weights and the limit
have 8 or 4 bits. `--attention` times the attention kernel alone, and torch's.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LlamaConfig

from fastserve.engine.build import build_core
from fastserve.engine.contract import EngineRequest, SamplingParams
from fastserve.engine.core import EngineCore
from fastserve.engine.settings import EngineConfig, WeightOptions


@dataclass(frozen=True)
class Machine:
    """Peak or measured rates of a device."""

    bandwidth: float
    """Memory bandwidth, bytes/s"""
    flops: float
    """Rate of bfloat16 matrix products, FLOP/s"""

    def __str__(self) -> str:
        return f"{self.bandwidth / 1e12:.2f} TB/s and {self.flops / 1e12:.0f} TFLOP/s"


_KNOWN = {"H200": Machine(4.3e12, 790e12), "H100": Machine(3.35e12, 790e12)}


@dataclass(frozen=True)
class Decode:
    """A load: `batch` prompts of `context` tokens, with `new` generated tokens each."""

    batch: int
    context: int
    new: int


# ---- the model --------------------------------------------------------------------------------------------------


def shape(tiny: bool, layers: int) -> LlamaConfig:
    sizes = (256, 512, 4, 2, 1000) if tiny else (4096, 14336, 32, 8, 128256)
    hidden, intermediate, heads, kv_heads, vocabulary = sizes
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=16384,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def limits(
    config: LlamaConfig, machine: Machine, bits: int
) -> tuple[Callable[[Decode], float], Callable[[int], float]]:
    """Minimum seconds of a decode step of a load, and of the prefill of a number of tokens."""
    size, layers = config.hidden_size, config.num_hidden_layers
    kv_dim = size // config.num_attention_heads * config.num_key_value_heads
    per_layer = 2 * size * (size + kv_dim) + 3 * size * config.intermediate_size
    head = size * config.vocab_size

    def decode(load: Decode) -> float:
        kv_entries = load.batch * (load.context + load.new / 2) * 2 * kv_dim * layers
        return float((layers * per_layer * bits / 8 + 2 * (head + kv_entries)) / machine.bandwidth)

    def prefill(tokens: int) -> float:
        # The causal half of q k^T, and as much again for the product with the values.
        attention = 2 * tokens * tokens * size * layers
        return float(2 * tokens * layers * per_layer + 2 * head + attention) / machine.flops

    return decode, prefill


# ---- arms -------------------------------------------------------------------------------------------------------


def prompts(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, vocabulary) for _ in range(length)] for _ in range(count)]


class Ours:
    name = "fastserve"

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        max_tokens = max(args.batches) * (args.context + args.new_tokens)
        self._core: EngineCore = build_core(
            EngineConfig(
                model_dir=str(folder),
                device=args.device,
                dtype="bfloat16",
                block_size=args.block_size,
                max_num_seqs=max(args.batches),
                max_num_batched_tokens=args.prefill,
                max_model_len=max(args.prefill, args.context + args.new_tokens) + 64,
                max_total_tokens=max(max_tokens, args.prefill) + 64 * (max(args.batches) + 2),
                no_prefix_cache=True,
                speculative_method="off",
                weights=WeightOptions(dummy=True, quantize=args.quantize),
            ),
            lambda *_: None,
        )

    def first_token_s(self, prompt: list[int]) -> float:
        begin = time.perf_counter()
        self._add([prompt], 1)
        while self._core.has_work:
            self._core.step()
        return time.perf_counter() - begin

    def step_s(self, all_prompts: list[list[int]], new_tokens: int) -> float:
        """Median seconds of a step in which all sequences decode."""
        self._add(all_prompts, new_tokens)
        counts = dict.fromkeys(map(str, range(len(all_prompts))), 0)
        times = []
        while self._core.has_work:
            decoding = all(counts.values())
            begin = time.perf_counter()
            outputs = self._core.step()
            if decoding and len(outputs) == len(all_prompts):
                times.append(time.perf_counter() - begin)
            for output in outputs:
                counts[output.request_id] += len(output.token_ids)
        return statistics.median(times)

    def _add(self, all_prompts: list[list[int]], new_tokens: int) -> None:
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0)
        for index, prompt in enumerate(all_prompts):
            refused = self._core.add(EngineRequest(str(index), prompt, params))
            if refused is not None:
                raise RuntimeError(f"the engine refused a prompt: {refused.error}")


class Transformers:
    """transformers' continuous batching. Prefill runs without CUDA graphs, which would be captured for each new size,
    and decoding with them: each is faster that way. The KV cache is as large as the load needs: by default it and its
    masks take all memory."""

    name = "transformers"

    def __init__(self, config: LlamaConfig, args: argparse.Namespace) -> None:
        self._max_batch_tokens = args.prefill
        with torch.device(args.device):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation=args.peer_attention
            )
        self._model = model.eval().requires_grad_(False)

    def first_token_s(self, prompt: list[int]) -> float:
        result = self._generate([prompt], 1, use_graphs=False)[0]
        return float(result.timestamps[0] - result.lifespan[0])

    def step_s(self, all_prompts: list[list[int]], new_tokens: int) -> float:
        """Median seconds between tokens once all sequences have one."""
        results = self._generate(all_prompts, new_tokens, use_graphs=True)
        begin = max(result.timestamps[0] for result in results)
        times = [at for at in results[-1].timestamps if at >= begin]
        return float(statistics.median(after - before for before, after in itertools.pairwise(times)))

    def _generate(self, all_prompts: list[list[int]], new_tokens: int, *, use_graphs: bool) -> list[Any]:
        config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=1)
        block_size = ContinuousBatchingConfig().block_size
        batching = ContinuousBatchingConfig(
            num_blocks=sum(-(-(len(prompt) + new_tokens) // block_size) + 1 for prompt in all_prompts),
            max_batch_tokens=self._max_batch_tokens,
            use_cuda_graph=use_graphs,
        )
        found = self._model.generate_batch(
            inputs=all_prompts,
            generation_config=config,
            continuous_batching_config=batching,
            record_timestamps=True,
            progress_bar=False,
        )
        results = list(found.values())
        if len(results) != len(all_prompts) or any(result.error for result in results):
            raise RuntimeError("transformers' continuous batching did not answer all prompts")
        return results


# ---- the attention kernel alone ---------------------------------------------------------------------------------


def time_attention(config: LlamaConfig, args: argparse.Namespace, machine: Machine) -> None:
    """One layer's attention: prefill of one prompt with the paged KV cache and by torch's kernels, and decoding."""
    from fastserve.engine.kernels.device_step import DeviceStep
    from fastserve.engine.kernels.triton_attention import TritonPagedAttention

    device = torch.device(args.device)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim, size = config.hidden_size // heads, args.block_size
    kernel = TritonPagedAttention(device)

    def ours(batch: int, new: int, context: int) -> float:
        count = -(-context // size)
        kv_cache = [torch.randn(batch * count, kv_heads, size, dim, device=device).bfloat16() for _ in range(2)]
        table = torch.randperm(batch * count).view(batch, count).int().numpy()
        rows = [
            torch.randn(batch * new, number, dim, device=device).bfloat16() for number in (heads, kv_heads, kv_heads)
        ]
        starts = torch.arange(0, batch * new, new).int().numpy()
        counts, positions = starts * 0 + new, starts * 0 + context - new
        at = torch.arange(context - new, context).repeat(batch, 1).numpy()
        slots = (table[:, at[0] // size] * size + at % size).reshape(-1).astype("int32")
        step = DeviceStep.of(starts, counts, positions, table, slots, device)
        return seconds(
            lambda: kernel(
                step, *rows, *kv_cache, scaling=dim**-0.5, window=None, chunk=None, softcap=None, sinks=None
            ),
            device,
        )

    tokens = args.prefill
    flops = 2 * tokens * tokens * config.hidden_size
    q, k, v = (torch.randn(1, number, tokens, dim, device=device).bfloat16() for number in (heads, kv_heads, kv_heads))
    rows = [
        (f"prefill {tokens}, whole", ours(1, tokens, tokens)),
        (
            "  torch's attention",
            seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), device),
        ),
    ]
    for name, took in rows:
        print(f"{name:32} {took * 1e6:10.1f} us {flops / took / 1e12:8.1f} TFLOP/s")
    for batch in args.batches:
        took = ours(batch, 1, args.context)
        read = batch * args.context * kv_heads * dim * 2 * 2
        name = f"decode {batch} x {args.context}"
        print(f"{name:32} {took * 1e6:10.1f} us {read / took / machine.bandwidth:8.1%} of the memory's rate")


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a run; on CUDA within a graph, so that launch time does not count."""
    run()
    if device.type == "cuda":
        from triton.testing import do_bench_cudagraph

        return float(do_bench_cudagraph(run)) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measure(device: torch.device) -> Machine:
    """Measure the rates of summing 2 GiB and of a product of 8192 x 8192 matrices."""
    one, other, out = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(3))
    product_s = seconds(lambda: torch.matmul(one, other, out=out), device)
    source = torch.randn(1 << 29, device=device)
    reading_s = seconds(source.sum, device)
    return Machine(source.numel() * source.itemsize / reading_s, 2 * 8192**3 / product_s)


# ---- the table --------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace, folder: Path, config: LlamaConfig, machine: Machine) -> None:
    arms: list[Ours | Transformers] = [Ours(folder, args)]
    if not args.no_peer:
        arms.append(Transformers(config, args))
    decode_limit, prefill_limit = limits(config, machine, {None: 16, "int8": 8, "nf4": 4}[args.quantize])
    loads = [Decode(batch, args.context, args.new_tokens) for batch in args.batches]
    times: dict[tuple[str, str], list[float]] = {}
    rows: dict[str, float] = {f"prefill {args.prefill}": prefill_limit(args.prefill)}
    rows |= {f"decode {load.batch} x {load.context}": decode_limit(load) for load in loads}
    for number in range(-1, args.rounds):
        for arm in arms:
            taken = [arm.first_token_s(prompts(1, args.prefill, config.vocab_size, number)[0])]
            taken += [
                arm.step_s(prompts(load.batch, load.context, config.vocab_size, number), load.new) for load in loads
            ]
            print(
                f"round {number + 1}, {arm.name}: " + ", ".join(f"{took * 1e3:.3f}" for took in taken), file=sys.stderr
            )
            if number >= 0:  # the first round warms up
                for row, took in zip(rows, taken, strict=True):
                    times.setdefault((row, arm.name), []).append(took)
    print(
        f"{'':20}{'limit, ms':>11}"
        + "".join(f"{arm.name + ', ms':>18}{'of limit':>10}" for arm in arms)
        + (f"{'ratio':>8}" if len(arms) > 1 else "")
    )
    for row, limit in rows.items():
        medians = [statistics.median(times[row, arm.name]) for arm in arms]
        cells = "".join(f"{took * 1e3:18.3f}{limit / took:10.1%}" for took in medians)
        ratio = f"{medians[1] / medians[0]:8.2f}" if len(arms) > 1 else ""
        print(f"{row:20}{limit * 1e3:11.3f}{cells}{ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--quantize", choices=("int8", "nf4"), help="keep fastserve's weights in 8 or 4 bits")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to try the command itself")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prefill", type=int, default=8192)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--bandwidth", type=float, help="memory bandwidth, bytes/s (default: by the device's name, or measured)"
    )
    parser.add_argument("--no-peer", action="store_true", help="without transformers' continuous batching")
    parser.add_argument("--peer-attention", default="sdpa", help="transformers' attn_implementation")
    parser.add_argument("--attention", action="store_true", help="time the attention kernel alone")
    args = parser.parse_args()
    on_cuda = args.device == "cuda"
    name = torch.cuda.get_device_name() if on_cuda else args.device
    measured = measure(torch.device(args.device)) if on_cuda else None
    machine = next((known for key, known in _KNOWN.items() if key in name), measured)
    if args.bandwidth is not None:
        machine = Machine(args.bandwidth, machine.flops if machine else float("inf"))
    if machine is None:
        sys.exit(f"The bandwidth of {name} is not known: give it with --bandwidth.")
    config = shape(args.tiny, args.layers)
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{config.num_hidden_layers} layers, weights {args.quantize or 'bfloat16'}; limits by {machine}")
    if measured is not None:
        print(f"measured now: {measured}")
    if args.attention:
        time_attention(config, args, machine)
        return
    with tempfile.TemporaryDirectory(prefix="fastserve-gpu-") as temporary:
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(temporary)
        compare(args, Path(temporary), config, machine)


if __name__ == "__main__":
    main()
