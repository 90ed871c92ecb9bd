"""Rejection sampling: chains are sampled from the drafter's distribution and verified against it.

A draft X ~ q is accepted with probability min(1, p(X) / q(X)); a rejected one is replaced by a
sample from the part of p that exceeds q (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv
2302.01318). Output has the target's distribution p whatever q is. More drafts are accepted than
when the most likely token is drafted: that one is accepted with its probability under p, a sampled
one with sum(min(p, q)), which is near 1 for a good drafter. For greedy requests the most likely
token is drafted.

SGLang has this (`--speculative-use-rejection-sampling`) for CUDA, for engines that run nothing but
chains, and for drafters with the target's whole vocabulary. Here its own code paths are taken step
by step, whenever the strategy is a chain: its flag is on for the duration of a call. Trees and
n-grams are verified as usual. Between the calls distributions span the target's vocabulary; a
drafter with a smaller one gives probability 0 to the tokens it does not have.

Runs in the scheduler process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from tlt_sglang import upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import (
        Batch,
        DraftInput,
        DraftWorker,
        SamplingInfo,
        StepResult,
        VerifyInput,
    )


@contextlib.contextmanager
def flag(on: bool) -> Iterator[None]:
    """Set SGLang's flag for rejection sampling within a `with` block."""
    with upstream.current().with_spec(speculative_use_rejection_sampling=on):
        yield


class RejectionSampling:
    """Rejection sampling for one draft worker whose widest strategy keeps `topk` drafts.

    Between two steps a draft input holds the `topk` most likely drafts and after them the sampled
    one, [B, topk + 1]; only the latter where no strategy is wider than a chain. Its `draft_probs`
    [B, V] float32 is the distribution that one was sampled from.
    """

    def __init__(self, worker: DraftWorker, topk: int) -> None:
        self._worker = worker
        self._vocab: int = worker.target_worker.model_config.vocab_size
        self._kept = topk if topk > 1 else 0
        self._zeros_row: torch.Tensor | None = None

    @property
    def columns(self) -> int:
        """Drafts kept per request."""
        return self._kept + 1

    def spread(self, probs: torch.Tensor) -> torch.Tensor:
        """Return a distribution over the drafter's vocabulary [B, D] over the target's [B, V]."""
        vocabulary = self._worker.hot_token_id
        if vocabulary is None:
            return probs
        return probs.new_zeros(len(probs), self._vocab).index_copy_(1, vocabulary, probs)

    # -- the parts of a step, around SGLang's own ------------------------------------------------

    def draft(
        self, original: Callable[[Batch], VerifyInput], batch: Batch, topk: int
    ) -> VerifyInput:
        """Return the drafter's verify input for a strategy with `topk` branches."""
        columns = slice(self._kept, None) if topk == 1 else slice(0, topk)
        draft_input = batch.spec_info
        draft_input.topk_p = draft_input.topk_p[:, columns].contiguous()
        draft_input.topk_index = draft_input.topk_index[:, columns].contiguous()
        with flag(topk == 1):
            return original(batch)

    def prefill(self, original: Callable[[], DraftInput], batch: Batch) -> DraftInput:
        """Run the drafter's prefill, and return its draft input.

        SGLang leaves that in the drafter's vocabulary, and samples for greedy requests, too; both
        are put right here.
        """
        if batch.sampling_info.is_all_greedy:
            with flag(False):
                next_input = original()
            self._most_likely(next_input)
            return next_input
        with flag(True):
            next_input = original()
        probs, greedy = next_input.draft_probs, (batch.sampling_info.top_ks <= 1).view(-1, 1)
        sampled = torch.where(greedy, probs.argmax(-1, keepdim=True), next_input.topk_index)
        next_input.topk_p, next_input.topk_index = self._columns(probs, sampled)
        next_input.draft_probs = self.spread(probs)
        return next_input

    def draft_extend(self, original: Callable[[], None], batch: Batch, result: StepResult) -> None:
        """Run the drafter over the committed tokens; fills `result.next_draft_input`."""
        if batch.sampling_info.is_all_greedy:
            with flag(False):
                original()
            self._most_likely(result.next_draft_input)
            return
        with flag(True):
            original()
        next_input, vocabulary = result.next_draft_input, self._worker.hot_token_id
        probs = next_input.draft_probs
        if vocabulary is not None:
            probs = probs[:, vocabulary]
        next_input.topk_p, next_input.topk_index = self._columns(probs, next_input.topk_index)

    def defer(self, next_input: DraftInput, size: int, device: torch.device) -> None:
        """Give `size` requests without drafts a distribution; `caught_up` has to follow before the
        next draft."""
        next_input.draft_probs = self._zeros(size, device)

    def caught_up(
        self,
        next_input: DraftInput,
        rows: torch.Tensor,
        logits: torch.Tensor,
        sampling_info: SamplingInfo,
        lengths: torch.Tensor,
    ) -> None:
        """Sample drafts for `rows` [R] of a batch from the drafter's `logits` [R, D], after it has
        caught up to `lengths` [R] committed tokens."""
        from sglang.srt.speculative.spec_utils import sample_draft_proposal

        seeds = sampling_info.sampling_seed
        probs, _, sampled = upstream.current().sample_proposal(
            sample_draft_proposal,
            logits,
            sampling_info.temperatures[rows],
            sampling_info.top_ks[rows],
            None if seeds is None else seeds[rows],
            lengths,
        )
        column_probs, tokens = self._columns(probs, sampled)
        next_input.topk_p = next_input.topk_p.index_copy(0, rows, column_probs)
        next_input.topk_index = next_input.topk_index.index_copy(0, rows, tokens)
        next_input.draft_probs = next_input.draft_probs.index_copy(0, rows, self.spread(probs))

    def _zeros(self, size: int, device: torch.device) -> torch.Tensor:
        """Return zeros [size, V] in the memory of one row; nobody writes into a distribution."""
        if self._zeros_row is None:
            self._zeros_row = torch.zeros((1, self._vocab), device=device)
        return self._zeros_row.expand(size, -1)

    def _most_likely(self, next_input: DraftInput) -> None:
        """Keep SGLang's drafts for a batch that is all greedy, with a distribution of zeros.

        When a request that is not greedy joins the batch, these are verified against that: the
        target's distribution has one token then, which is accepted if it was drafted and emitted
        otherwise.
        """
        if self._kept:
            next_input.topk_p = torch.cat([next_input.topk_p, next_input.topk_p[:, :1]], dim=1)
            next_input.topk_index = torch.cat(
                [next_input.topk_index, next_input.topk_index[:, :1]], dim=1
            )
        next_input.draft_probs = self._zeros(
            len(next_input.topk_index), next_input.topk_index.device
        )

    def _columns(
        self, probs: torch.Tensor, sampled: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return probabilities and tokens of a draft input's columns, given the drafter's
        distribution [B, D] and the token sampled from it [B, 1]."""
        if not self._kept:
            return probs.gather(1, sampled), sampled
        best = probs.topk(self._kept, dim=-1)
        return (
            torch.cat([best.values, probs.gather(1, sampled)], dim=1),
            torch.cat([best.indices, sampled], dim=1),
        )
