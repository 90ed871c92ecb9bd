"""Drafting without a model: what followed the last time that the text ended like this.

An index over the tokens of every request, its own and those of others: answers to the same prompt
(as in GRPO groups) and of earlier epochs repeat each other. A draft is the continuation of the most
recent place at which the request's last tokens stand, the longest such ending first.

Memory is bounded: tokens lie in a ring of blocks, of which each request fills its own, and the
places of endings in tables of fixed size, in which the newest entry wins. An entry that points
to a block that was filled anew is found out by comparing tokens. Appending and looking up are
compiled, for a whole batch at once, and take microseconds, whatever the length of the context.

After prompt lookup decoding (Saxena 2023) and SGLang's and vLLM's n-gram workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tlt_sglang.cpu.kernels.compile import Array, inline, kernel

BLOCK = 256
"""Tokens that follow each other in memory."""
LENGTHS = (2, 3, 4, 6, 8, 12)
"""Endings that are looked up, in tokens. What followed a longer one comes again more often."""
LONGEST = LENGTHS[-1]
NONE = -1
"""In the place of a token that is not known; never accepted."""


@inline
def _hash(tokens: Array, end: int, length: int) -> np.uint64:
    """Of the `length` tokens before `end`."""
    found = np.uint64(1469598103934665603) + np.uint64(length)
    for i in range(end - length, end):
        found = (found ^ np.uint64(tokens[i])) * np.uint64(1099511628211)
        found ^= found >> np.uint64(29)
    return found


@inline
def _note(store: Array, places: Array, first: int, place: int) -> None:
    """Note the endings of the text before `place`, in a block that begins at `first`."""
    for length in LENGTHS:
        if place - length < first:
            break
        places[_hash(store, place, length) & np.uint64(places.size - 1)] = place


@inline
def _follow(store: Array, places: Array, end: int, draft: Array) -> tuple[int, int]:
    """Fill `draft` with what followed the longest ending that is known of the text before `end`
    (NONE: there is none); (tokens that are filled, the ending's length)."""
    if end <= 0:
        return 0, 0
    first = (end - 1) // BLOCK * BLOCK
    for length in LENGTHS[::-1]:
        if end - length < first:
            continue
        place = places[_hash(store, end, length) & np.uint64(places.size - 1)]
        # The last token of a block has no continuation there.
        if place <= 0 or place % BLOCK == 0 or store[place] < 0:
            continue
        if place - length < place // BLOCK * BLOCK:
            continue
        same = True
        for i in range(1, length + 1):
            if store[place - i] != store[end - i]:
                same = False
                break
        if not same:
            continue
        count = 0
        while count < draft.size and store[place + count] >= 0:
            draft[count] = store[place + count]
            count += 1
            if (place + count) % BLOCK == 0:
                break
        return count, length
    return 0, 0


@kernel("void(int32[::1], int32[::1], int64, int64, int64)")
def _index(store: Array, places: Array, first: int, start: int, end: int) -> None:
    """Note the endings at each place from `start` to `end`, in a block that begins at `first`."""
    for place in range(start, end + 1):
        _note(store, places, first, place)


@kernel("void(int32[::1], int32[::1], int64[::1], int32[::1])")
def _append_each(store: Array, places: Array, at: Array, tokens: Array) -> None:
    """A token for each of several requests, at the end of what its block holds."""
    for i in range(at.size):
        store[at[i]] = tokens[i]
        _note(store, places, at[i] // BLOCK * BLOCK, at[i])


@kernel("void(int32[::1], int32[::1], int64[::1], int64[:, ::1], int64[::1], int64[::1])")
def _look_up(
    store: Array, places: Array, ends: Array, drafts: Array, counts: Array, lengths: Array
) -> None:
    """`_follow` for each of several texts."""
    for i in range(ends.size):
        counts[i], lengths[i] = _follow(store, places, ends[i], drafts[i])


Text = tuple[str, Sequence[int], Sequence[int]]
"""Of a request: its id, all tokens of its prompt, and of its output so far."""


@dataclass(frozen=True, slots=True)
class Found:
    """What followed before, for each of B requests: at most D tokens."""

    drafts: Array  # [B, D] int64, zeros behind what is known
    counts: list[int]  # of known tokens
    lengths: list[int]  # of the ending that was found; 0 without one


@dataclass(slots=True)
class _Open:
    """The block that a request fills."""

    block: int
    filled: int
    seen: int
    """Tokens of the request that are in the index."""
    lease: int

    @property
    def end(self) -> int:
        """The place behind the last of its tokens."""
        return self.block * BLOCK + self.filled


class NgramIndex:
    """Of one engine, in at most `memory_mb` megabytes."""

    def __init__(self, memory_mb: int) -> None:
        """Raises ValueError for less than a megabyte."""
        if memory_mb < 1:
            raise ValueError("an n-gram index takes at least 1 MB")
        budget = memory_mb * 2**20 // 4
        # Endings of a token hash to as many entries as there are lengths; half of it is enough.
        # Filled, not `zeros`: pages that the system clears when they are first touched would take
        # tens of milliseconds of the first steps.
        self._places = np.full(1 << ((budget * 2 // 3).bit_length() - 1), 0, np.int32)
        blocks = max(2, (budget - self._places.size) // (BLOCK + 2))
        self._store = np.full(blocks * BLOCK, NONE, np.int32)
        self._leases = np.zeros(blocks, np.int64)
        self._next = self._lease = 0
        self._open: dict[str, _Open] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of its tables."""
        return self._places.nbytes + self._store.nbytes + self._leases.nbytes

    def clear(self) -> None:
        """Forget everything, in the memory that it has."""
        self._places.fill(0)
        self._leases.fill(0)
        self._open.clear()

    def extend(self, texts: Sequence[Text]) -> None:
        """Take in what is new of these requests."""
        one_more: list[tuple[_Open, int]] = []
        for request, prompt, output in texts:
            known = self._open.get(request)
            seen = known.seen if known is not None else 0
            new = len(prompt) + len(output) - seen
            if new == 1 and output and known is not None and known.filled < BLOCK:
                one_more.append((known, output[-1]))
            elif new > 0:
                text = output[-new:] if new <= len(output) else [*prompt[seen:], *output]
                self._append(request, np.array(text, np.int32))
        # What was just appended may have taken the block of another.
        held = [(known, token) for known, token in one_more if self._holds(known)]
        if held:
            at = [known.end for known, _ in held]
            tokens = np.array([token for _, token in held], np.int32)
            _append_each(self._store, self._places, np.array(at), tokens)
            for known, _ in held:
                known.filled += 1
                known.seen += 1

    def look_up(self, requests: Sequence[str], depth: int) -> Found:
        """What may follow what these said, as far as that was taken in: at most `depth` tokens
        each."""
        every = [self._open.get(request) for request in requests]
        ends = [NONE if one is None or not self._holds(one) else one.end for one in every]
        drafts = np.zeros((len(requests), depth), np.int64)
        counts, lengths = np.zeros((2, len(requests)), np.int64)
        _look_up(self._store, self._places, np.array(ends, np.int64), drafts, counts, lengths)
        return Found(drafts, counts.tolist(), lengths.tolist())

    def keep(self, requests: Sequence[str]) -> None:
        """Forget which block the others fill; what they said stays."""
        alive = set(requests)
        self._open = {name: block for name, block in self._open.items() if name in alive}

    def __len__(self) -> int:
        return len(self._open)

    def _append(self, request: str, tokens: Array) -> None:
        known = self._open.get(request)
        if known is None or not self._holds(known):
            # New, or its block was taken by others since.
            known = self._open[request] = self._lend(known.seen if known is not None else 0)
        at = 0
        while at < len(tokens):
            if known.filled == BLOCK:
                end = (known.block + 1) * BLOCK
                carried = self._store[end - LONGEST : end].copy()
                known = self._open[request] = self._lend(known.seen)
                first = known.block * BLOCK
                self._store[first : first + LONGEST] = carried
                known.filled = LONGEST
            first = known.block * BLOCK
            start = first + known.filled
            part = tokens[at : at + BLOCK - known.filled]
            self._store[start : start + len(part)] = part
            known.filled += len(part)
            known.seen += len(part)
            at += len(part)
            # An ending is noted when its continuation is there.
            _index(self._store, self._places, first, max(start, first + 1), start + len(part) - 1)

    def _holds(self, known: _Open) -> bool:
        """Whether its block is still its own."""
        return bool(self._leases[known.block] == known.lease)

    def _lend(self, seen: int) -> _Open:
        block = self._next
        self._next = (block + 1) % len(self._leases)
        self._lease += 1
        self._leases[block] = self._lease
        self._store[block * BLOCK : (block + 1) * BLOCK] = NONE
        return _Open(block, 0, seen, self._lease)
