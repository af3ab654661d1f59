"""Bounds on the shape of JSON, checked before anything parses it."""

from __future__ import annotations

from itertools import accumulate

from fastserve.errors import InvalidRequestError

_STEP = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NOT_STRUCTURE = bytes(code for code in range(256) if code not in b'[]{}"')
_PAIR = b"\x01\xff"
_STRETCH = 65536


def check_json_depth(body: bytes, max_depth: int) -> None:
    """Raise InvalidRequestError when arrays and objects are nested deeper than `max_depth`.

    Brackets within strings do not count. Costs a few passes over the body in C; nothing is built. Whether the body is
    JSON at all is for its parser to find.
    """
    if body.count(b"[") + body.count(b"{") <= max_depth:
        return
    if _is_deeper(body, max_depth):
        raise InvalidRequestError(f"The JSON body is nested deeper than {max_depth} levels.", code="json_too_deep")


def _is_deeper(body: bytes, max_depth: int) -> bool:
    if b"\\" in body:
        # In this order: of a run of backslashes each second one is escaped, and only a last odd one escapes a quote.
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    structure = body.translate(_STEP, _NOT_STRUCTURE)
    structure = outside_strings(structure)
    # Innermost pairs are most of the structure of flat bodies; without them each depth is one less.
    if _PAIR in structure:
        structure = structure.replace(_PAIR, b"")
        max_depth -= 1
    steps = memoryview(structure).cast("b")
    depth = 0
    for start in range(0, len(steps), _STRETCH):
        depths = list(accumulate(steps[start : start + _STRETCH], initial=depth))
        if max(depths) > max_depth:
            return True
        depth = depths[-1]
    return max_depth < 0


def outside_strings(structure: bytes) -> bytes:
    """What of JSON text stands outside its strings, of which only quotes and characters of structure are left."""
    # Two quotes side by side, most of what is left of strings, change nothing for what stands around them.
    structure = structure.replace(b'""', b"")
    return b"".join(structure.split(b'"')[::2]) if b'"' in structure else structure
