"""What the drafter has not seen: features and tokens of steps in which it did not run.

While the engine decodes plainly or drafts from n-grams, the drafter's own pass over what was
committed (draft-extend) is put off. The target's features of those tokens are kept, and the drafter
catches up in one pass: when it is wanted again, or when a request has `most` tokens waiting, so
that memory is bounded and the drafter never far behind. A pass over many tokens costs hardly more
than one over a few, so that a drafter that is not used costs next to nothing, and comes back warm.

Runs in the scheduler process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

MOST = 64
"""Tokens of a request that may wait."""


@dataclass(slots=True)
class _Waiting:
    features: list[torch.Tensor] = field(default_factory=list)  # each [n, F]
    tokens: list[torch.Tensor] = field(default_factory=list)  # each [n] int64
    count: int = 0


@dataclass(frozen=True, slots=True)
class Missed:
    """What requests missed, one after the other; M tokens of R requests."""

    rows: list[int]  # R places in the batch
    counts: list[int]  # R
    features: torch.Tensor  # [M, F], of tokens at the positions that are missing
    tokens: torch.Tensor  # [M] int64, the tokens after those


class Backlog:
    """By request id."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._waiting: dict[str, _Waiting] = {}

    def put(
        self,
        requests: Sequence[str],
        features: torch.Tensor,
        tokens: torch.Tensor,
        committed: Sequence[int],
    ) -> bool:
        """Put off a step: features [B * W, F] and tokens [B * W] of W verified tokens each, the
        first `committed` of which count. True if it is time to catch up."""
        if len(self._waiting) > 2 * len(requests):
            self.keep(requests)
        width = len(tokens) // max(1, len(requests))
        full = False
        for row, (request, count) in enumerate(zip(requests, committed, strict=True)):
            waiting = self._waiting.setdefault(request, _Waiting())
            part = slice(row * width, row * width + count)
            waiting.features.append(features[part].clone())
            waiting.tokens.append(tokens[part].clone())
            waiting.count += count
            full |= waiting.count >= self._most
        return full

    def take(self, requests: Sequence[str]) -> Missed | None:
        """What these have missed, and no longer wait for; None if that is nothing."""
        found = [
            (row, self._waiting.pop(request))
            for row, request in enumerate(requests)
            if request in self._waiting
        ]
        if not found:
            return None
        return Missed(
            [row for row, _ in found],
            [waiting.count for _, waiting in found],
            torch.cat([part for _, waiting in found for part in waiting.features]),
            torch.cat([part for _, waiting in found for part in waiting.tokens]),
        )

    def drop(self, requests: Sequence[str]) -> None:
        """These are prefilled anew, the drafter with them, or are gone."""
        for request in requests:
            self._waiting.pop(request, None)

    def keep(self, requests: Sequence[str]) -> None:
        """Drop all but these."""
        self.drop([request for request in self._waiting if request not in set(requests)])

    def __len__(self) -> int:
        return len(self._waiting)
