"""Drafts that are sampled: a chain drawn from the drafter's distribution, and verified against it.

A draft X ~ q is accepted with probability min(1, p(X) / q(X)); where it is not, the next token
comes from what p has more than q (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv
2302.01318). Output has the target's distribution p whatever q is, and more drafts are accepted
than with the most likely token, whose chance is p of it: sum(min(p, q)) is near 1 where the
drafter is good, and the largest p is not. Greedy requests are drafted the most likely token.

SGLang has this (`--speculative-use-rejection-sampling`) for CUDA, for engines that only ever run
chains, and for drafters with the target's whole vocabulary. Here its own code paths are taken step
by step, whenever the strategy is a chain: its flag is on for the time of a call. Trees and n-grams
are verified as ever. The distributions are of the target's vocabulary between the calls, and a
drafter with a smaller one has nothing on the tokens that it does not know.

Runs in the scheduler process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def flag(on: bool) -> Iterator[None]:
    """SGLang's flag, for the time of a `with`."""
    from sglang.srt.runtime_context import get_spec

    with get_spec().override(speculative_use_rejection_sampling=on):
        yield


class Sampled:
    """Of one draft worker whose widest strategy keeps `topk` drafts.

    Between two steps a draft input has `topk` most likely drafts and behind them the one that was
    sampled, [B, topk + 1]; only the latter where no strategy is wider than a chain. Its
    `draft_probs` [B, V] float32 is what that one was drawn from.
    """

    def __init__(self, worker: Any, topk: int) -> None:
        self._worker = worker
        self._vocab: int = worker.target_worker.model_config.vocab_size
        self._kept = topk if topk > 1 else 0
        self._nothing: torch.Tensor | None = None

    @property
    def columns(self) -> int:
        """Drafts kept of each request."""
        return self._kept + 1

    def spread(self, probs: torch.Tensor) -> torch.Tensor:
        """[B, V] of the drafter's own [B, D]."""
        known = self._worker.hot_token_id
        if known is None:
            return probs
        return probs.new_zeros(len(probs), self._vocab).index_copy_(1, known, probs)

    # -- the parts of a step, around SGLang's own ------------------------------------------------

    def draft(self, original: Callable[[Any], Any], batch: Any, topk: int) -> Any:
        """The drafter's verify input, of a strategy with `topk` branches."""
        chosen = slice(self._kept, None) if topk == 1 else slice(0, topk)
        ahead = batch.spec_info
        ahead.topk_p = ahead.topk_p[:, chosen].contiguous()
        ahead.topk_index = ahead.topk_index[:, chosen].contiguous()
        with flag(topk == 1):
            return original(batch)

    def prefill(self, original: Callable[[], Any], batch: Any) -> Any:
        """The drafter's prefill, whose draft input SGLang leaves in the drafter's own vocabulary,
        with drafts that are sampled for greedy requests, too."""
        if batch.sampling_info.is_all_greedy:
            with flag(False):
                ahead = original()
            self._most_likely(ahead)
            return ahead
        with flag(True):
            ahead = original()
        probs, greedy = ahead.draft_probs, (batch.sampling_info.top_ks <= 1).view(-1, 1)
        drawn = torch.where(greedy, probs.argmax(-1, keepdim=True), ahead.topk_index)
        ahead.topk_p, ahead.topk_index = self._columns(probs, drawn)
        ahead.draft_probs = self.spread(probs)
        return ahead

    def draft_extend(self, original: Callable[[], None], batch: Any, result: Any) -> None:
        """The drafter's pass over what was committed; fills `result.next_draft_input`."""
        if batch.sampling_info.is_all_greedy:
            with flag(False):
                original()
            self._most_likely(result.next_draft_input)
            return
        with flag(True):
            original()
        ahead, known = result.next_draft_input, self._worker.hot_token_id
        probs = ahead.draft_probs if known is None else ahead.draft_probs[:, known]
        ahead.topk_p, ahead.topk_index = self._columns(probs, ahead.topk_index)

    def put_off(self, ahead: Any, size: int, device: Any) -> None:
        """No drafts for any of so many requests; `caught_up` has to come before the next."""
        ahead.draft_probs = self._none(size, device)

    def caught_up(
        self,
        ahead: Any,
        rows: torch.Tensor,
        logits: torch.Tensor,
        sampling_info: Any,
        lengths: torch.Tensor,
    ) -> None:
        """The drafter has seen what it had missed of `rows` [R], up to `lengths` [R] committed
        tokens, and said `logits` [R, D]."""
        from sglang.srt.speculative.spec_utils import sample_draft_proposal

        seeds = sampling_info.sampling_seed
        probs, _, drawn = sample_draft_proposal(
            logits,
            sampling_info.temperatures[rows],
            sampling_info.top_ks[rows],
            sampling_seed=None if seeds is None else seeds[rows],
            positions=lengths,
        )
        chances, tokens = self._columns(probs, drawn)
        ahead.topk_p = ahead.topk_p.index_copy(0, rows, chances)
        ahead.topk_index = ahead.topk_index.index_copy(0, rows, tokens)
        ahead.draft_probs = ahead.draft_probs.index_copy(0, rows, self.spread(probs))

    def _none(self, size: int, device: Any) -> torch.Tensor:
        """[size, V] of zeros, in the memory of one row: nobody writes into a distribution."""
        if self._nothing is None:
            self._nothing = torch.zeros((1, self._vocab), device=device)
        return self._nothing.expand(size, -1)

    def _most_likely(self, ahead: Any) -> None:
        """Of requests that are all greedy: SGLang's drafts, without a distribution.

        It is verified as one of zeros where a request that is not greedy comes to the batch: the
        target's has one token then, which is accepted if it was drafted, and else comes out.
        """
        if self._kept:
            ahead.topk_p = torch.cat([ahead.topk_p, ahead.topk_p[:, :1]], dim=1)
            ahead.topk_index = torch.cat([ahead.topk_index, ahead.topk_index[:, :1]], dim=1)
        ahead.draft_probs = self._none(len(ahead.topk_index), ahead.topk_index.device)

    def _columns(
        self, probs: torch.Tensor, drawn: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the drafter's distribution [B, D] and what was drawn of it [B, 1]."""
        if not self._kept:
            return probs.gather(1, drawn), drawn
        best = probs.topk(self._kept, dim=-1)
        return (
            torch.cat([best.values, probs.gather(1, drawn)], dim=1),
            torch.cat([best.indices, drawn], dim=1),
        )
