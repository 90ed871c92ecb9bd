"""Tokens in flight: committed by a step whose results are not on the host when the next one begins.

With overlap scheduling a step is launched before the host has read what the step before it, or a
prefill, has committed. N-grams are then looked up after the last tokens that the host knows, far
enough ahead, and aligned on the device: a continuation that begins with the tokens in flight drafts
what it has after them, and one that does not drafts nothing. The host waits for nothing.

Runs in the scheduler process.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tlt_sglang.engine.to_device import to_device

if TYPE_CHECKING:
    from tlt_sglang.drafters.ngram import Matches
    from tlt_sglang.upstream.protocols import Batch, StepResult

_NOTHING, _FIRST, _UNKNOWN = -1, -2, -3
"""In the place of a row of the open step: the request has nothing in flight; the token that its
prefill has sampled; or more than one step, so that its match is not used."""


@dataclass(frozen=True, slots=True)
class _OpenStep:
    """A decode step in flight."""

    rows: dict[str, int]
    tokens: torch.Tensor  # [B, W] int64, of which the first `counts` are committed
    counts: torch.Tensor  # [B]


class InFlight:
    """The tokens in flight of one engine."""

    def __init__(self) -> None:
        self._steps: deque[_OpenStep] = deque()
        self._prefilled: dict[str, int] = {}
        """Tokens that the host knew of a request when its prefill was launched."""

    def prefill(self, batch: Batch) -> None:
        """Note a prefill, which samples a token of each request."""
        self._prefilled = {one.rid: len(one.output_ids) for one in batch.reqs}

    def begin(self, batch: Batch, result: StepResult) -> None:
        """Note a decode step that was launched."""
        self._prefilled.clear()
        rows = {one.rid: row for row, one in enumerate(batch.reqs)}
        tokens = result.next_token_ids.view(len(rows), -1).to(torch.int64)
        self._steps.append(_OpenStep(rows, tokens, result.accept_lens))

    def end(self) -> None:
        """Note that the host has the results of the oldest step."""
        if self._steps:
            self._steps.popleft()

    @property
    def max_tokens(self) -> int:
        """The most tokens of a request that can be in flight."""
        after_prefill = 1 if self._prefilled else 0
        return max((step.tokens.shape[1] for step in self._steps), default=after_prefill)

    def drafts(
        self, matches: Matches, batch: Batch, depth: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return drafts [B, depth] int64 and how many of each row are drafts [B], on the device.

        `matches` are those of the tokens that the host knows; behind its drafts a row has zeros.
        """
        continued, device = torch.from_numpy(matches.drafts), batch.seq_lens.device
        counts, rows = torch.tensor(matches.counts), torch.tensor(self._rows(batch))
        if bool((rows == _NOTHING).all()):
            drafts, counts = continued[:, :depth].contiguous(), counts.clamp(max=depth)
            return to_device(drafts, device), to_device(counts, device)

        # One copy to the device.
        packed = to_device(torch.cat([continued, counts[:, None], rows[:, None]], 1), device)
        continued, counts, rows = packed[:, :-2], packed[:, -2], packed[:, -1]
        tokens = batch.spec_info.bonus_tokens[:, None].to(torch.int64)
        taken = (rows == _FIRST).to(torch.int64)
        if self._steps:
            last, decoded = self._steps[-1], rows >= 0
            row = rows.clamp(min=0)
            tokens = torch.where(decoded[:, None], last.tokens[row], tokens)
            taken = torch.where(decoded, last.counts[row], taken)
        return aligned(continued, counts.where(rows != _UNKNOWN, 0), tokens, taken, depth)

    def _rows(self, batch: Batch) -> list[int]:
        return [self._row(one.rid, len(one.output_ids)) for one in batch.reqs]

    def _row(self, request: str, output_length: int) -> int:
        if self._prefilled.get(request) == output_length:
            return _FIRST
        steps = [step for step in self._steps if request in step.rows]
        if not steps:
            return _NOTHING
        return steps[0].rows[request] if steps == [self._steps[-1]] else _UNKNOWN


def aligned(
    continued: torch.Tensor,
    counts: torch.Tensor,
    tokens: torch.Tensor,
    taken: torch.Tensor,
    depth: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what continuations have after the tokens in flight: [B, depth], and how many [B].

    `continued` [B, K], K >= W + depth: the continuations, of which the first `counts` [B] tokens
    count; `tokens` [B, W]: in flight, of which the first `taken` [B] were committed. All are int64.
    """
    place = torch.arange(tokens.shape[1], device=tokens.device)
    same = (continued[:, : tokens.shape[1]] == tokens) | (place >= taken[:, None])
    counts = ((counts - taken) * same.all(1)).clamp(0, depth)
    place = torch.arange(depth, device=tokens.device)
    drafts = continued.gather(1, taken[:, None] + place)
    return drafts * (place < counts[:, None]), counts
