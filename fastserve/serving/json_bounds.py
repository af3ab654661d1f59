"""Bounds on the nesting of JSON, checked before it is parsed."""

from __future__ import annotations

from itertools import accumulate

from fastserve.errors import InvalidRequestError

_STEP = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NOT_STRUCTURE = bytes(code for code in range(256) if code not in b'[]{}"')
_PAIR = b"\x01\xff"
_STRETCH = 65536


def check_json_depth(body: bytes, max_depth: int) -> None:
    """Raises InvalidRequestError if arrays and objects are nested deeper than `max_depth`.

    Brackets inside strings do not count. Takes a few passes over the body in C and builds no objects. Invalid JSON is
    left to the parser.
    """
    if body.count(b"[") + body.count(b"{") <= max_depth:
        return
    if _is_deeper(body, max_depth):
        raise InvalidRequestError(f"The JSON body is nested deeper than {max_depth} levels.", code="json_too_deep")


def _is_deeper(body: bytes, max_depth: int) -> bool:
    if b"\\" in body:
        # Order matters: in a run of backslashes every second one is escaped, and only an odd last one escapes a quote.
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    structure = body.translate(_STEP, _NOT_STRUCTURE)
    structure = outside_strings(structure)
    # Innermost pairs are most of the brackets of flat bodies; removing them reduces the depth by one.
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
    """`structure` (JSON text reduced to quotes, brackets and braces) without its strings."""
    # Adjacent quotes, which most strings are reduced to, can be removed first.
    structure = structure.replace(b'""', b"")
    return b"".join(structure.split(b'"')[::2]) if b'"' in structure else structure
