"""The memory of a harvest log: shared memory, and on a GPU what waits to be written. Pure."""

from __future__ import annotations

PENDING_BYTES = 256 * 2**20
"""Most bytes of features that wait on a device, with which a further step is taken."""
DEFAULT_TOKENS = 32768
"""Tokens for which a log has room where its size is not configured, within these bounds."""
LEAST_BYTES, MOST_BYTES = 250_000_000, 2_000_000_000


def log_bytes(gb: float | None, feature_size: int = 0, free: int = 2 * MOST_BYTES) -> int:
    """Return the bytes of a log of `gb` GB; None is room for DEFAULT_TOKENS tokens with features of
    `feature_size` numbers.

    That takes at most half of the shared memory that is `free`, but LEAST_BYTES in any case.
    """
    if gb is not None:
        return int(gb * 1e9)
    tokens = DEFAULT_TOKENS * (4 + 2 * feature_size)
    return max(LEAST_BYTES, min(tokens, MOST_BYTES, free // 2))
