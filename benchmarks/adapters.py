"""Decode steps with many LoRA adapters in one batch: `python -m benchmarks.adapters --model FOLDER`.

One engine with random adapters decodes greedily, the arms interleaved: prompts of 16 random tokens, and all sequences
decode in each step that is timed. The bare base model is an arm of the same engine: rows without an adapter compute
what they would without adapters. Figures are medians over rounds of the median step, and the ratio to the bare base
model. Without `--model` the model has the shape of Llama 3.1 8B and random weights. Nothing else should run on the
machine.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from benchmarks.gpu import shape
from fastserve.engine.build import build_core
from fastserve.engine.contract import EngineRequest, SamplingParams
from fastserve.engine.core import EngineCore
from fastserve.engine.settings import AdapterOptions, EngineConfig, WeightOptions

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Kind:
    """Adapters of one rank for layers of some names."""

    name: str
    rank: int
    layers: tuple[str, ...]


KINDS = (Kind("r16, all linear layers", 16, ALL_LINEARS), Kind("r8, q k v o", 8, ATTENTION))


@dataclass(frozen=True)
class Arm:
    clients: int
    kind: Kind | None
    """None: the bare base model."""
    aim: float | None = None
    """Least speed as a share of the bare base model's."""


def write_adapter(folder: Path, kind: Kind, config: PreTrainedConfig) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in kind.layers and isinstance(module, torch.nn.Linear):
            out, width = module.weight.shape
            for name, size in (("A", (kind.rank, width)), ("B", (out, kind.rank))):
                tensors[f"base_model.model.{path}.lora_{name}.weight"] = (torch.randn(size) * 0.02).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": kind.rank, "lora_alpha": kind.rank, "target_modules": list(kind.layers)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def make_core(folder: str, adapters: Sequence[tuple[str, str]], args: argparse.Namespace) -> EngineCore:
    return build_core(
        EngineConfig(
            model_dir=folder,
            device=args.device,
            dtype="bfloat16",
            max_num_seqs=args.clients,
            max_model_len=PROMPT_TOKENS + args.new_tokens + 64,
            max_total_tokens=args.max_total_tokens,
            no_prefix_cache=True,
            speculative_method="off",
            weights=WeightOptions(dummy=args.model is None),
            adapters=AdapterOptions(modules=tuple(adapters), max_loras=len(adapters), max_cpu_loras=len(adapters)),
        ),
        lambda *_: None,
    )


def decode(core: EngineCore, arm: Arm, names: Sequence[str], vocabulary: int, new_tokens: int) -> list[float]:
    """Seconds of each step in which all sequences decode."""
    chosen = random.Random(arm.clients)
    counts = dict.fromkeys(map(str, range(arm.clients)), 0)
    for index in range(arm.clients):
        prompt = [chosen.randrange(2, vocabulary) for _ in range(PROMPT_TOKENS)]
        params = SamplingParams(new_tokens, temperature=0.0)
        adapter = "" if arm.kind is None else names[index]
        refused = core.add(EngineRequest(str(index), prompt, params, adapter=adapter))
        if refused is not None:
            raise RuntimeError(f"the engine refused a prompt: {refused.error}")
    times = []
    while core.has_work:
        decoding = all(counts.values())
        begin = time.perf_counter()
        outputs = core.step()
        if decoding and len(outputs) == arm.clients:
            times.append(time.perf_counter() - begin)
        for output in outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
            counts[output.request_id] += len(output.token_ids)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model; by default random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=32, help="of the model with random weights")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try this program")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-total-tokens", type=int, default=65536, help="of KV cache and adapters together")
    args = parser.parse_args()
    arms = [
        Arm(args.clients, None),
        Arm(args.clients, KINDS[0], 0.78),
        Arm(args.clients, KINDS[1], 0.92),
        Arm(1, None),
        Arm(1, KINDS[0], 0.90),
    ]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="fastserve-adapters-") as temporary:
        root = Path(temporary)
        folder = args.model
        if folder is None:
            folder = str(root / "model")
            shape(args.tiny, args.layers).save_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        names: dict[Kind, list[str]] = {}
        adapters = []
        for number, kind in enumerate(KINDS):
            # Each adapter has memory of its own, whatever its values are.
            write_adapter(root / f"kind{number}", kind, config)
            names[kind] = [f"kind{number}-{index}" for index in range(args.clients)]
            adapters += [(name, str(root / f"kind{number}")) for name in names[kind]]
        core = make_core(folder, adapters, args)
        times: dict[Arm, list[float]] = {arm: [] for arm in arms}
        for number in range(args.rounds + 1):
            for arm in arms:
                of_kind = [] if arm.kind is None else names[arm.kind]
                # Adapters are read in the first round, which is not counted.
                new_tokens = args.new_tokens if number else 4
                found = decode(core, arm, of_kind, config.vocab_size, new_tokens)
                if number:
                    times[arm].append(statistics.median(found))
        bare = {arm.clients: statistics.median(times[arm]) for arm in arms if arm.kind is None}
        print("| clients | adapters | step, ms | tokens/s | of the bare base | aim |\n|---|---|---|---|---|---|")
        for arm in arms:
            seconds = statistics.median(times[arm])
            name = "none" if arm.kind is None else f"{arm.clients} of {arm.kind.name}"
            print(
                f"| {arm.clients} | {name} | {seconds * 1e3:.2f} | {arm.clients / seconds:.0f} "
                f"| {bare[arm.clients] / seconds:.3f} | {arm.aim or ''} |"
            )


if __name__ == "__main__":
    main()
