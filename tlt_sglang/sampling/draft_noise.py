"""The target's noise in SGLang's own drafting on CUDA, for coupled sampling.

SGLang's drafter keeps the most likely tokens of each row, inside captured graphs and outside. Here
its logits are replaced by noisy scores right before that choice, in the functions that patches
wrap: `scores` is called there, and knows the rows because `drafting` or `_after` surrounds it. A
graph reads seeds, temperatures and which requests are greedy from tensors that stay where they are,
and `set_batch` fills those before every draft.

Runs in the scheduler process. Shapes: B requests, D the drafter's vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tlt_sglang.sampling.branch import CHOOSES_BY_PROBS
from tlt_sglang.sampling.coupled import noisy_scores, seeds_of
from tlt_sglang.sampling.ranking import DRAFT_TEMPERATURE

if TYPE_CHECKING:
    from tlt_sglang.upstream.layers import DraftForwardBatch
    from tlt_sglang.upstream.protocols import (
        Batch,
        DraftInput,
        DraftWorker,
        SamplingInfo,
        StepResult,
        VerifyInput,
    )


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows that are drafted for: all that their noise depends on."""

    seeds: torch.Tensor  # [B] int64
    temperatures: torch.Tensor  # [B]
    greedy: torch.Tensor  # [B] bool
    positions: torch.Tensor  # [T], T a multiple of B; they are counted up between two drafts
    ahead: int  # added to the positions


class DraftNoise:
    """The noise of one draft worker's choices, for batches of up to `size` requests."""

    def __init__(self, worker: DraftWorker, size: int) -> None:
        """Allocate what graphs read; called before they are captured."""
        self._worker, device = worker, worker.device
        self._seeds = torch.zeros(size, dtype=torch.int64, device=device)
        self._temperatures = torch.ones(size, device=device)
        self._greedy = torch.ones(size, dtype=torch.bool, device=device)
        self._all_greedy = True
        self._rows: _Rows | None = None

    def set_batch(self, info: SamplingInfo) -> None:
        """Fill what graphs read for the draft that begins."""
        if info.is_all_greedy:
            if not self._all_greedy:
                self._greedy.fill_(True)
            self._all_greedy = True
            return
        size = len(info.temperatures)
        self._seeds[:size].copy_(seeds_of(info))
        self._temperatures[:size].copy_(info.temperatures.view(-1))
        self._greedy[:size].copy_(info.top_ks <= 1)
        self._all_greedy = False

    @contextlib.contextmanager
    def drafting(self, forward_batch: DraftForwardBatch) -> Iterator[None]:
        """Surround SGLang's `draft_forward`, which runs for requests of `set_batch` or is captured
        for later ones."""
        size = slice(0, forward_batch.batch_size)
        rows = _Rows(
            self._seeds[size],
            self._temperatures[size],
            self._greedy[size],
            forward_batch.positions,
            ahead=1,
        )
        with self._set(rows):
            yield

    def draft(self, original: Callable[[Batch], VerifyInput], batch: Batch) -> VerifyInput:
        """Run SGLang's drafter; a strategy of at most one step takes its drafts from before."""
        if self._worker.speculative_num_steps > 1:
            self.set_batch(batch.sampling_info)
        return original(batch)

    def prefill(self, original: Callable[[], DraftInput], batch: Batch) -> DraftInput:
        """Run the drafter's prefill, which keeps the best drafts."""
        with self._after(batch.sampling_info, batch.seq_lens):
            return original()

    def draft_extend(self, original: Callable[[], None], batch: Batch, result: StepResult) -> None:
        """Run the drafter over the committed tokens; fills `result.next_draft_input`."""
        topk, worker = self._worker.topk, self._worker
        if batch.sampling_info.is_all_greedy:
            original()
            return
        # For one draft SGLang takes an argmax that nothing can wrap.
        worker.topk = max(2, topk)
        try:
            with self._after(batch.sampling_info, result.new_seq_lens):
                original()
        finally:
            worker.topk = topk
        next_input = result.next_draft_input
        next_input.topk_p = next_input.topk_p[:, :topk].contiguous()
        next_input.topk_index = next_input.topk_index[:, :topk].contiguous()

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Return what the drafter chooses by: noisy scores [T, D] in the place of its logits."""
        rows = self._rows
        if rows is None or not len(logits):
            return logits
        return noisy_scores(
            logits,
            DRAFT_TEMPERATURE * rows.temperatures,
            rows.seeds,
            rows.greedy,
            rows.positions + rows.ahead,
            self._worker.hot_token_id,
        )

    @contextlib.contextmanager
    def _after(self, info: SamplingInfo, positions: torch.Tensor) -> Iterator[None]:
        """Surround a choice of drafts at `positions` [B], for a batch outside graphs."""
        if info.is_all_greedy:
            yield
            return
        temperatures, greedy = info.temperatures.view(-1), info.top_ks <= 1
        with self._set(_Rows(seeds_of(info), temperatures, greedy, positions, ahead=0)):
            yield

    @contextlib.contextmanager
    def _set(self, rows: _Rows) -> Iterator[None]:
        self._rows, CHOOSES_BY_PROBS.noisy = rows, True
        try:
            yield
        finally:
            self._rows, CHOOSES_BY_PROBS.noisy = None, False
