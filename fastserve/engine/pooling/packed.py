"""Attention of whole texts behind transformers' attention interface, without a KV cache.

The tokens of all texts of a step are one row, longest text first. Attention is computed in groups of texts of
near-equal length, so that little is padded; everything else sees no padding at all. Masks are made from the rules by
which transformers would make them, for each group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "fastserve_packed"
_MAX_PADDING = 1.2
"""Padded tokens of a group over its real ones. A group costs a call of each layer; padding costs its share of attention
alone."""
_SMALL_TOKENS = 64
"""Groups of no more tokens than this are padded as they are: a call costs more."""
_active: ContextVar[PackedTexts | None] = ContextVar("_active", default=None)


class UnsupportedAttentionError(Exception):
    """The model's attention has something that is not computed here."""


@dataclass(frozen=True)
class _Group:
    begin: int
    """First token in the row."""
    num_tokens: int
    num_texts: int
    longest: int
    rows: torch.Tensor | None
    """(texts x longest,) the token at each place of the padded batch; None: nothing is padded."""
    kept: torch.Tensor | None
    """(tokens,) the place of each token in the padded batch."""
    is_text: torch.Tensor | None
    """(texts, 1, 1, longest) which places have a token."""

    def padded(self, states: torch.Tensor) -> torch.Tensor:
        """(heads, tokens of all groups, dim) -> (texts, heads, longest, dim)"""
        heads, _, dim = states.shape
        own = states[:, self.begin : self.begin + self.num_tokens]
        if self.rows is not None:
            own = own.index_select(1, self.rows)
        return own.reshape(heads, self.num_texts, self.longest, dim).transpose(0, 1)

    def packed(self, out: torch.Tensor) -> torch.Tensor:
        """(texts, heads, longest, dim) -> (tokens, heads, dim)"""
        flat = out.transpose(1, 2).reshape(self.num_texts * self.longest, out.shape[1], out.shape[3])
        return flat if self.kept is None else flat.index_select(0, self.kept)


@dataclass(frozen=True)
class PackedMask:
    """Stands for a mask in the model's code: the rule, and for each group how attention applies it."""

    is_causal: bool
    masks: list[torch.Tensor | None]
    """By group, added to the scores; None: all see all, or as `is_causal` says."""


@dataclass
class PackedTexts:
    """The texts of a step: their lengths, longest first, and the groups."""

    lengths: list[int]
    device: torch.device
    groups: list[_Group] = field(init=False)

    def __post_init__(self) -> None:
        self.groups = [_make_group(begin, lengths, self.device) for begin, lengths in group_lengths(self.lengths)]

    @property
    def position_ids(self) -> torch.Tensor:
        """(1, tokens) the position of each token in its text"""
        rows = [torch.arange(length) for length in self.lengths]
        return torch.cat(rows).unsqueeze(0).to(self.device)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the block, attention belongs to these texts."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    def make_mask(self, rule: Any, dtype: torch.dtype, *, use_vmap: bool) -> PackedMask:
        """`rule`: (batch, head, query position, key position) -> whether the query sees the key."""
        if rule is causal_mask_function:
            return PackedMask(True, [None] * len(self.groups))  # padding comes last, where no text looks
        masks: list[torch.Tensor | None] = []
        for group in self.groups:
            seen = sdpa_mask(
                batch_size=1,
                q_length=group.longest,
                kv_length=group.longest,
                mask_function=rule,
                allow_is_causal_skip=False,
                use_vmap=use_vmap,
                device=self.device,
            )
            if bool(seen.all()):
                seen = group.is_text
            elif group.is_text is not None:
                # Padding sees itself, as a row without any key has no softmax.
                seen = seen & (group.is_text | torch.eye(group.longest, dtype=torch.bool, device=self.device))
            if seen is None:
                masks.append(None)
            else:
                masks.append(torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, -torch.inf))
        return PackedMask(False, masks)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: PackedMask,
        scaling: float | None,
    ) -> torch.Tensor:
        """`query` (1, heads, tokens, dim), `key` and `value` (1, KV heads, tokens, dim) -> (1, tokens, heads, dim)"""
        outputs = [
            group.packed(
                torch.nn.functional.scaled_dot_product_attention(
                    group.padded(query[0]),
                    group.padded(key[0]),
                    group.padded(value[0]),
                    attn_mask=bias,
                    is_causal=mask.is_causal and group.longest > 1,
                    scale=scaling,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            )
            for group, bias in zip(self.groups, mask.masks, strict=True)
        ]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0)


def group_lengths(lengths: Sequence[int]) -> list[tuple[int, Sequence[int]]]:
    """Split lengths, which fall, into runs that padding makes little larger: the first token and the lengths of
    each."""
    found: list[tuple[int, Sequence[int]]] = []
    first = begin = tokens = 0
    for at, length in enumerate(lengths):
        padded = lengths[first] * (at - first + 1)
        if at > first and padded > max(_MAX_PADDING * (tokens + length), _SMALL_TOKENS):
            found.append((begin, lengths[first:at]))
            begin += tokens
            first, tokens = at, 0
        tokens += length
    found.append((begin, lengths[first:]))
    return found


def _make_group(begin: int, lengths: Sequence[int], device: torch.device) -> _Group:
    longest, num_tokens = lengths[0], sum(lengths)
    if lengths[-1] == longest:
        return _Group(begin, num_tokens, len(lengths), longest, None, None, None)
    sizes = torch.tensor(lengths)
    is_text = torch.arange(longest) < sizes.unsqueeze(1)
    kept = is_text.flatten().nonzero()[:, 0]
    rows = torch.zeros(len(lengths) * longest, dtype=torch.long)
    rows[kept] = torch.arange(num_tokens)
    return _Group(
        *(begin, num_tokens, len(lengths), longest, rows.to(device), kept.to(device)),
        is_text[:, None, None].to(device),
    )


def packed_attention() -> str:
    """The name of this attention for a model's `attn_implementation`."""
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, _make_mask)
    return _NAME


def _make_mask(*_: Any, mask_function: Any, dtype: torch.dtype, use_vmap: bool = False, **__: Any) -> Any:
    """transformers' mask interface."""
    texts = _active.get()
    if texts is None:
        raise UnsupportedAttentionError("a mask was made outside of a step")
    return texts.make_mask(mask_function, dtype, use_vmap=use_vmap)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface. The mask holds window and causality."""
    texts = _active.get()
    if texts is None or not isinstance(attention_mask, PackedMask):
        raise UnsupportedAttentionError(f"{type(module).__name__} makes its mask by itself")
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise UnsupportedAttentionError(f"{type(module).__name__} has {name}")
    return texts.attend(query, key, value, attention_mask, scaling), None
