"""KV slots for drafts: a decode step goes on without them where the pool is short.

SGLang reserves slots for all drafts of a step, twice where steps overlap, and retracts or aborts
requests if they do not fit. Plain decoding needs one slot for each request, and so does a step here
before any request is retracted: `fits` then gives back what earlier steps have reserved and not
used, and reserves what is free. The drafts that have no slot of their own write to the padding slot
and are not accepted, so that graphs and kernels stay as they are.

Where steps overlap, a short pool first waits for the step in flight: until its outcome is known, so
is neither the length of a request nor the slots that it needs. A step whose sampling depends on the
tokens of the one before, by penalties or a custom logit processor, waits likewise.

Runs in the scheduler process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from tlt_sglang import upstream
from tlt_sglang.strategy.strategies import Strategy, depth_of

if TYPE_CHECKING:
    from tlt_sglang.upstream.kv_pool import DecodeBatch, RequestKv
    from tlt_sglang.upstream.protocols import Scheduler

PADDING_SLOT = 0
"""SGLang never allocates it; padded rows of graphs write to it as well."""

Outcome = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""A verification: the tokens [B * W], accept lengths [B] and accepted rows [B, depth]."""


class KvSlots:
    """The slots that the next decode step may write to."""

    def __init__(self) -> None:
        self._reserve: int | None = None
        """Slots of each request in the next step; None for what SGLang reserves."""
        self._pool_slots: int | None = None
        self._allocated: torch.Tensor | None = None
        """Positions [B] with a slot, in a step that lacks slots for drafts; else None."""

    @property
    def short(self) -> bool:
        """True if the step that begins lacks slots for drafts."""
        return self._allocated is not None

    def of_pool(self, original: Callable[[], int], pool: Sequence[Strategy]) -> int:
        """Return the slots that a request may write in a step of any strategy of `pool`.

        `original` returns those of SGLang's flags, which are as deep as the deepest strategy and as
        wide as the widest.
        """
        if len(pool) < 2:
            return original()
        if self._pool_slots is None:
            self._pool_slots = max(_slots_of(strategy, original) for strategy in pool)
        return self._pool_slots

    # -- what the scheduler asks -----------------------------------------------------------------

    def waits(self, scheduler: Scheduler, batch: DecodeBatch) -> bool:
        """Return True if the next step has to wait for the one in flight.

        It does where slots are short, and where the tokens of the step in flight decide what is
        sampled next: those are not known to penalties and custom logit processors before.
        """
        if not _in_flight(scheduler) or batch.is_empty():
            return False
        info = batch.sampling_info
        if info.penalizer_orchestrator.is_required or info.has_custom_logit_processor:
            return True
        if not _reserves(batch):
            return False
        # Enough free slots, without a look at what the cache holds: the usual case.
        allocator = batch.token_to_kv_pool_allocator
        most = len(batch.reqs) * (2 * upstream.current().slots_per_step() + allocator.page_size)
        return allocator.available_size() < most and not batch.check_decode_mem()

    def fits(
        self,
        original: Callable[[], bool],
        scheduler: Scheduler | None,
        batch: DecodeBatch,
    ) -> bool:
        """Return True if the next step of `batch`, or of some of its requests, fits the pool;
        `original` answers that for what SGLang reserves."""
        self._reserve = None
        if original():
            return True
        if _in_flight(scheduler) or not _reserves(batch):
            return False
        # Nothing is in flight, so a step needs no more than it writes itself.
        self._reserve = upstream.current().slots_per_step()
        if original():
            return True
        _give_back(batch)
        self._reserve = 1
        fits = original()
        if not fits:
            self._reserve = None
        return fits

    def reserve(self, original: Callable[[], int]) -> int:
        """Return the slots that each request needs beyond its committed tokens."""
        return original() if self._reserve is None else self._reserve

    def prepare(self, original: Callable[[], None], batch: DecodeBatch) -> None:
        """Reserve the slots of the next step; `original` allocates them."""
        original()
        short, self._reserve = self._reserve == 1, None
        self._allocated = _mark_missing(batch) if short else None

    # -- what the step asks ----------------------------------------------------------------------

    def accept(self, outcome: Outcome, seq_lens: torch.Tensor, width: int) -> Outcome:
        """Return `outcome` without the drafts that have no slot.

        `seq_lens` [B] are the committed tokens before the step, in which the target has verified
        `width` tokens of each request. The last token that remains takes the part of the bonus
        token: the target has chosen it, and has not computed its keys and values.
        """
        if self._allocated is None:
            return outcome
        allocated, self._allocated = self._allocated, None
        tokens, _, rows = outcome
        slots = (allocated - seq_lens).clamp(min=1)[:, None]
        index = torch.arange(len(rows), device=rows.device, dtype=rows.dtype)[:, None]
        kept = ((rows >= 0) & (rows - index * width < slots)).to(torch.int32).cumprod(dim=1)
        lengths = kept.sum(dim=1, dtype=torch.int32)
        return tokens, lengths, rows.masked_fill(kept == 0, -1)


def _slots_of(strategy: Strategy, original: Callable[[], int]) -> int:
    """Return what SGLang's `original` says of a strategy; the tokens stay those of the flags."""
    sglang, steps = upstream.current(), max(1, depth_of(strategy))
    with sglang.with_spec(speculative_num_steps=steps, speculative_eagle_topk=strategy.topk):
        return original()


def _reserves(batch: DecodeBatch) -> bool:
    """Return True if slots are reserved for drafts, in the way that is known here."""
    from sglang.srt.runtime_context import get_parallel

    algorithm = batch.spec_algorithm
    if not (algorithm.is_eagle() or algorithm.is_standalone() or algorithm.is_ngram()):
        return False
    return batch.hisparse_coordinator is None and bool(get_parallel().pp_size == 1)


def _in_flight(scheduler: Scheduler | None) -> bool:
    """Return True if the outcome of an earlier step is not known yet."""
    return bool(getattr(scheduler, "result_queue", None))


def _give_back(batch: DecodeBatch) -> None:
    """Free the slots beyond the committed tokens of every request, page by page."""
    page = batch.token_to_kv_pool_allocator.page_size
    for request in batch.reqs:
        kv: RequestKv = request.kv
        end = -(-kv.kv_committed_len // page) * page
        if end < kv.kv_allocated_len:
            batch.tree_cache.free_kv_row(kv, [(end, kv.kv_allocated_len)])
            kv.kv_allocated_len = end


def _mark_missing(batch: DecodeBatch) -> torch.Tensor | None:
    """Point the positions without a slot to the padding slot; return the positions [B] with one.

    None if every position that the step writes has a slot.
    """
    records = [request.kv for request in batch.reqs]
    table, width = batch.req_to_token_pool.req_to_token, upstream.current().slots_per_step()
    missing = [
        (kv.req_pool_idx, position)
        for kv in records
        for position in range(kv.kv_allocated_len, kv.kv_committed_len + width)
        if position < table.shape[1]
    ]
    if not missing:
        return None
    device = table.device
    rows, positions = torch.tensor(missing).T.to(device, non_blocking=True)
    table[rows, positions] = PADDING_SLOT
    allocated = torch.tensor([kv.kv_allocated_len for kv in records])
    return allocated.to(device, non_blocking=True)
