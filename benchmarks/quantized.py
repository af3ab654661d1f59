"""Loading, and quantized weights compared with bfloat16: `python -m benchmarks.quantized --model FOLDER`.

Four variants of the same weights: bf16, 8 bits quantized while loading (--load-8bit), a 4-bit GPTQ checkpoint
(asymmetric, groups of 128, rounded to nearest; written into a temporary folder first), and nf4 (--load-4bit).

- `load`: the time of `load_model` in a fresh process, imports done and files in the page cache, compared with a process
  that only reads and packs the same tensors (see `weight_probes.baseline`), interleaved.
- `decode`: workers as processes, one at a time and interleaved, speculation off, with a load that is nearly all
  decoding: prompts of 16 words. The gap is the time between two tokens of an answer, without any prefill.
- `memory`: memory of the weights (parameters and layouts, each storage once), and resident memory that loading adds to
  a process that has imported torch and transformers. (The resident share of the libraries' files varies by the hour.)
- `quality`: the demo model's held-out questions, answered greedily by the engine in bfloat16; logits of the GPTQ
  variant compared with the dequantized weights in plain torch.

Memory and quality are the same in each run and measured once; other figures are medians over rounds. Nothing else
should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compare import Arm, Figures, Load, keep_rounds, our_worker, read_rounds, run_round
from fastserve.demo import demo_model_path
from fastserve.engine.client import ENGINE_ENVIRONMENT

PARTS = ("load", "decode", "memory", "quality")
PROBE_TIMEOUT_S = 600
PLAIN, INT8, GPTQ, NF4 = "bf16", "int8", "GPTQ 4-bit", "nf4"
BASELINE = "reading and packing"
VARIANTS = (PLAIN, INT8, GPTQ, NF4)
QUANTIZE = {INT8: "int8", NF4: "nf4"}
FLAGS = {INT8: ["--load-8bit"], NF4: ["--load-4bit"]}
LOAD_S, CHECK_S = "load, s", "of it the check of the model's own logits, s"
WEIGHTS, LIBRARIES = "weights, MiB", "resident before loading, MiB"
PROCESS, PEAK = "added by loading, MiB", "added while loading, at most, MiB"
PEAK_RATIO = "the same, of the weights"
SAME, RIGHT = "answers equal to those of bf16", "right answers"
LOGITS = "logits, float32, largest error"
LOGITS_HALF, LOGITS_PLAIN = "logits, bfloat16, largest error", "the same of plain torch in bfloat16"


@dataclass(frozen=True)
class Aim:
    """Target figure of one variant in one row."""

    variant: str
    bound: float
    is_minimum: bool = True

    def text(self, unit: str) -> str:
        return f"{self.variant} {'>=' if self.is_minimum else '<='} {self.bound:g}{unit}"


@dataclass(frozen=True)
class Line:
    """A row of a table: the figure of each variant, and its ratio to that of bf16."""

    title: str
    aims: tuple[Aim, ...] = ()
    unit: str = " x"
    """Unit of the aims: a ratio to bf16, or the unit of the figure itself."""
    show: Callable[[float], str] = "{:.4g}".format
    has_ratio: bool = True


def _percent(value: float) -> str:
    return f"{value:.2%}"


DECODE_LINES = (
    Line("1 client, tokens/s", (Aim(INT8, 1.3), Aim(GPTQ, 1.5))),
    Line("1 client, median gap, s"),
    Line("32 clients, tokens/s", (Aim(INT8, 0.9), Aim(GPTQ, 0.7))),
    Line("32 clients, median gap, s"),
    Line("start to first token, s"),
    Line("resident after, MiB"),
)
MEMORY_LINES = (
    Line(
        WEIGHTS, (Aim(INT8, 0.6, is_minimum=False), Aim(GPTQ, 0.4, is_minimum=False), Aim(NF4, 0.4, is_minimum=False))
    ),
    Line(PROCESS),
    Line(PEAK),
    Line(PEAK_RATIO, (Aim(PLAIN, 2, is_minimum=False),), "", has_ratio=False),
    Line(LIBRARIES, has_ratio=False),
)
QUALITY_LINES = (
    Line(SAME, (Aim(INT8, 99),), " %", _percent, has_ratio=False),
    Line(RIGHT, (Aim(GPTQ, 95),), " %", _percent, has_ratio=False),
    Line(LOGITS, (Aim(GPTQ, 1e-2, is_minimum=False),), "", "{:.2e}".format, has_ratio=False),
    Line(LOGITS_HALF, show="{:.2e}".format, has_ratio=False),
    Line(LOGITS_PLAIN, show="{:.2e}".format, has_ratio=False),
)


@dataclass(frozen=True)
class Sources:
    """Folders of the plain and the packed checkpoint."""

    model: str
    packed: str

    def of(self, variant: str) -> str:
        return self.packed if variant == GPTQ else self.model


# ---- measuring --------------------------------------------------------------------------------------------------


def probe(name: str, model: str, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.weight_probes", name, "--model", model, *flags]
    environ = ENGINE_ENVIRONMENT | os.environ
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False, env=environ)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def flags_of(variant: str) -> list[str]:
    return ["--quantize", QUANTIZE[variant]] if variant in QUANTIZE else []


def note(found: Figures, arm: str, title: str, value: float) -> None:
    found.setdefault((arm, title), []).append(value)
    print(f"{arm:20} {title:44} {value:10.4g}", flush=True)


def load_round(model: str, found: Figures) -> None:
    row = probe("load", model)
    note(found, PLAIN, LOAD_S, float(row["load_s"]))
    note(found, PLAIN, CHECK_S, float(row["check_s"]))
    note(found, BASELINE, LOAD_S, float(probe("baseline", model)["load_s"]))


def memory_round(sources: Sources, found: Figures) -> None:
    for variant in VARIANTS:
        row = probe("load", sources.of(variant), *flags_of(variant))
        note(found, variant, WEIGHTS, row["weights"] / 2**20)
        note(found, variant, PROCESS, (row["after"] - row["before"]) / 2**20)
        note(found, variant, LIBRARIES, row["before"] / 2**20)
        note(found, variant, PEAK, (row["peak"] - row["before"]) / 2**20)
        note(found, variant, PEAK_RATIO, (row["peak"] - row["before"]) / row["weights"])


def quality_round(sources: Sources, group: int, found: Figures) -> None:
    expected = probe("answers", sources.model)["answers"]
    for variant in VARIANTS:
        made = expected if variant == PLAIN else probe("answers", sources.of(variant), *flags_of(variant))["answers"]
        pairs = list(zip(made, expected, strict=True))
        note(found, variant, SAME, sum(own["text"] == other["text"] for own, other in pairs) / len(pairs))
        note(found, variant, RIGHT, sum(own["right"] for own in made) / len(made))
    row = probe("logits", sources.model, "--group", str(group), "--every", "4")
    for title, key in ((LOGITS, "float32"), (LOGITS_HALF, "half"), (LOGITS_PLAIN, "plain")):
        note(found, GPTQ, title, row[key])


def arms_of(sources: Sources) -> list[Arm]:
    return [
        Arm(
            variant,
            *our_worker(
                argparse.Namespace(model=sources.of(variant), dtype="bfloat16", ours=FLAGS.get(variant, [])), "off"
            ),
        )
        for variant in VARIANTS
    ]


def decode_loads(tokens: int) -> list[Load]:
    def client(concurrency: int, requests: int) -> list[str]:
        counts = ["--concurrency", str(concurrency), "--requests", str(requests), "--prompt-words", "16"]
        return [*counts, "--max-tokens", str(tokens), "--ignore-eos"]

    # All 32 begin and end together, so each step decodes for all of them.
    return [
        load
        for name, flags in (("1 client", client(1, 3)), ("32 clients", client(32, 32)))
        for load in (
            Load(f"{name}, tokens/s", flags, "output_tokens_per_s"),
            Load(f"{name}, median gap, s", flags, "gap_p50_s", higher_is_better=False),
        )
    ]


# ---- tables -----------------------------------------------------------------------------------------------------


def print_variants(title: str, lines: Sequence[Line], found: Figures) -> None:
    known = [line for line in lines if any((variant, line.title) in found for variant in VARIANTS)]
    if not known:
        return
    print(f"\n{title}\n\n| | {' | '.join(VARIANTS)} | aim |")
    print("|---|" + "---|" * (len(VARIANTS) + 1))
    for line in known:
        plain = found.get((PLAIN, line.title))
        cells = [
            _cell(found.get((variant, line.title)), plain if line.has_ratio and variant != PLAIN else None, line)
            for variant in VARIANTS
        ]
        aims = ", ".join(aim.text(line.unit) for aim in line.aims)
        print(f"| {line.title} | {' | '.join(cells)} | {aims} |")


def _cell(values: list[float] | None, plain: list[float] | None, line: Line) -> str:
    if not values:
        return ""
    middle = statistics.median(values)
    cell = line.show(middle)
    if max(values) > min(values):
        cell += f" ({line.show(min(values))}..{line.show(max(values))})"
    return cell if not plain else f"{cell}, {middle / statistics.median(plain):.2f} x"


def print_load(found: Figures) -> None:
    if (BASELINE, LOAD_S) not in found:
        return
    whole, checks, baseline = found[PLAIN, LOAD_S], found[PLAIN, CHECK_S], found[BASELINE, LOAD_S]
    weights = [load - check for load, check in zip(whole, checks, strict=True)]
    print("\nLoading in bfloat16, files in the page cache\n\n| | loader | reading and packing alone | ratio | aim |")
    print("|---|---|---|---|---|")
    for title, ours in (("until the weights are in place, s", weights), ("with the check of logits, s", whole)):
        line, ratio = Line(title), statistics.median(ours) / statistics.median(baseline)
        print(f"| {title} | {_cell(ours, None, line)} | {_cell(baseline, None, line)} | {ratio:.2f} | <= 1.3 |")


def print_tables(found: Figures) -> None:
    print_load(found)
    print_variants("Decoding over HTTP (ratio to bf16)", DECODE_LINES, found)
    print_variants("Memory (ratio to bf16)", MEMORY_LINES, found)
    print_variants("Quality (the demo model)", QUALITY_LINES, found)


# ---- the command ------------------------------------------------------------------------------------------------


def pack(model: str, group: int, folder: Path) -> Sources:
    probe("pack", model, "--group", str(group), "--out", str(folder))
    return Sources(model, str(folder))


def read_files(model: str) -> None:
    """Bring the files into the page cache."""
    for file in Path(model).glob("*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def run_parts(args: argparse.Namespace, scratch: Path, found: Figures) -> None:
    parts = args.parts
    if "quality" in parts:
        forget(QUALITY_LINES, found)
        quality_round(pack(demo_model_path(), args.group, scratch / "demo"), args.group, found)
        keep_rounds(args.keep, found)
    sources = Sources(args.model, "")
    if "decode" in parts or "memory" in parts:
        sources = pack(args.model, args.group, scratch / "packed")
    if "memory" in parts:
        forget(MEMORY_LINES, found)
        memory_round(sources, found)
        keep_rounds(args.keep, found)
    timed = [values for (_, title), values in found.items() if title in (LOAD_S, DECODE_LINES[0].title)]
    done = max(map(len, timed), default=0)
    for seed in range(done + 1, done + args.rounds + 1):
        if "load" in parts:
            read_files(args.model)
            load_round(args.model, found)
        if "decode" in parts:
            run_round(arms_of(sources), decode_loads(args.max_tokens), seed, found)
        keep_rounds(args.keep, found)


def forget(lines: Sequence[Line], found: Figures) -> None:
    """Drop figures of earlier runs that are measured only once."""
    for line in lines:
        for variant in VARIANTS:
            found.pop((variant, line.title), None)


def _parts(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(PARTS)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description="Loading, and quantized weights compared with bfloat16.")
    parser.add_argument("--model", required=True, help="folder of the model, with one model.safetensors")
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help=f"of {','.join(PARTS)}; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64, help="of each answer while decoding is measured")
    parser.add_argument("--group", type=int, default=128, help="inputs that share a scale in the GPTQ checkpoints")
    parser.add_argument("--keep", type=Path, help="file of rounds: earlier ones are included, and new ones added")
    args = parser.parse_args()
    # On SIGTERM, unwind the stack so that no servers and folders are left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    found = read_rounds(args.keep)
    with tempfile.TemporaryDirectory(prefix="fastserve-quantized-") as scratch:
        run_parts(args, Path(scratch), found)
    print_tables(found)


if __name__ == "__main__":
    main()
