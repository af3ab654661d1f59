"""Logits of prompts by a way to compute steps, compared with those of the model's own code.

All prompts are computed in one batch: of unequal lengths, the longer ones in chunks, and each decodes its last token.
On the model itself each step reads all weights, so that ways share the work (see `Work`).
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from dataclasses import dataclass

import numpy as np
import torch

from fastserve.engine.contract import SamplingParams
from fastserve.engine.loading.reference import Prompt, Reference
from fastserve.engine.plan import Chunk, NewSequence, StepPlan
from fastserve.engine.runner.forward.forward_pass import ForwardPass
from fastserve.engine.runner.runner import ModelRunner

_CHUNK_ENDS = (5, 6, 17, 30)
"""Where long prompts are cut."""
_MIN_CHUNKED_LENGTH = 20


class Work(enum.Enum):
    """The part of the prompts that a way computes."""

    ALL = "all tokens"
    PREFILL = "all tokens but each prompt's last"
    MIXED = (
        "a batch of decode and prefill: the first prompt's last token, with the KV cache that another way left, and "
    )
    "all tokens of the other prompts"


@dataclass(frozen=True, slots=True)
class Capacity:
    """Sizes of an engine, which limit the prompts that it can compute."""

    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_model_len: int


def difference(
    reference: Reference, runner: ModelRunner, way: ForwardPass, capacity: Capacity, work: Work = Work.ALL
) -> float | None:
    """The distance of a way's logits from the reference (see `Reference`); None when no prompt fits the capacity."""
    which: list[int] = []
    free = capacity.num_blocks
    for index, prompt in enumerate(reference.prompts):
        needed = -(-len(prompt.token_ids) // capacity.block_size)
        if len(prompt.token_ids) > 1 and prompt.end <= capacity.max_model_len and needed <= free:
            which.append(index)
            free -= needed
    which = which[: capacity.max_num_seqs]
    if not which:
        return None
    prompts = [reference.prompts[index] for index in which]
    chunks = [_chunks(prompt, work, is_first=index == 0) for index, prompt in enumerate(prompts)]
    found = _engine_logits(prompts, chunks, runner, way, capacity.block_size)
    return reference.distance(
        found, {index: (of_prompt[0][0], of_prompt[-1][1]) for index, of_prompt in zip(which, chunks, strict=True)}
    )


def _engine_logits(
    prompts: list[Prompt], chunks: list[list[tuple[int, int]]], runner: ModelRunner, way: ForwardPass, block_size: int
) -> torch.Tensor:
    """Logits (tokens of these chunks of the prompts, vocabulary)"""
    blocks = _blocks(prompts, block_size)
    params = SamplingParams(max_tokens=1)
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    held: list[int] = []
    try:
        # Short prompts come late, so that all decode in the last step.
        for steps_left in range(max(map(len, chunks)), 0, -1):
            new, planned = [], []
            for seq_id, of_prompt in enumerate(chunks):
                if steps_left > len(of_prompt):
                    continue
                is_new = steps_left == len(of_prompt)
                if is_new:
                    token_ids = prompts[seq_id].token_ids
                    new.append(NewSequence(seq_id, token_ids, len(token_ids), params, 0))
                held_blocks = 0 if is_new else len(blocks[seq_id])
                new_blocks = blocks[seq_id] if is_new else []
                start, end = of_prompt[-steps_left]
                planned.append(
                    Chunk(seq_id, start, end - start, new_blocks, False, held_blocks, score_begin=start, score_end=end)
                )
            planned.sort(key=lambda chunk: chunk.num_tokens != 1)  # the order of the packed batch
            held += [sequence.seq_id for sequence in new]
            firsts = [prompts[chunk.seq_id].first_position for chunk in planned]
            logits = _forward(runner, way, StepPlan([], new, planned), firsts)
            for chunk, rows in zip(planned, logits.split([chunk.num_tokens for chunk in planned]), strict=True):
                found[chunk.seq_id].append(rows)
    finally:
        runner.forget(held)
    return torch.cat([rows for of_prompt in found for rows in of_prompt])


def _blocks(prompts: list[Prompt], block_size: int) -> list[list[int]]:
    """Blocks of each prompt: in falling order, so that a block's number is not its place in the sequence."""
    counts = [-(-len(prompt.token_ids) // block_size) for prompt in prompts]
    ends = itertools.accumulate(counts)
    return [list(range(end - 1, end - count - 1, -1)) for count, end in zip(counts, ends, strict=True)]


def _chunks(prompt: Prompt, work: Work, *, is_first: bool) -> list[tuple[int, int]]:
    """Begins and ends of the chunks of a prompt; the last token is decoded alone, unless the work is mixed."""
    length = len(prompt.token_ids)
    if work is Work.MIXED:
        return [(length - 1 if is_first else 0, length)]
    cuts = [end for end in _CHUNK_ENDS if end < length - 1] if length >= _MIN_CHUNKED_LENGTH else []
    chunks = list(itertools.pairwise([0, *cuts, length - 1, length]))
    return chunks[:-1] if work is Work.PREFILL else chunks


def _forward(runner: ModelRunner, way: ForwardPass, plan: StepPlan, first_positions: list[int]) -> torch.Tensor:
    """Logits of a step whose sequences begin at these positions."""
    step, num_rows = runner.pack(plan)
    positions = step.positions + np.repeat(np.array(first_positions), step.metadata.counts)
    moved = dataclasses.replace(step, positions=positions)
    return runner.forward_passes.logits(moved, way)[:num_rows].float().clone()
