"""The pool: which strategy a decode step has, and the parts that only several strategies need.

`topk` drafts come out of every draft-extend, as many as the widest strategy needs; a narrower one
takes the first of them. So any strategy can follow any other, with requests in flight.

Runs in the scheduler process; `engine.step` calls it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from tlt_sglang import upstream
from tlt_sglang.engine import first_rank
from tlt_sglang.engine.deferred import DeferredDrafter, request_ids
from tlt_sglang.engine.ngram_drafting import NgramDrafting, matched_rows
from tlt_sglang.sampling.sampled import sampled_rows
from tlt_sglang.strategy.policy import Agreed, Policy
from tlt_sglang.strategy.strategies import Strategy

if TYPE_CHECKING:
    from tlt_sglang.engine.driver import Driver
    from tlt_sglang.engine.telemetry import Telemetry
    from tlt_sglang.graphs.states import RuntimeStates
    from tlt_sglang.upstream.protocols import Batch, StepResult, Upstream, VerifyInput


class Pool:
    """The strategies of an engine that has more than one."""

    def __init__(
        self,
        states: RuntimeStates,
        driver: Driver,
        telemetry: Telemetry,
        *,
        ngram_memory_mb: int,
        pending_mb: int,
        allowed: Callable[[int], Sequence[Strategy]] | None = None,
    ) -> None:
        """`allowed`: strategies by batch size, None for all of them."""
        self.states, self.driver = states, driver
        self._telemetry, self._allowed = telemetry, allowed
        drafts_ngrams = any(strategy.drafter == "ngram" for strategy in states.strategies)
        self.ngrams = NgramDrafting(states, ngram_memory_mb) if drafts_ngrams else None
        self.deferred = DeferredDrafter(states, pending_mb * 2**20)
        self._narrowest = min(states.strategies, key=lambda one: one.num_draft_tokens)
        self.switch_seconds = 0.0
        """Time of all switches together."""

    # -- the parts of a step ---------------------------------------------------------------------

    def choose(self, batch: Batch, slots_short: bool = False) -> None:
        """Choose the strategy of the decode step of `batch` that begins, and switch to it.

        `slots_short`: drafts have no KV slots, so that the narrowest strategy wastes least.
        """
        size, forced = len(batch.reqs), self._narrowest if slots_short else None

        # A strategy that was pinned by hand drafts as its name says, and a plain run goes on
        # without a choice: neither needs matches.
        lengths: Sequence[int] = ()
        if self.ngrams is not None:
            skips = self.driver.skips_selection(size) or self.driver.pinned_strategy is not None
            skips = skips or slots_short
            lengths = self.ngrams.begin(None if skips else batch)

        strategy = self.driver.begin(size, lengths, forced, sampled_rows(batch.reqs))
        if strategy != self.states.current:
            started = time.perf_counter()
            self.states.switch(strategy)
            if not self.driver.calibrating:
                self.switch_seconds += time.perf_counter() - started
                self._telemetry.switched(strategy, size)

    def draft(self, original: Callable[[Batch], VerifyInput], batch: Batch) -> VerifyInput:
        """Return the verify input of the step's strategy; `original` runs SGLang's drafter."""
        if self.states.current.drafter == "ngram":
            assert self.ngrams is not None
            return self.ngrams.verify_input(batch)
        if self.deferred.catch_up(batch):
            self.driver.restart_timer()
        verify_input = self._draft_learned(original, batch)
        if self.ngrams is not None:
            self.ngrams.take_over(verify_input, self.states.current, batch)
        return verify_input

    def _draft_learned(self, original: Callable[[Batch], VerifyInput], batch: Batch) -> VerifyInput:
        topk = self.states.worker.topk
        draft_input = batch.spec_info
        draft_input.topk_p = draft_input.topk_p[:, :topk].contiguous()
        draft_input.topk_index = draft_input.topk_index[:, :topk].contiguous()
        drafter = self.states.worker._draft_worker
        if self.states.current.num_steps > 1 or topk > 1 or drafter.device != "cpu":
            return original(batch)
        # The only draft is known already. SGLang would prepare a forward pass that nobody runs; on
        # CUDA what it prepares is read later.
        drafts = draft_input.topk_index
        if drafter.hot_token_id is not None:
            drafts = drafter.hot_token_id[drafts]
        return upstream.current().chain_to_verify(drafter, batch, drafts)

    def draft_extend(self, original: Callable[[], None], batch: Batch, result: StepResult) -> None:
        """Let the drafter see a verified step, or defer that; fills `result.next_draft_input`."""
        self.deferred.begin_step()
        # From these SGLang counts what each request had verified, and so what was proposed.
        result.cap_lens = torch.full_like(result.accept_lens, self.states.current.num_draft_tokens)
        if self.states.current.drafter in ("off", "ngram"):
            self.deferred.defer(batch, result)
        else:
            with self._widest():
                original()
        if self.ngrams is None:
            self.driver.end([])
            return
        self.ngrams.end(batch, result)
        self.driver.end(self.ngrams.outcomes(result))

    def prefill(self, original: Upstream, batch: Batch) -> object:
        """Run the drafter's own prefill, after which nothing is pending for these requests."""
        self.deferred.pending.drop(request_ids(batch))
        if self.ngrams is not None:
            self.ngrams.prefill(batch)
        with self._widest():
            return original()

    def verified(
        self,
        accepted: Sequence[int],
        sampled: Sequence[bool] = (),
        rows: Sequence[int] | None = None,
    ) -> tuple[Strategy | None, Sequence[int]]:
        """Note the drafts accepted per request in the oldest step that is still open, and which
        requests are sampled (none if empty); return its strategy, and the requests that n-grams
        drafted for. `rows` are the requests that count, None for all of the step."""
        self.deferred.end_step()
        if self.ngrams is not None:
            self.ngrams.in_flight.end()
        outcome = self.driver.outcome(accepted, sampled, rows)
        if outcome is None:
            return None, ()
        strategy, lengths = outcome
        self._telemetry.step(strategy, accepted, sampled)
        return strategy, matched_rows(strategy, lengths)

    # -- by command ------------------------------------------------------------------------------

    def pin(self, index: int) -> None:
        """Use the strategy at this index of the pool from now on; -1 lets the policy choose."""
        self.driver.pinned_strategy = None if index < 0 else self.states.strategies[index]

    def calibrate(self, on: bool) -> None:
        """Let the strategies take turns to learn what they cost, until switched off again."""
        everything = self.states.strategies
        self.driver.calibrate((self._allowed or (lambda size: everything)) if on else None)

    def flush(self) -> None:
        """Forget the n-grams and what is pending, as SGLang forgets prefixes; no request runs."""
        self.deferred.pending.keep(())
        if self.ngrams is not None:
            self.ngrams.index.clear()

    def report(self) -> dict[str, object]:
        """Return the pool's part of `GET /tlt/status`."""
        return {
            "strategy": str(self.states.current),
            "switches": self._telemetry.switches,
            "switch_seconds": round(self.switch_seconds, 6),
            "pinned_strategy": None
            if self.driver.pinned_strategy is None
            else str(self.driver.pinned_strategy),
        }

    @contextlib.contextmanager
    def _widest(self) -> Iterator[None]:
        """Let the drafter keep as many drafts as the widest strategy needs."""
        worker = self.states.worker._draft_worker
        topk, worker.topk = worker.topk, self.states.topk
        try:
            yield
        finally:
            worker.topk = topk


def agreed(policy: Policy, strategies: Sequence[Strategy], dwell: int) -> Policy:
    """Return `policy`, or one by which every tensor-parallel rank follows the first rank's for
    `dwell` steps at a time."""
    exchange = first_rank.exchange()
    return policy if exchange is None else Agreed(policy, strategies, exchange, dwell)
