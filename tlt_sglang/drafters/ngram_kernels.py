"""The compiled loops of the n-gram index: inserting suffixes, and looking up matches.

`tokens` is a ring of blocks of BLOCK tokens, NONE where nothing is known. `table` maps the hash of
the last n tokens before a position, for each n of LENGTHS, to that position; the newest entry wins,
so that entries may be of another hash or of a block that was overwritten since. A look-up therefore
compares tokens.

Runs in the scheduler process, for a whole batch in one call.
"""

from __future__ import annotations

import numpy as np

from tlt_sglang.cpu.kernels.compile import Array, inline, kernel

BLOCK = 256
"""Tokens that follow each other in memory."""
LENGTHS = (2, 3, 4, 6, 8, 12)
"""Suffix lengths that are indexed, in tokens. A longer match predicts better what follows."""
LONGEST = LENGTHS[-1]
NONE = -1
"""In the place of an unknown token; never accepted."""


@inline
def _hash(tokens: Array, end: int, length: int) -> np.uint64:
    """Return the hash of the `length` tokens before `end`."""
    value = np.uint64(1469598103934665603) + np.uint64(length)
    for i in range(end - length, end):
        value = (value ^ np.uint64(tokens[i])) * np.uint64(1099511628211)
        value ^= value >> np.uint64(29)
    return value


@inline
def _insert(tokens: Array, table: Array, first: int, position: int) -> None:
    """Insert the suffixes of the text before `position`, in a block that begins at `first`."""
    for length in LENGTHS:
        if position - length < first:
            break
        table[_hash(tokens, position, length) & np.uint64(table.size - 1)] = position


@inline
def _match(tokens: Array, table: Array, end: int, draft: Array) -> tuple[int, int]:
    """Fill `draft` with what followed the longest earlier match of the suffix before `end`.

    `end` is NONE for no text. Returns (tokens that were filled in, the match length).
    """
    if end <= 0:
        return 0, 0
    first = (end - 1) // BLOCK * BLOCK
    for length in LENGTHS[::-1]:
        if end - length < first:
            continue
        position = table[_hash(tokens, end, length) & np.uint64(table.size - 1)]
        # The last token of a block has no continuation there.
        if position <= 0 or position % BLOCK == 0 or tokens[position] < 0:
            continue
        if position - length < position // BLOCK * BLOCK:
            continue
        # The entry may be that of other tokens.
        same = True
        for i in range(1, length + 1):
            if tokens[position - i] != tokens[end - i]:
                same = False
                break
        if not same:
            continue
        # The continuation ends with the draft, the block, or the known tokens.
        count = 0
        while count < draft.size and tokens[position + count] >= 0:
            draft[count] = tokens[position + count]
            count += 1
            if position + count == end or (position + count) % BLOCK == 0:
                break
        # One that leads to the suffix itself repeats it, and so on.
        if position + count == end:
            for i in range(count, draft.size):
                draft[i] = draft[i - count]
            count = draft.size
        return count, length
    return 0, 0


@kernel("void(int32[::1], int32[::1], int64, int64, int64)")
def insert_range(tokens: Array, table: Array, first: int, start: int, end: int) -> None:
    """Insert the suffixes at each position from `start` to `end`, in the block at `first`."""
    for position in range(start, end + 1):
        _insert(tokens, table, first, position)


@kernel("void(int32[::1], int32[::1], int64[::1], int32[::1])")
def append_each(tokens: Array, table: Array, positions: Array, new_tokens: Array) -> None:
    """Append a token for each of several requests, at the end of what its block holds."""
    for i in range(positions.size):
        tokens[positions[i]] = new_tokens[i]
        _insert(tokens, table, positions[i] // BLOCK * BLOCK, positions[i])


@kernel("void(int32[::1], int32[::1], int64[::1], int64[:, ::1], int64[::1], int64[::1])")
def look_up_each(
    tokens: Array, table: Array, ends: Array, drafts: Array, counts: Array, lengths: Array
) -> None:
    """Look up the text before each of `ends`; fill `drafts`, their counts and match lengths."""
    for i in range(ends.size):
        counts[i], lengths[i] = _match(tokens, table, ends[i], drafts[i])
