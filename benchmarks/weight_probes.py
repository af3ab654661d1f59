"""Probes of `benchmarks.quantized`, each in its own process: `python -m benchmarks.weight_probes PROBE --help`.

Each probe measures one thing on a fresh heap and prints one JSON row. Modules are imported and kernels are built before
the clock starts.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from demo_model.evaluate import Case, Outcome, all_cases
from fastserve.engine.build import build_core
from fastserve.engine.contract import EngineRequest, SamplingParams
from fastserve.engine.huge_pages import map_bytes
from fastserve.engine.kernels.build import cpu_library
from fastserve.engine.kernels.packed_linear import PackedLinearKernel
from fastserve.engine.loading import loader as loading
from fastserve.engine.loading.checkpoint import StoredTensor, open_folder
from fastserve.engine.loading.loader import load_model
from fastserve.engine.memory import begin_loading, end_loading
from fastserve.engine.plan import Chunk, NewSequence, StepPlan
from fastserve.engine.runner.runner import ModelRunner
from fastserve.engine.settings import EngineConfig, WeightOptions
from tests.engine.packers import Tensors, gptq, round_to_nearest, write_packed

BITS = 4
_BLOCK_SIZE = 16
Row = dict[str, Any]


# ---- loading ----------------------------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> Row:
    """Seconds of `load_model` and of its reference logits; bytes of the weights; and resident memory before, at its
    peak and after, in bytes."""
    cpu_library(torch.bfloat16), cpu_library(torch.float32)
    MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(args.model))]  # imports the model's code
    begin_loading()
    before = _status("VmRSS")
    check = _timed(loading, "own_logits")
    begin = time.perf_counter()
    loaded = load_model(
        args.model,
        "cpu",
        args.dtype,
        trust_remote_code=False,
        progress=lambda *_: None,
        options=WeightOptions(quantize=args.quantize),
    )
    load_s = time.perf_counter() - begin
    peak = _status("VmHWM")
    gc.collect()
    end_loading()
    weights = {storage.data_ptr(): storage.nbytes() for storage in _storages(loaded.model)}
    return {
        "load_s": load_s,
        "check_s": sum(check),
        "weights": sum(weights.values()),
        "before": before,
        "peak": peak,
        "after": _status("VmRSS"),
    }


def _timed(owner: Any, name: str) -> list[float]:
    """Record the seconds of each future call of a function."""
    function, times = getattr(owner, name), []

    def timed(*args: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*args)
        finally:
            times.append(time.perf_counter() - begin)

    setattr(owner, name, timed)
    return times


def _status(field: str) -> int:
    """A memory figure of this process in bytes. (The peak of getrusage may be that of the parent process.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def _storages(model: torch.nn.Module) -> Iterator[torch.UntypedStorage]:
    """The storages of all tensors that modules hold, as parameters or in weight layouts; some more than once."""
    seen: set[int] = set()
    waiting: list[Any] = list(model.modules())
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            yield item.untyped_storage()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
        elif isinstance(item, torch.nn.Module) or type(item).__module__.startswith("fastserve."):
            waiting += vars(item).values() if hasattr(item, "__dict__") else ()


def baseline(args: argparse.Namespace) -> Row:
    """Seconds of the work that no loader can avoid: one tensor after the other is read from the file into the same
    buffer, and packed from there by the engine's kernel, with as many threads as the loader has. Tensors that the
    kernel does not support are copied. No model is built, nothing is checked or read ahead."""
    kernel = PackedLinearKernel.load(getattr(torch, args.dtype))
    if kernel is None:
        raise SystemExit("there is no packing kernel for this machine, so there is nothing to compare with")
    begin = time.perf_counter()
    tensors = open_folder(Path(args.model)).values()
    kept = [kernel.pack(value) if kernel.supports(value) else value.clone() for value in _read_each(tensors)]
    return {"load_s": time.perf_counter() - begin, "weights": sum(packed.nbytes for packed in kept)}


def _read_each(tensors: Iterable[StoredTensor]) -> Iterator[torch.Tensor]:
    """Yields the tensors in one shared buffer: each is overwritten by the next."""
    stored = list(tensors)
    buffer = map_bytes(max(tensor.num_bytes for tensor in stored))
    memory, flat = buffer.data, torch.from_numpy(buffer)
    for file in dict.fromkeys(tensor.file for tensor in stored):
        with file.open("rb", buffering=0) as stream:
            header = int.from_bytes(stream.read(8), "little")
            entries: Row = json.loads(stream.read(header))
            for tensor in (tensor for tensor in stored if tensor.file == file):
                stream.seek(8 + header + int(entries[tensor.name]["data_offsets"][0]))
                done = 0
                while done < tensor.num_bytes:
                    done += stream.readinto(memory[done : tensor.num_bytes])
                yield flat[: tensor.num_bytes].view(tensor.dtype).view(tensor.shape)


# ---- a GPTQ checkpoint ------------------------------------------------------------------------------------------


def pack(args: argparse.Namespace) -> Row:
    """Quantize the model asymmetrically in groups of `--group`, rounding to nearest, into the folder `--out`."""
    source, out = Path(args.model), Path(args.out)
    write_packed(args.model, out, _packer(args.group), _settings(args.group))
    for file in source.iterdir():
        if file.is_file() and not (out / file.name).exists() and file.suffix in (".json", ".jinja", ".txt", ".model"):
            shutil.copy(file, out / file.name)
    return {"bytes": (out / "model.safetensors").stat().st_size}


def _packer(group: int) -> Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]:
    def pack_layer(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rounded = round_to_nearest(weight, BITS, group)
        return gptq(name, rounded, BITS), rounded.dense()

    return pack_layer


def _settings(group: int) -> Row:
    return {"quant_method": "gptq", "bits": BITS, "group_size": group, "desc_act": False, "sym": False}


# ---- quality ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GreedyAnswer:
    group: str
    question: str
    text: str
    right: bool


def answers(args: argparse.Namespace) -> Row:
    """The engine's greedy answers to the demo model's held-out questions, in this process and without speculation."""
    config = EngineConfig(
        model_dir=args.model,
        device="cpu",
        dtype=args.dtype,
        max_total_tokens=1 << 15,
        speculative_method="off",
        weights=WeightOptions(quantize=args.quantize),
    )
    core = build_core(config, lambda *_: None)
    questions = _questions(args.model)
    eos = core.info.eos_token_ids
    for number, (_, case, prompt) in enumerate(questions):
        params = SamplingParams(case.max_new_tokens, temperature=0.0, stop_token_ids=eos)
        refused = core.add(EngineRequest(str(number), prompt, params))
        if refused is not None:
            raise SystemExit(f"a question was refused: {refused.error}")
    ids: dict[str, list[int]] = {str(number): [] for number in range(len(questions))}
    while core.has_work:
        for output in core.step():
            ids[output.request_id] += output.token_ids
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    found = []
    for written, (group, case, _) in zip(ids.values(), questions, strict=True):
        ended = written[-1] in eos
        text = tokenizer.decode(written[:-1] if ended else written, skip_special_tokens=True)
        found.append(GreedyAnswer(group, case.messages[-1]["content"], text, Outcome(case, text, ended).right))
    return {"answers": [asdict(answer) for answer in found]}


def _questions(model: str) -> list[tuple[str, Case, list[int]]]:
    """Group, case and prompt of each question."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [
        (
            group,
            case,
            tokenizer.apply_chat_template(
                case.messages, tools=case.tools or None, add_generation_prompt=True, return_dict=False
            ),
        )
        for group, cases in all_cases().items()
        for case in cases
    ]


def logits(args: argparse.Namespace) -> Row:
    """Maximum error over all questions of the engine's logits with packed weights, compared with plain torch in float32
    with the dequantized weights, relative to the question's largest logit. In float32 this is the error of the kernel;
    in `--dtype` it includes rounding, which plain torch in that dtype (`plain`) shows alone."""
    prompts = [prompt for _, _, prompt in _questions(args.model)][:: args.every]
    with tempfile.TemporaryDirectory() as folder:
        model = write_packed(args.model, Path(folder), _packer(args.group), _settings(args.group))
        reference = _plain_logits(model, prompts)
        found = {
            "float32": _engine_logits(folder, "float32", prompts),
            "half": _engine_logits(folder, args.dtype, prompts),
        }
        found["plain"] = _plain_logits(model.to(getattr(torch, args.dtype)), prompts)
    return {name: float(_relative(values, reference).max()) for name, values in found.items()}


def _relative(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (found - expected).abs().amax(-1) / expected.abs().amax(-1)


def _plain_logits(model: torch.nn.Module, prompts: list[list[int]]) -> torch.Tensor:
    with torch.inference_mode():
        rows = [model(torch.tensor([prompt]), use_cache=False).logits[0, -1].float() for prompt in prompts]
    return torch.stack(rows)


def _engine_logits(model: str, dtype: str, prompts: list[list[int]]) -> torch.Tensor:
    loaded = load_model(model, "cpu", dtype, trust_remote_code=False, progress=lambda *_: None)
    longest = max(map(len, prompts))
    num_blocks = -(-longest // _BLOCK_SIZE)
    runner = ModelRunner(loaded, num_blocks=num_blocks, block_size=_BLOCK_SIZE, max_num_seqs=1, max_model_len=longest)
    rows = []
    for prompt in prompts:
        new = NewSequence(0, prompt, len(prompt), SamplingParams(max_tokens=1), 0)
        chunk = Chunk(0, 0, len(prompt), list(range(num_blocks)), sample=True)
        rows.append(runner.forward(StepPlan([], [new], [chunk]))[0].float().clone())
        runner.forget([0])
    return torch.stack(rows)


PROBES: dict[str, Callable[[argparse.Namespace], Row]] = {
    probe.__name__: probe for probe in (load, baseline, pack, answers, logits)
}


def main() -> None:
    parser = argparse.ArgumentParser(description="One figure of a model's weights, as a JSON row.")
    parser.add_argument("probe", choices=PROBES)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize", choices=("int8", "nf4"), help="quantize while loading")
    parser.add_argument("--group", type=int, default=128, help="inputs that share a scale, for pack and logits")
    parser.add_argument("--every", type=int, default=1, help="logits: use every N-th question")
    parser.add_argument("--out", help="pack: the folder to write")
    args = parser.parse_args()
    print(json.dumps(PROBES[args.probe](args)))


if __name__ == "__main__":
    main()
