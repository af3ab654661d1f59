"""Counter-based random numbers: one uniform number for (seed, choice, position), without state.

So a request gets the same tokens alone and in any batch, before and after preemption, and on another worker that takes
it over. Counter-based generators: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011); the mixing
function is the finaliser of SplitMix64 (Steele, Lea, Flood, 2014).
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def key(seed: int, choice: int) -> int:
    """Key of the numbers of one sequence."""
    return _mix(_mix(seed & _MASK) ^ choice)


def uniform(sequence_key: int, position: int) -> float:
    """A number in [0, 1) for the token at `position` of the answer (0 is its first)."""
    return (_mix(sequence_key ^ position) >> 11) * 2.0**-53
