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
from dataclasses import dataclass, field

import torch

from tlt_sglang.engine.to_device import to_device


@dataclass(slots=True)
class _Block:
    """Tokens committed in one step, request by request; freed when no request waits for a part."""

    features: torch.Tensor  # [n, F]
    tokens: torch.Tensor  # [n] int64
    waiting: int


@dataclass(slots=True)
class _Pending:
    """The pending tokens of one request."""

    parts: list[tuple[_Block, int, int]] = field(default_factory=list)
    """Per step: the block, the index of its first token, and the index behind its last."""
    count: int = 0

    def recent(self, steps: int) -> int | None:
        """Return the tokens of the last `steps` steps; None if fewer steps are pending."""
        if steps > len(self.parts):
            return None
        return sum(end - start for _, start, end in self.parts[len(self.parts) - steps :])


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
        self._requests: dict[str, _Pending] = {}
        self.nbytes = 0
        """Size of the features that are kept, in bytes."""

    def put(
        self,
        requests: Sequence[str],
        features: torch.Tensor,
        tokens: torch.Tensor,
        committed: Sequence[int],
        copy: bool = True,
    ) -> bool:
        """Defer a step, and return whether the limit is reached and the drafter should catch up.

        `features` [B * W, F] and `tokens` [B * W] are those of W verified tokens per request, of
        which the first `committed` count. Without `copy` nobody may write into them afterwards.
        """
        if len(self._requests) > 2 * len(requests):
            self.keep(requests)
        counts, width = list(committed), len(tokens) // max(1, len(requests))
        if width == 1:
            features, tokens = (x.clone() if copy else x for x in (features, tokens))
        else:
            rows = [row * width + i for row, count in enumerate(counts) for i in range(count)]
            index = to_device(rows, features.device)
            features, tokens = features[index], tokens[index]
        block = _Block(features, tokens, len(requests))
        self.nbytes += features.nbytes
        start = 0
        for request, count in zip(requests, counts, strict=True):
            pending = self._requests.setdefault(request, _Pending())
            pending.parts.append((block, start, start + count))
            pending.count += count
            start += count
        return self.nbytes > self._limit

    def take(self, requests: Sequence[str], last_steps: int = 0) -> PendingBatch | None:
        """Remove and return what is pending for `requests`; None if nothing is.

        Its `recent` are the tokens of the `last_steps` steps.
        """
        taken = [
            (row, self._pop(request))
            for row, request in enumerate(requests)
            if request in self._requests
        ]
        if not taken:
            return None
        parts = [part for _, pending in taken for part in pending.parts]
        recent = [pending.recent(last_steps) for _, pending in taken]
        return PendingBatch(
            [row for row, _ in taken],
            [pending.count for _, pending in taken],
            torch.cat([block.features[start:end] for block, start, end in parts]),
            torch.cat([block.tokens[start:end] for block, start, end in parts]),
            [count for count in recent if count is not None] if None not in recent else None,
        )

    def drop(self, requests: Sequence[str]) -> None:
        """Forget requests that are prefilled anew, the drafter with them, or have ended."""
        for request in requests:
            if request in self._requests:
                self._pop(request)

    def keep(self, requests: Sequence[str]) -> None:
        """Forget every request but these."""
        self.drop([request for request in self._requests if request not in set(requests)])

    def _pop(self, request: str) -> _Pending:
        pending = self._requests.pop(request)
        for block, _, _ in pending.parts:
            block.waiting -= 1
            if not block.waiting:
                self.nbytes -= block.features.nbytes
        return pending

    def __len__(self) -> int:
        return len(self._requests)
