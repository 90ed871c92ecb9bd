"""The n-gram index: drafts what followed the last time that the text ended in the same tokens.

It indexes the tokens of every request, and so a request's own text and that of others: answers to
the same prompt (as in GRPO groups) and of earlier epochs repeat each other. A draft is the
continuation of the most recent position before which the request's last tokens stand; the longest
such suffix is looked up first.

Memory is bounded. Tokens lie in a ring of blocks, of which each request fills its own, and the
positions of suffixes in a table of fixed size. Appending and looking up are compiled
(`ngram_kernels`), for a whole batch at once, and take microseconds, whatever the length of the
context.

Runs in the scheduler process. It does not verify its drafts, and knows nothing of SGLang.

After prompt lookup decoding (Saxena 2023) and SGLang's and vLLM's n-gram workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tlt_sglang.cpu.kernels.compile import Array
from tlt_sglang.drafters.ngram_kernels import (
    BLOCK,
    LONGEST,
    NONE,
    append_each,
    insert_range,
    look_up_each,
)

RequestText = tuple[str, Sequence[int], Sequence[int]]
"""A request's id, all tokens of its prompt, and those of its output so far."""


@dataclass(frozen=True, slots=True)
class Matches:
    """The suffix matches of B requests, and at most D tokens that followed each."""

    drafts: Array  # [B, D] int64, zeros behind the continuation
    counts: list[int]  # [B], tokens of the continuation
    lengths: list[int]  # [B], suffix match lengths; 0 without a match


@dataclass(slots=True)
class _OpenBlock:
    """The block that a request fills."""

    number: int
    filled: int
    indexed: int
    """Tokens of the request that are in the index."""
    lease: int

    @property
    def end(self) -> int:
        """The position behind the last of its tokens."""
        return self.number * BLOCK + self.filled


class NgramIndex:
    """The index of one engine, in at most `memory_mb` megabytes."""

    def __init__(self, memory_mb: int) -> None:
        """Allocate the memory; raise ValueError for less than 1 MB."""
        if memory_mb < 1:
            raise ValueError("an n-gram index takes at least 1 MB")
        budget = memory_mb * 2**20 // 4
        # A token has as many suffixes as there are lengths; half as many entries are enough.
        # Filled, not `zeros`: pages that the system clears when they are first touched would take
        # tens of milliseconds of the first steps.
        self._table = np.full(1 << ((budget * 2 // 3).bit_length() - 1), 0, np.int32)
        blocks = max(2, (budget - self._table.size) // (BLOCK + 2))
        self._tokens = np.full(blocks * BLOCK, NONE, np.int32)
        self._leases = np.zeros(blocks, np.int64)
        self._next_block = self._last_lease = 0
        self._open: dict[str, _OpenBlock] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return self._table.nbytes + self._tokens.nbytes + self._leases.nbytes

    def clear(self) -> None:
        """Forget everything, and keep the memory."""
        self._table.fill(0)
        self._leases.fill(0)
        self._open.clear()

    def extend(self, texts: Sequence[RequestText]) -> None:
        """Take in the tokens of these requests that are not in the index yet."""
        # Most requests have one new token and room for it; those are appended in one call.
        single: list[tuple[_OpenBlock, int]] = []
        for request, prompt, output in texts:
            block = self._open.get(request)
            indexed = block.indexed if block is not None else 0
            new = len(prompt) + len(output) - indexed
            if new == 1 and output and block is not None and block.filled < BLOCK:
                single.append((block, output[-1]))
            elif new > 0:
                text = output[-new:] if new <= len(output) else [*prompt[indexed:], *output]
                self._append(request, np.array(text, np.int32))
        # The other requests may have taken a block of these.
        held = [(block, token) for block, token in single if self._is_held(block)]
        if held:
            positions = np.array([block.end for block, _ in held])
            tokens = np.array([token for _, token in held], np.int32)
            append_each(self._tokens, self._table, positions, tokens)
            for block, _ in held:
                block.filled += 1
                block.indexed += 1

    def look_up(self, requests: Sequence[str], depth: int) -> Matches:
        """Return the matches of these requests, with at most `depth` drafts each."""
        blocks = [self._open.get(request) for request in requests]
        ends = [NONE if one is None or not self._is_held(one) else one.end for one in blocks]
        drafts = np.zeros((len(requests), depth), np.int64)
        counts, lengths = np.zeros((2, len(requests)), np.int64)
        look_up_each(self._tokens, self._table, np.array(ends, np.int64), drafts, counts, lengths)
        return Matches(drafts, counts.tolist(), lengths.tolist())

    def begin(self, requests: Sequence[str]) -> None:
        """Note that these requests begin, as others with their ids may have before."""
        for request in requests:
            self._open.pop(request, None)

    def keep(self, requests: Sequence[str]) -> None:
        """Forget the blocks that other requests fill; their tokens stay in the index."""
        alive = set(requests)
        self._open = {name: block for name, block in self._open.items() if name in alive}

    def __len__(self) -> int:
        return len(self._open)

    def _append(self, request: str, tokens: Array) -> None:
        """Append any number of tokens to a request, block by block."""
        block = self._open.get(request)
        if block is None or not self._is_held(block):
            # A new request, or one whose block was taken by others since.
            block = self._open[request] = self._lend(block.indexed if block is not None else 0)
        done = 0
        while done < len(tokens):
            # A new block begins with the last suffix of the full one.
            if block.filled == BLOCK:
                end = (block.number + 1) * BLOCK
                carried = self._tokens[end - LONGEST : end].copy()
                block = self._open[request] = self._lend(block.indexed)
                first = block.number * BLOCK
                self._tokens[first : first + LONGEST] = carried
                block.filled = LONGEST
            # As many tokens as fit; a suffix is inserted once its continuation is there.
            first, start = block.number * BLOCK, block.end
            part = tokens[done : done + BLOCK - block.filled]
            self._tokens[start : start + len(part)] = part
            block.filled += len(part)
            block.indexed += len(part)
            done += len(part)
            last = start + len(part) - 1
            insert_range(self._tokens, self._table, first, max(start, first + 1), last)

    def _is_held(self, block: _OpenBlock) -> bool:
        """Return whether no other request has taken the block since."""
        return bool(self._leases[block.number] == block.lease)

    def _lend(self, indexed: int) -> _OpenBlock:
        """Return the next block of the ring, emptied, for a request with `indexed` tokens."""
        number = self._next_block
        self._next_block = (number + 1) % len(self._leases)
        self._last_lease += 1
        self._leases[number] = self._last_lease
        self._tokens[number * BLOCK : (number + 1) * BLOCK] = NONE
        return _OpenBlock(number, 0, indexed, self._last_lease)
