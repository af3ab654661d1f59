"""Block pool of the paged KV cache, without tensors: which sequences hold each block, and which can be reused.

A block holds `block_size` tokens of all layers. A full block whose content is known is registered in the prefix cache
under the key (parent, tokens): `parent` is the number that the block before it got when it was registered, and numbers
are never reused. So a lookup compares the token ids of the whole prefix, block by block, and no hash collision can
return a wrong block. Rejected: keys of chained hashes alone, which can collide. The parent of first blocks is a root,
one for each way to compute a token (rotary frequencies, for example).

A block with no holder stays registered until it is needed: free blocks are reused in least-recently-used order, those
without content first. A sequence frees its last block first, so the end of a prefix is evicted before its beginning,
without which the end cannot be found.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

ROOT = 0
BlockKey = tuple[int | str, ...]
"""A block's tokens, after a salt if it is the first of a salted sequence."""


def block_key(token_ids: Sequence[int], salt: str, start: int) -> BlockKey:
    """`start`: position of the first token in its sequence. Later blocks have the salt by their parents."""
    return (salt, *token_ids) if salt and not start else tuple(token_ids)


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """Cached blocks of a prefix, in order, and the number of the last of them."""

    block_ids: list[int]
    parent: int


class BlockPool:
    """All blocks of one engine. Every block is either held (reference count above zero) or in the free queue."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_cache = prefix_cache
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._registered: dict[tuple[int, BlockKey], tuple[int, int]] = {}
        """(parent, tokens) -> (block id, own number)"""
        self._key_of: dict[int, tuple[int, BlockKey]] = {}
        self._roots: dict[Hashable, int] = {None: ROOT}
        """Parents of first blocks. They change when the cache is cleared: no lookup then finds blocks registered under
        an old root, including those that running sequences register later."""
        self._next_number = ROOT + 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    def match(self, token_ids: Sequence[int], max_tokens: int, root: Hashable = None, salt: str = "") -> PrefixMatch:
        """The longest cached prefix of whole blocks within the first `max_tokens` tokens. Does not hold them yet.

        `root`: what keys and values depend on besides the tokens. Each is kept until `drop_roots`. `salt`: blocks that
        were registered with another one are not found; unlike a root it is kept with these blocks only."""
        block_ids: list[int] = []
        parent = self._parent_of_first(root)
        if self._prefix_cache:
            size = self.block_size
            for start in range(0, max_tokens - size + 1, size):
                found = self._registered.get((parent, block_key(token_ids[start : start + size], salt, start)))
                if found is None:
                    break
                block_ids.append(found[0])
                parent = found[1]
        return PrefixMatch(block_ids, parent)

    def _parent_of_first(self, root: Hashable) -> int:
        found = self._roots.get(root)
        if found is None:
            found = self._roots[root] = self._next_number
            self._next_number += 1
        return found

    def drop_roots(self, roots: Iterable[Hashable]) -> None:
        """Forget roots that no sequence will have again: blocks below them are never found any more."""
        for root in roots:
            self._roots.pop(root, None)

    def num_free_after(self, match: PrefixMatch) -> int:
        """Free blocks that would be left once `match` is taken."""
        return len(self._free) - sum(1 for block_id in match.block_ids if self._references[block_id] == 0)

    def take(self, match: PrefixMatch) -> None:
        """Hold the blocks of a match."""
        for block_id in match.block_ids:
            if self._references[block_id] == 0:
                del self._free[block_id]
            self._references[block_id] += 1

    def allocate(self, count: int) -> list[int]:
        """Hold `count` blocks without content. The caller makes sure that as many are free."""
        block_ids = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block_id in block_ids:
            key = self._key_of.pop(block_id, None)
            if key is not None:
                del self._registered[key]
            self._references[block_id] = 1
        return block_ids

    def free(self, block_ids: Sequence[int]) -> None:
        """Give up one hold on each block of a sequence (in the sequence's order)."""
        for block_id in reversed(block_ids):
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                self._free[block_id] = None
                if block_id not in self._key_of:
                    self._free.move_to_end(block_id, last=False)

    def register(self, block_id: int, parent: int, tokens: BlockKey) -> int:
        """Register a full, computed block in the prefix cache; return its number, the parent of the next block.

        When the same content is registered already (two sequences computed it in parallel), the older block stays
        registered, and its number is returned.
        """
        if not self._prefix_cache:
            return ROOT
        key = (parent, tokens)
        found = self._registered.get(key)
        if found is not None:
            return found[1]
        number = self._next_number
        self._next_number += 1
        self._registered[key] = (block_id, number)
        self._key_of[block_id] = key
        return number

    def clear(self) -> int:
        """Remove all blocks from the prefix cache; return how many were registered. Holders keep their blocks."""
        num_forgotten = len(self._registered)
        self._registered.clear()
        self._key_of.clear()
        self._roots.clear()
        return num_forgotten

    def check(self, holders: Sequence[Sequence[int]]) -> None:
        """Raise RuntimeError unless the pool's state agrees with the blocks that `holders` hold. For tests."""
        counted = [0] * self.num_blocks
        for block_ids in holders:
            for block_id in block_ids:
                counted[block_id] += 1
        if counted != self._references:
            raise RuntimeError("reference counts differ from the blocks that sequences hold")
        if set(self._free) != {block_id for block_id in range(self.num_blocks) if counted[block_id] == 0}:
            raise RuntimeError("the free queue is not the set of blocks that nobody holds")
        if {block_id: key for key, (block_id, _) in self._registered.items()} != self._key_of:
            raise RuntimeError("the prefix index does not agree with its reverse")
