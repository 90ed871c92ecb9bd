"""The deferred drafter: draft-extend that waits while strategies without a drafter run.

Steps of `off` and of n-grams leave their committed tokens pending (`engine.pending`). When a
strategy with a drafter is next chosen, or when the limit is reached, one pass over all of them
brings the drafter up to date, so that it is as warm as if it had run in every step.

Runs in the scheduler process.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tlt_sglang import upstream
from tlt_sglang.engine.pending import PendingBatch, PendingTokens
from tlt_sglang.engine.to_device import LateCounts, to_device

if TYPE_CHECKING:
    from tlt_sglang.graphs.states import RuntimeStates
    from tlt_sglang.upstream.protocols import Batch, DraftInput, DraftWorker, StepResult


@dataclass(frozen=True, slots=True)
class _NoDrafts:
    """Zeros in the shape of a draft, for batches up to their size; nobody writes into them."""

    probs: torch.Tensor  # [B, topk]
    tokens: torch.Tensor  # [B, topk] int64
    hidden: torch.Tensor  # [B, N]


class DeferredDrafter:
    """The drafter of an engine whose pool has strategies that do without it."""

    def __init__(self, states: RuntimeStates, limit: int) -> None:
        """`limit`: bytes of features that may be pending before the drafter catches up."""
        self._states = states
        self.pending = PendingTokens(limit)
        self._no_drafts: _NoDrafts | None = None
        self._steps_open = 0

    def begin_step(self) -> None:
        """Note that a decode step is launched, whose outcome is not known yet."""
        self._steps_open += 1

    def end_step(self) -> None:
        """Note that SGLang has put the tokens of the oldest open step into its requests."""
        self._steps_open = max(0, self._steps_open - 1)

    def defer(self, batch: Batch, result: StepResult) -> None:
        """Leave a verified step pending, and give the next draft input its shape."""
        size, device = len(batch.seq_lens), batch.seq_lens.device
        committed: list[int] | LateCounts = [1] * size
        if self._states.current.num_draft_tokens > 1:
            late = LateCounts(result.accept_lens)
            committed = late.read() if device.type == "cpu" else late
        hidden_states = result.logits_output.hidden_states
        full = self.pending.put(
            request_ids(batch),
            hidden_states,
            result.next_token_ids.to(torch.int64),
            committed,
            copy=device.type != "cpu",  # graphs write where they wrote before
        )

        # The scheduler relays these fields whatever the next strategy reads.
        next_input = result.next_draft_input
        none = self._no_drafts_for(size, hidden_states)
        next_input.topk_p, next_input.topk_index = none.probs[:size], none.tokens[:size]
        next_input.hidden_states = none.hidden[:size]

        if full and (pending := self.pending.take(request_ids(batch))) is not None:
            self._catch_up(batch, pending, result.new_seq_lens, next_input)

    def catch_up(self, batch: Batch) -> bool:
        """Bring the drafter up to date before it drafts; return whether anything was pending."""
        pending = self.pending.take(request_ids(batch), self._steps_open)
        if pending is None:
            return False
        self._catch_up(
            batch, pending, batch.seq_lens, batch.spec_info, _lengths_on_host(batch, pending)
        )
        return True

    def _no_drafts_for(self, size: int, hidden_states: torch.Tensor) -> _NoDrafts:
        if self._no_drafts is None or len(self._no_drafts.tokens) < size:
            columns = self._states.topk
            config = self._states.worker._draft_worker.draft_runner.model_config
            device = hidden_states.device
            self._no_drafts = _NoDrafts(
                torch.zeros((size, columns), device=device),
                torch.zeros((size, columns), dtype=torch.int64, device=device),
                hidden_states.new_zeros((size, config.hidden_size)),
            )
        return self._no_drafts

    def _catch_up(
        self,
        batch: Batch,
        pending: PendingBatch,
        lengths: torch.Tensor,
        draft_input: DraftInput,
        host_lengths: torch.Tensor | None = None,
    ) -> None:
        """Run the drafter over what is pending, up to `lengths` [B] committed tokens; what it
        drafts next goes into the rows of `draft_input`.

        `host_lengths` [R] are those of the pending requests; without them the host waits.
        """
        from tlt_sglang.engine import engine

        worker = self._states.worker._draft_worker
        rows = to_device(pending.rows, lengths.device)
        counts = to_device(pending.counts, lengths.device)
        logits, hidden = _extend(worker, batch, pending, lengths[rows], counts, rows, host_lengths)
        draft_input.hidden_states = draft_input.hidden_states.index_copy(0, rows, hidden)
        propose = engine.require().proposals(worker, batch.sampling_info, rows)
        if propose is None:
            probs, tokens = logits.softmax(-1).topk(self._states.topk, dim=-1)
        else:
            probs, tokens = propose(logits, lengths[rows], self._states.topk)
        draft_input.topk_p = draft_input.topk_p.index_copy(0, rows, probs)
        draft_input.topk_index = draft_input.topk_index.index_copy(0, rows, tokens)


def request_ids(batch: Batch) -> list[str]:
    """Return the ids of a batch's requests, in its order."""
    return [request.rid for request in batch.reqs]


def _lengths_on_host(batch: Batch, pending: PendingBatch) -> torch.Tensor | None:
    """Return the committed tokens of the pending requests [R]; None if the host cannot know.

    With overlap scheduling requests lack the tokens of the step in flight, which is pending.
    """
    if batch.seq_lens_cpu is not None:
        return batch.seq_lens_cpu[pending.rows]
    if pending.recent is None:
        return None
    requests = [batch.reqs[row] for row in pending.rows]
    # The last token of a request was sampled, and is not computed yet.
    held = [len(one.origin_input_ids) + len(one.output_ids) - 1 for one in requests]
    return torch.tensor([a + b for a, b in zip(held, pending.recent, strict=True)])


def _extend(
    worker: DraftWorker,
    batch: Batch,
    pending: PendingBatch,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    rows: torch.Tensor,
    host_lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the drafter's logits [R, D] and hidden states [R, N] after each request's last
    pending token. `lengths`, `counts` and `rows` are [R]: committed and pending tokens, and rows of
    the batch; `host_lengths` are the lengths on the host, or None."""
    if lengths.device.type == "cpu":
        from tlt_sglang.cpu import drafting

        output = drafting.catch_up(worker, batch.req_pool_indices[rows], pending, lengths, counts)
        if output is not None:
            return output
    if host_lengths is None:
        host_lengths = lengths.cpu()
    return _extend_with_sglang(worker, batch, pending, lengths, counts, rows, host_lengths)


def _extend_with_sglang(
    worker: DraftWorker,
    batch: Batch,
    pending: PendingBatch,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    rows: torch.Tensor,
    host_lengths: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do the work of `_extend` in SGLang's own forward pass."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.speculative.eagle_info import EagleDraftExtendInput

    # One gather finds the KV slots of every pending position, request by request.
    pool_rows, total = batch.req_pool_indices[rows], len(pending.tokens)
    index = torch.arange(total, device=rows.device)
    request = torch.repeat_interleave(index[: len(rows)], counts, output_size=total)
    positions = (lengths - counts.cumsum(0))[request] + index
    slots = worker.req_to_token_pool.req_to_token[pool_rows[request], positions]

    # A ragged extend, as after a prefill: every attention backend has it.
    part = copy.copy(batch)
    changes = {
        "reqs": [batch.reqs[row] for row in pending.rows],
        "forward_mode": ForwardMode.EXTEND,
        "input_ids": pending.tokens,
        "req_pool_indices": pool_rows,
        "seq_lens": lengths,
        "orig_seq_lens": lengths.to(torch.int32),
        "seq_lens_cpu": host_lengths,
        "seq_lens_sum": int(host_lengths.sum()),
        "extend_lens": pending.counts,
        "prefix_lens": (host_lengths - torch.tensor(pending.counts)).tolist(),
        "extend_num_tokens": total,
        "extend_logprob_start_lens": pending.counts,
        "out_cache_loc": slots.to(torch.int64),
        "return_logprob": False,
        "has_grammar": False,
        "spec_info": EagleDraftExtendInput(
            hidden_states=pending.features,
            num_tokens_per_req=1,
            num_tokens_for_logprob_per_req=1,
        ),
    }
    for name, value in changes.items():
        setattr(part, name, value)
    forward_batch = upstream.current().extend_batch(part, worker.draft_runner)
    forward_batch.return_logprob = False
    output = worker.draft_runner.forward(forward_batch).logits_output
    # An extend tells the scheduler that the step has read its shared inputs, but the step goes on.
    worker.draft_runner.shared_read_done_event = None
    return output.next_token_logits, output.hidden_states
