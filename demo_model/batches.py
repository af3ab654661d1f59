"""Endless training batches: conversations packed into rows, each seeing only itself."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer

from demo_model.chat import END, PAD, segments
from demo_model.data import (
    Exchange,
    Message,
    ask_name,
    make_exchange,
    make_plain_text,
    make_system,
    sample_name,
    sample_tools,
    tell_name,
)
from demo_model.tokenizer import CONTEXT_LENGTH

LONG_ROW = 768
# Row length, its share of the batches, and the share of conversations with tools in it. The three shapes keep attention
# cheap: most conversations are short, and tools alone take a hundred tokens.
ROWS = ((160, 0.48, 0.0), (320, 0.42, 0.42), (LONG_ROW, 0.1, 0.25))
DRILL_SHARE = 0.35
IGNORED = -100

Drills = tuple[Callable[[Random], Exchange], ...]


@dataclass(frozen=True)
class Sample:
    tokens: list[int]
    labels: list[int]  # the next token where the model has to write it, else IGNORED
    positions: list[int]


@dataclass(frozen=True)
class Batch:
    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor  # true where a token (row) may attend to another (column): in its own conversation


class Sampler:
    """Endless batches; if there are drills, they are a share of the exchanges."""

    def __init__(self, tokenizer: Tokenizer, seed: int, drills: Drills = ()) -> None:
        self._drills = drills
        self._tokenizer = tokenizer
        self._rng = Random(seed)
        self._pad = tokenizer.token_to_id(PAD)
        self._cache: dict[str, list[int]] = {}

    def batch(self, num_tokens: int) -> Batch:
        row_length, _, tools_share = self._rng.choices(ROWS, [share for _, share, _ in ROWS])[0]
        return self._pack(row_length, num_tokens // row_length, tools_share)

    def _pack(self, row_length: int, num_rows: int, tools_share: float) -> Batch:
        tokens = torch.full((num_rows, row_length), self._pad)
        labels = torch.full((num_rows, row_length), IGNORED)
        positions = torch.zeros((num_rows, row_length), dtype=torch.long)
        owners = torch.full((num_rows, row_length), -1)
        for row in range(num_rows):
            start = owner = misfits = 0
            while misfits < 4 and start < row_length - 16:
                sample = self._sample(row_length, tools_share)
                stop = start + len(sample.tokens)
                if stop > row_length:
                    misfits += 1
                    continue
                tokens[row, start:stop] = torch.tensor(sample.tokens)
                labels[row, start:stop] = torch.tensor(sample.labels)
                positions[row, start:stop] = torch.tensor(sample.positions)
                owners[row, start:stop] = owner
                start, owner = stop, owner + 1
        causal = torch.ones(row_length, row_length, dtype=torch.bool).tril()
        mask = (owners[:, None, :, None] == owners[:, None, None, :]) & causal
        return Batch(tokens, labels, positions, mask)

    def _sample(self, row_length: int, tools_share: float) -> Sample:
        rng = self._rng
        if rng.random() < 0.02:
            prompt, rest = make_plain_text(rng)
            return self._encode([[(prompt, False), (rest + END, True)]])
        if row_length == LONG_ROW:
            max_tokens, max_turns = rng.randint(200, LONG_ROW), 100
        else:
            max_tokens, max_turns = row_length, rng.choices((1, 2, 3, 4), (50, 22, 14, 14))[0]
        tools = sample_tools(rng) if rng.random() < tools_share else []
        messages: list[Message] = [make_system(rng)] if rng.random() < 0.35 else []
        parts = [segments(messages, tools)] if messages or tools else []
        num_tokens = sum(len(self._ids(text)) for part in parts for text, _ in part)
        name = None
        for _ in range(max_turns):
            kind = rng.random()
            if kind < 0.05:
                name = sample_name(rng)
                exchange = tell_name(rng, name)
            elif kind < (0.25 if name else 0.055):
                exchange = ask_name(rng, name)
            elif self._drills and not tools and rng.random() < DRILL_SHARE:
                exchange = rng.choice(self._drills)(rng)
            else:
                exchange = make_exchange(rng, tools)
            part = segments(exchange, [])
            size = sum(len(self._ids(text)) for text, _ in part)
            if num_tokens + size > max_tokens:
                break
            parts.append(part)
            num_tokens += size
        return self._encode(parts)

    def _encode(self, parts: list[list[tuple[str, bool]]]) -> Sample:
        """Some conversations get gaps between their turns, so that every distance up to the context length occurs."""
        rng = self._rng
        tokens: list[int] = []
        learned: list[bool] = []
        positions: list[int] = []
        length = sum(len(self._ids(text)) for part in parts for text, _ in part)
        spare = CONTEXT_LENGTH - length if rng.random() < 0.25 else 0
        position = rng.randrange(spare) if spare else 0
        spare -= position
        for part in parts:
            for text, learn in part:
                ids = self._ids(text)
                tokens += ids
                learned += [learn] * len(ids)
                positions += range(position, position + len(ids))
                position += len(ids)
            gap = rng.randrange(spare) if spare > 1 else 0
            position, spare = position + gap, spare - gap
        labels = [token if learn else IGNORED for token, learn in zip(tokens, learned, strict=True)]
        return Sample(tokens, [*labels[1:], IGNORED], positions)

    def _ids(self, text: str) -> list[int]:
        ids = self._cache.get(text)
        if ids is None:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            if len(self._cache) > 200_000:
                self._cache.clear()
            self._cache[text] = ids
        return ids
