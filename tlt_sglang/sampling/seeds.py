"""Seeds of requests: drawn for those that name none, and one for each sample of a request.

Imports nothing. Used in the main process and in the scheduler process.
"""

from __future__ import annotations

SEED_BITS = 53
"""Answers report their seeds in JSON, and some readers hold its numbers as floats of 64 bits."""
_LARGEST = (1 << SEED_BITS) - 1
_FACTOR, _SUMMAND = 6364136223846793005, 1442695040888963407


def next_seed(seed: int) -> int:
    """Return the seed of the next sample of a request, given the one before.

    One step of a linear congruential generator (Knuth's MMIX): all seeds occur before one repeats,
    and a request whose seed is 1 higher has other samples.
    """
    return (seed * _FACTOR + _SUMMAND) & _LARGEST
