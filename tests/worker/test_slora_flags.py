"""docs/slora.md says which of S-LoRA's flags the worker takes, and how."""

from __future__ import annotations

import re
from pathlib import Path

from fastserve.config import WorkerConfig
from fastserve.options import build_parser

PAGE = Path(__file__).parents[2] / "docs" / "slora.md"
FLAG = re.compile(r"`(--[A-Za-z0-9_-]+)`")
SLORA_FLAGS = frozenset(
    [
        "--host",
        "--port",
        "--model_dir",
        "--tokenizer_mode",
        "--max_total_token_num",
        "--batch_max_tokens",
        "--eos_id",
        "--running_max_req_size",
        "--tp",
        "--max_req_input_len",
        "--max_req_total_len",
        "--nccl_port",
        "--mode",
        "--trust_remote_code",
        "--disable_log_stats",
        "--log_stats_interval",
        "--lora-dirs",
        "--fair-weights",
        "--dummy",
        "--swap",
        "--pool-size-lora",
        "--prefetch",
        "--prefetch-size",
        "--scheduler",
        "--profile",
        "--batch-num-adapters",
        "--enable-abort",
        "--no-lora-swap",
        "--no-lora-compute",
        "--no-kernel",
        "--no-mem-pool",
        "--bmm",
        "--no-lora",
    ]
)


def rows() -> list[tuple[list[str], str]]:
    table = PAGE.read_text(encoding="utf-8").partition("\n## Flags\n")[2]
    cells = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| `--")]
    return [(FLAG.findall(flags), meaning.strip()) for flags, meaning in cells]


def worker_flags() -> set[str]:
    parser = build_parser(WorkerConfig, "worker")
    return {flag for action in parser._actions for flag in action.option_strings}


def test_every_flag_of_slora_has_a_row() -> None:
    documented = [flag for flags, _ in rows() for flag in flags]
    assert len(documented) == len(set(documented))
    assert set(documented) == SLORA_FLAGS


def test_rows_say_what_the_worker_takes() -> None:
    taken = worker_flags()
    for flags, meaning in rows():
        assert [flag for flag in FLAG.findall(meaning) if flag not in taken] == [], meaning
        is_same = meaning.startswith("the same")
        is_none = meaning.startswith("none")
        assert is_same or is_none or meaning.startswith("instead:") or FLAG.findall(meaning) or set(flags) <= taken
        for flag in flags:
            assert not is_same or flag in taken, flag
            assert not (is_none or meaning.startswith("instead:")) or flag not in taken, flag
