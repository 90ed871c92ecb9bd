"""What the drafter has not seen: features and tokens of steps in which it did not run.

While the engine decodes plainly or drafts from n-grams, the drafter's own pass over what was
committed (draft-extend) is put off. The target's features of those tokens are kept, and the drafter
catches up in one pass: when it is wanted again, or when `limit` bytes of features wait. So it comes
back warm, and costs next to nothing until then: a pass over many tokens is cheaper than many over a
few, and a request that ends before is never paid for.

Runs in the scheduler process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class _Step:
    """Of a step what was committed, one request after the other: memory that is free when nobody
    waits for its part any more."""

    features: torch.Tensor  # [n, F]
    tokens: torch.Tensor  # [n] int64
    waiting: int


@dataclass(slots=True)
class _Waiting:
    parts: list[tuple[_Step, int, int]] = field(default_factory=list)
    """Of each step the first of its tokens, and the place behind the last."""
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

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: dict[str, _Waiting] = {}
        self.nbytes = 0
        """Of the features that are held."""

    def put(
        self,
        requests: Sequence[str],
        features: torch.Tensor,
        tokens: torch.Tensor,
        committed: Sequence[int],
        given: bool = False,
    ) -> bool:
        """Put off a step: features [B * W, F] and tokens [B * W] of W verified tokens each, the
        first `committed` of which count. True if it is time to catch up.

        `given`: nobody will write into these tensors, so they need not be copied."""
        if len(self._waiting) > 2 * len(requests):
            self.keep(requests)
        counts, width = list(committed), len(tokens) // max(1, len(requests))
        if width == 1:
            features, tokens = (x if given else x.clone() for x in (features, tokens))
        else:
            rows = [row * width + i for row, count in enumerate(counts) for i in range(count)]
            index = torch.tensor(rows, device=features.device)
            features, tokens = features[index], tokens[index]
        step = _Step(features, tokens, len(requests))
        self.nbytes += features.nbytes
        start = 0
        for request, count in zip(requests, counts, strict=True):
            waiting = self._waiting.setdefault(request, _Waiting())
            waiting.parts.append((step, start, start + count))
            waiting.count += count
            start += count
        return self.nbytes > self._limit

    def take(self, requests: Sequence[str]) -> Missed | None:
        """What these have missed, and no longer wait for; None if that is nothing."""
        found = [
            (row, self._pop(request))
            for row, request in enumerate(requests)
            if request in self._waiting
        ]
        if not found:
            return None
        parts = [part for _, waiting in found for part in waiting.parts]
        return Missed(
            [row for row, _ in found],
            [waiting.count for _, waiting in found],
            torch.cat([step.features[start:end] for step, start, end in parts]),
            torch.cat([step.tokens[start:end] for step, start, end in parts]),
        )

    def drop(self, requests: Sequence[str]) -> None:
        """These are prefilled anew, the drafter with them, or are gone."""
        for request in requests:
            if request in self._waiting:
                self._pop(request)

    def keep(self, requests: Sequence[str]) -> None:
        """Drop all but these."""
        self.drop([request for request in self._waiting if request not in set(requests)])

    def _pop(self, request: str) -> _Waiting:
        waiting = self._waiting.pop(request)
        for step, _, _ in waiting.parts:
            step.waiting -= 1
            if not step.waiting:
                self.nbytes -= step.features.nbytes
        return waiting

    def __len__(self) -> int:
        return len(self._waiting)
