"""Adaptive speculation in SGLang's EAGLE worker: a strategy for every decode step.

Called by the patches of `eagle_worker_v2` around the parts of a decode step, in this order:

    choose         which strategy, and its runtime state
    draft          tokens to verify: of the drafter, of n-grams, or none
    (verify)       SGLang's own
    draft_extend   the drafter sees what was committed, or that is put off (`drafters.backlog`)
    verified       how many drafts were accepted

`topk` drafts come out of every draft-extend, as many as the widest strategy needs; a narrower one
takes the first of them. So any strategy can follow any other, with requests in flight.

Where all that was committed is known when a step begins (without overlap scheduling), n-grams are
looked up before the policy is asked. It is told how long the endings are that were there before,
and a chain drafts what followed them, where they are long enough, for that request alone.

Runs in the scheduler process.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tlt_sglang.drafters.ngram import Found, NgramIndex
from tlt_sglang.engine import first_rank
from tlt_sglang.engine.backlog import Backlog, Missed
from tlt_sglang.engine.driver import Driver
from tlt_sglang.engine.telemetry import Telemetry
from tlt_sglang.graphs.states import States
from tlt_sglang.sampling.rejection import Sampled
from tlt_sglang.strategy.acceptance import depth_of
from tlt_sglang.strategy.arms import Strategy, repeats
from tlt_sglang.strategy.policy import Agreed, Policy

LOOKED_UP = 16
"""Requests of a batch for which n-grams are looked up in every step: a large one has no time."""
READ_EVERY = 8
"""Steps after which what the requests said goes into the n-gram index; before it drafts, always."""


@dataclass(frozen=True, slots=True)
class _Nothing:
    """What a drafter that did not run has drafted for a batch, and for smaller ones: zeros, which
    nobody writes into."""

    chances: torch.Tensor  # [B, topk]
    tokens: torch.Tensor  # [B, topk] int64
    hidden: torch.Tensor  # [B, N]


class Rollout:
    """Of one engine with more than one strategy."""

    def __init__(
        self,
        states: States,
        driver: Driver,
        telemetry: Telemetry,
        *,
        ngram_memory_mb: int,
        backlog_mb: int,
        sampled: Sampled | None = None,
        possible: Callable[[int], Sequence[Strategy]] | None = None,
        up_to_date: bool = False,
    ) -> None:
        """`up_to_date`: requests have all that was committed when a step begins."""
        self.states = states
        self._possible = possible
        drafts_ngrams = any(arm.drafter == "ngram" for arm in states.strategies)
        self.ngrams = NgramIndex(ngram_memory_mb) if drafts_ngrams else None
        self.driver = driver
        self.backlog = Backlog(backlog_mb * 2**20)
        self.telemetry = telemetry
        self._sampled = sampled
        self._steps = 0
        self._up_to_date = up_to_date
        chains = [depth_of(arm) for arm in states.strategies if arm.topk == 1]
        self._deepest = max(chains, default=1)
        self._found: Found | None = None
        self._nothing: _Nothing | None = None
        self.batch: Any = None
        """Of the step that is being made; set by the patch around all of it."""
        self.switch_seconds = 0.0
        """In all switches together."""

    # -- the parts of a step ---------------------------------------------------------------------

    def choose(self, batch_size: int) -> None:
        """A decode step of so many requests begins."""
        self._found = found = None if self.driver.rests(batch_size) else self._look_up()
        strategy = self.driver.begin(batch_size, () if found is None else found.lengths)
        if strategy != self.states.current:
            started = time.perf_counter()
            self.states.switch(strategy)
            if not self.driver.calibrating:
                self.switch_seconds += time.perf_counter() - started
                self.telemetry.switched(strategy, batch_size)

    def draft(self, original: Callable[[Any], Any], batch: Any) -> Any:
        """The verify input of a strategy that drafts; `original` is the drafter's own."""
        if self.states.current.drafter == "ngram":
            return self._draft_ngrams(batch)
        verify_input = self._draft_learned(original, batch)
        self._repeat(verify_input)
        return verify_input

    def _draft_learned(self, original: Callable[[Any], Any], batch: Any) -> Any:
        draft_input = batch.spec_info
        missed = self.backlog.take(_ids(batch))
        if missed is not None:
            self._catch_up(batch, missed, batch.seq_lens, draft_input)
            self.driver.begin_again()
        topk = self.states.worker.topk
        if self._sampled is not None:
            return self._sampled.draft(original, batch, topk)
        draft_input.topk_p = draft_input.topk_p[:, :topk].contiguous()
        draft_input.topk_index = draft_input.topk_index[:, :topk].contiguous()
        return original(batch)

    def draft_extend(self, original: Callable[[], Any], batch: Any, result: Any) -> None:
        """After a verify step; fills `result.next_draft_input`."""
        # From these SGLang counts what each request had verified, and so what was proposed.
        result.cap_lens = torch.full_like(result.accept_lens, self.states.current.num_draft_tokens)
        if self.states.current.drafter in ("off", "ngram"):
            self._put_off(batch, result)
        else:
            with self._widest():
                original()
        self._steps += 1
        if self.ngrams is not None and self._steps % READ_EVERY == 0:
            self._read(self.ngrams, batch)
        self.driver.end(self._came_again(result))

    def prefill(self, original: Callable[[], Any], batch: Any) -> Any:
        """The drafter's own prefill."""
        self.backlog.drop(_ids(batch))
        with self._widest():
            return original()

    def verified(self, accepted: Sequence[int]) -> tuple[Strategy | None, Sequence[int]]:
        """Drafts accepted for each request in the oldest step not told yet: its strategy, and the
        requests that n-grams drafted for."""
        told = self.driver.outcome(accepted)
        if told is None:
            return None, ()
        strategy, endings = told
        self.telemetry.step(strategy, accepted)
        return strategy, _repeating(strategy, endings)

    def pin(self, place: int) -> None:
        """Use the strategy at this place of the pool from now on; -1: what the policy chooses."""
        self.driver.pinned = None if place < 0 else self.states.strategies[place]

    def calibrate(self, on: bool) -> None:
        """The batches from now on are there to learn what strategies cost, until told otherwise."""
        everything = self.states.strategies
        self.driver.calibrate((self._possible or (lambda size: everything)) if on else None)

    def flush(self) -> None:
        """Forget what n-grams were seen, as SGLang forgets prefixes."""
        if self.ngrams is not None:
            self.ngrams.clear()

    def report(self) -> dict[str, Any]:
        """For `GET /tlt/status`."""
        return {
            "strategy": str(self.states.current),
            "switches": self.telemetry.switches,
            "switch_seconds": round(self.switch_seconds, 6),
            "pinned": None if self.driver.pinned is None else str(self.driver.pinned),
        }

    # -- n-grams ---------------------------------------------------------------------------------

    def _read(self, ngrams: NgramIndex, batch: Any) -> None:
        """Take in what the requests have said, as far as SGLang has told them."""
        if len(ngrams) > 2 * len(batch.reqs):
            ngrams.keep(_ids(batch))
        ngrams.extend([(one.rid, one.origin_input_ids, one.output_ids) for one in batch.reqs])

    def _look_up(self) -> Found | None:
        """What followed before; None where there is no looking it up in every step, and for a
        strategy that was pinned by hand, which is what it says it is."""
        ngrams, batch = self.ngrams, self.batch
        if ngrams is None or batch is None or not self._up_to_date:
            return None
        if self.driver.pinned is not None or len(batch.reqs) > LOOKED_UP:
            return None
        return self._looked_up(ngrams, batch)

    def _looked_up(self, ngrams: NgramIndex, batch: Any) -> Found:
        self._read(ngrams, batch)
        return ngrams.look_up(_ids(batch), self._deepest)

    def _repeat(self, verify_input: Any) -> None:
        """Let requests whose ending was there before be drafted what followed it."""
        found, strategy = self._found, self.states.current
        if found is None or not (rows := _repeating(strategy, found.lengths)):
            return
        depth, probs = strategy.num_steps, verify_input.draft_probs
        drafts = verify_input.draft_token.view(-1, depth + 1)
        for row in rows:
            known = min(depth, found.counts[row])
            tokens = torch.from_numpy(found.drafts[row, :known]).to(drafts.device)
            drafts[row, 1 : known + 1] = tokens
            if probs is not None:  # which tokens were drawn from: now each has one
                probs[row, :known] = 0.0
                probs[row, torch.arange(known, device=probs.device), tokens] = 1.0

    def _came_again(self, result: Any) -> list[tuple[int, bool]]:
        """Of each request: tokens that were committed as n-grams would have drafted them, and
        whether one then was not. [] where that takes a look at a device."""
        found, ids = self._found, result.next_token_ids
        if found is None or ids.device.type != "cpu":
            return []
        committed = ids.view(len(found.lengths), -1).numpy()
        told = []
        for row, count in enumerate(result.accept_lens.tolist()):
            known, same = min(count, found.counts[row]), 0
            while same < known and committed[row, same] == found.drafts[row, same]:
                same += 1
            told.append((same, same < min(count, self._deepest)))
        return told

    def _draft_ngrams(self, batch: Any) -> Any:
        """The verify input of a chain of tokens that followed before."""
        from sglang.srt.speculative.eagle_worker_common import build_eagle_verify_input

        assert self.ngrams is not None
        worker = self.states.worker._draft_worker
        size, depth = len(batch.reqs), worker.speculative_num_steps
        found = self._found or self._looked_up(self.ngrams, batch)
        drafts = torch.from_numpy(found.drafts[:, :depth].copy())
        return build_eagle_verify_input(
            batch,
            batch.spec_info,
            worker._topk1_parents_prealloc[:size],
            worker._topk1_score_indices_prealloc[:size],
            drafts.to(batch.seq_lens.device),
            None,
            target_worker=worker.target_worker,
            topk=1,
            num_steps=depth,
            num_draft_tokens=depth + 1,
            tree_mask_mode=worker.tree_mask_mode,
            device=worker.device,
        )

    # -- the drafter that waits ------------------------------------------------------------------

    def _widest(self) -> _Topk:
        return _Topk(self.states.worker._draft_worker, self.states.topk)

    def _put_off(self, batch: Any, result: Any) -> None:
        size, device = len(batch.seq_lens), batch.seq_lens.device
        one_each = self.states.current.num_draft_tokens == 1  # which needs no look at the device
        hidden_states = result.logits_output.hidden_states
        full = self.backlog.put(
            _ids(batch),
            hidden_states,
            result.next_token_ids.to(torch.int64),
            [1] * size if one_each else result.accept_lens.tolist(),
            given=device.type == "cpu",  # graphs write where they wrote before
        )
        ahead = result.next_draft_input
        if self._nothing is None or len(self._nothing.tokens) < size:
            columns = self.states.topk if self._sampled is None else self._sampled.columns
            config = self.states.worker._draft_worker.draft_runner.model_config
            self._nothing = _Nothing(
                torch.zeros((size, columns), device=device),
                torch.zeros((size, columns), dtype=torch.int64, device=device),
                hidden_states.new_zeros((size, config.hidden_size)),
            )
        ahead.topk_p, ahead.topk_index = self._nothing.chances[:size], self._nothing.tokens[:size]
        ahead.hidden_states = self._nothing.hidden[:size]
        if self._sampled is not None:
            self._sampled.put_off(ahead, size, device)
        if full:
            missed = self.backlog.take(_ids(batch))
            assert missed is not None
            self._catch_up(batch, missed, result.new_seq_lens, ahead)

    def _catch_up(
        self, batch: Any, missed: Missed, lengths: torch.Tensor, draft_input: Any
    ) -> None:
        """One pass of the drafter over what was missed, up to `lengths` [B] committed tokens; what
        it drafts next goes into the rows of `draft_input`."""
        worker = self.states.worker._draft_worker
        rows = torch.tensor(missed.rows, device=lengths.device)
        counts = torch.tensor(missed.counts, device=lengths.device)
        logits, hidden = _extend(worker, batch, missed, lengths[rows], counts, rows)
        draft_input.hidden_states = draft_input.hidden_states.index_copy(0, rows, hidden)
        if self._sampled is not None:
            info = batch.sampling_info
            self._sampled.caught_up(draft_input, rows, logits, info, lengths[rows])
            return
        chances, tokens = logits.softmax(-1).topk(self.states.topk, dim=-1)
        draft_input.topk_p = draft_input.topk_p.index_copy(0, rows, chances)
        draft_input.topk_index = draft_input.topk_index.index_copy(0, rows, tokens)


def _repeating(strategy: Strategy, endings: Sequence[int]) -> list[int]:
    """Requests that n-grams draft for in a step of this strategy."""
    return [row for row, ending in enumerate(endings) if repeats(strategy, ending)]


def agreed(policy: Policy, strategies: Sequence[Strategy]) -> Policy:
    """`policy` as it is, or so that all tensor-parallel ranks follow the first one's."""
    exchange = first_rank.exchange()
    return policy if exchange is None else Agreed(policy, strategies, exchange)


def _extend(
    worker: Any,
    batch: Any,
    missed: Missed,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    rows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The drafter's logits [R, D] and hidden states [R, N] after the last of each request."""
    if lengths.device.type == "cpu":
        from tlt_sglang.cpu import drafting

        told = drafting.catch_up(worker, batch.req_pool_indices[rows], missed, lengths, counts)
        if told is not None:
            return told
    from sglang.srt.model_executor.forward_batch_info import (
        CaptureHiddenMode,
        ForwardBatch,
        ForwardMode,
    )
    from sglang.srt.speculative.eagle_info import EagleDraftExtendInput

    table = worker.req_to_token_pool.req_to_token
    pool_rows = batch.req_pool_indices[rows]
    starts = lengths - counts
    ends = counts.cumsum(0)
    # One gather: the slots of every missed position, request by request.
    total = len(missed.tokens)
    of = torch.repeat_interleave(
        torch.arange(len(rows), device=rows.device), counts, output_size=total
    )
    positions = starts[of] + torch.arange(total, device=rows.device) - (ends - counts)[of]
    host_lengths = lengths.cpu()
    part = copy.copy(batch)
    part.reqs = [batch.reqs[row] for row in missed.rows]
    # A ragged extend as after a prefill: every attention backend has it.
    part.forward_mode = ForwardMode.EXTEND
    part.input_ids = missed.tokens
    part.req_pool_indices = pool_rows
    part.seq_lens, part.orig_seq_lens = lengths, lengths.to(torch.int32)
    part.seq_lens_cpu, part.seq_lens_sum = host_lengths, int(host_lengths.sum())
    part.extend_lens = missed.counts
    part.prefix_lens = [
        length - count for length, count in zip(host_lengths.tolist(), missed.counts, strict=True)
    ]
    part.extend_num_tokens = total
    part.extend_logprob_start_lens = missed.counts
    part.out_cache_loc = table[pool_rows[of], positions].to(torch.int64)
    part.return_logprob, part.has_grammar = False, False
    part.spec_info = EagleDraftExtendInput(
        hidden_states=missed.features,
        num_tokens_per_req=1,
        num_tokens_for_logprob_per_req=1,
    )
    forward_batch = ForwardBatch.init_new(
        part,
        worker.draft_runner,
        capture_hidden_mode=CaptureHiddenMode.LAST,
        return_hidden_states_before_norm=False,
    )
    forward_batch.return_logprob = False
    output = worker.draft_runner.forward(forward_batch).logits_output
    # An extend tells the scheduler that the step's shared inputs were read, but the step goes on.
    worker.draft_runner.shared_read_done_event = None
    return output.next_token_logits, output.hidden_states


class _Topk:
    """For the time of a `with`, the draft worker has another topk."""

    def __init__(self, worker: Any, topk: int) -> None:
        self.worker, self.topk = worker, topk

    def __enter__(self) -> None:
        self.before = self.worker.topk
        self.worker.topk = self.topk

    def __exit__(self, *error: object) -> None:
        self.worker.topk = self.before


def _ids(batch: Any) -> list[str]:
    return [request.rid for request in batch.reqs]
