"""Pending tokens: what was committed in steps in which the drafter did not run.

While the engine decodes plainly or drafts from n-grams, the drafter's own pass over the committed
tokens (draft-extend) is deferred. The target's features of those tokens are kept, and the drafter
catches up in one pass: when a strategy drafts with it again, or when `limit` bytes of features
wait. So it comes back warm, and costs next to nothing until then: one pass over many tokens is
cheaper than many passes over few, and a request that ends before is never paid for.

Runs in the scheduler process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tlt_sglang.engine.to_device import LateCounts, to_device


@dataclass(slots=True)
class _Block:
    """Tokens of one step, request by request; freed when no request waits for a part.

    The rows of a request that come first are its committed tokens. Where the host did not know how
    many those are, the block has all that were verified.
    """

    features: torch.Tensor  # [n, F]
    tokens: torch.Tensor  # [n] int64
    waiting: int
    width: int  # rows of each request; 0 if only those of committed tokens are kept
    counts: list[int] | LateCounts  # [B] committed tokens

    def part(self, request: int) -> slice:
        """Return where the committed tokens of a request are."""
        if isinstance(self.counts, LateCounts):
            self.counts = self.counts.read()
        first = request * self.width if self.width else sum(self.counts[:request])
        return slice(first, first + self.counts[request])


Part = tuple[_Block, int]
"""A block, and the index of a request in it."""


@dataclass(frozen=True, slots=True)
class PendingBatch:
    """The pending tokens of R requests of a batch, one request after the other; M in all."""

    rows: list[int]  # [R] indices in the batch
    counts: list[int]  # [R]
    features: torch.Tensor  # [M, F] at the positions the drafter has not computed
    tokens: torch.Tensor  # [M] int64, each the token after its position
    recent: list[int] | None  # [R] tokens of the last steps; None where some step is not pending


class PendingTokens:
    """Pending tokens by request id."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._requests: dict[str, list[Part]] = {}
        self.nbytes = 0
        """Size of the features that are kept, in bytes."""

    def put(
        self,
        requests: Sequence[str],
        features: torch.Tensor,
        tokens: torch.Tensor,
        committed: Sequence[int] | LateCounts,
        copy: bool = True,
    ) -> bool:
        """Defer a step, and return whether the limit is reached and the drafter should catch up.

        `features` [B * W, F] and `tokens` [B * W] are those of W verified tokens per request, of
        which the first `committed` count. Without `copy` nobody may write into them afterwards.
        """
        if len(self._requests) > 2 * len(requests):
            self.keep(requests)
        width = len(tokens) // max(1, len(requests))
        counts = committed if isinstance(committed, LateCounts) else list(committed)
        if width == 1 or isinstance(counts, LateCounts):
            features, tokens = (x.clone() if copy else x for x in (features, tokens))
        else:
            rows = [row * width + i for row, count in enumerate(counts) for i in range(count)]
            index = to_device(rows, features.device)
            features, tokens, width = features[index], tokens[index], 0
        block = _Block(features, tokens, len(requests), width, counts)
        self.nbytes += features.nbytes
        for row, request in enumerate(requests):
            self._requests.setdefault(request, []).append((block, row))
        if self.nbytes > self._limit:  # perhaps of requests that have ended
            self.keep(requests)
        return self.nbytes > self._limit

    def take(self, requests: Sequence[str], last_steps: int = 0) -> PendingBatch | None:
        """Remove and return what is pending for `requests`; None if nothing is.

        Its `recent` are the tokens of the `last_steps` steps. Waits for the device where the last
        step is under way and the host does not know yet what it commits.
        """
        rows = [row for row, request in enumerate(requests) if request in self._requests]
        if not rows:
            return None
        taken = [
            [(block, block.part(row)) for block, row in self._pop(requests[index])]
            for index in rows
        ]
        counts = [[part.stop - part.start for _, part in parts] for parts in taken]
        all_pending = all(len(parts) >= last_steps for parts in taken)
        features, tokens = _gathered([part for parts in taken for part in parts])
        return PendingBatch(
            rows,
            [sum(steps) for steps in counts],
            features,
            tokens,
            [sum(steps[len(steps) - last_steps :]) for steps in counts] if all_pending else None,
        )

    def drop(self, requests: Sequence[str]) -> None:
        """Forget requests that are prefilled anew, the drafter with them, or have ended."""
        for request in requests:
            if request in self._requests:
                self._pop(request)

    def keep(self, requests: Sequence[str]) -> None:
        """Forget every request but these."""
        kept = set(requests)
        self.drop([request for request in self._requests if request not in kept])

    def _pop(self, request: str) -> list[Part]:
        parts = self._requests.pop(request)
        for block, _ in parts:
            block.waiting -= 1
            if not block.waiting:
                self.nbytes -= block.features.nbytes
        return parts

    def __len__(self) -> int:
        return len(self._requests)


def _gathered(parts: Sequence[tuple[_Block, slice]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features and tokens of these parts of blocks, one after the other.

    Copies block by block, of which there is one for each step, and not part by part.
    """
    by_block: dict[int, tuple[_Block, list[int], list[int]]] = {}
    total = 0
    for block, part in parts:
        _, rows, places = by_block.setdefault(id(block), (block, [], []))
        rows += range(part.start, part.stop)
        places += range(total, total + part.stop - part.start)
        total += part.stop - part.start
    first = parts[0][0]
    every = [row for _, rows, _ in by_block.values() for row in rows]
    every += [place for _, _, places in by_block.values() for place in places]
    index = to_device(every, first.features.device)
    features = first.features.new_empty(total, *first.features.shape[1:])
    tokens = first.tokens.new_empty(total)
    done = 0
    for block, rows, _ in by_block.values():
        end = done + len(rows)
        source, target = index[done:end], index[total + done : total + end]
        features[target], tokens[target] = block.features[source], block.tokens[source]
        done = end
    return features, tokens
