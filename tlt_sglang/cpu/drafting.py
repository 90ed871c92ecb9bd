"""The drafter's part of a decode step on CPU: its layer and its head, without the framework.

SGLang drafts through a model runner, a forward batch and a logits processor for every step of a
chain. On CUDA a captured graph replaces all that; on CPU it takes longer than the layer. The
functions here compute what SGLang's eager code computes, for the EAGLE-3 drafters that `decoder`
supports, and call SGLang's code for the others. They choose no strategy.

A draft-extend runs over the committed tokens, and its head over the last of each request; SGLang's
runs over all verified tokens.

Runs in the scheduler process. Shapes: B requests, R requests with pending tokens, T tokens,
D draft vocabulary, N hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tlt_sglang.cpu import decoder, linear
from tlt_sglang.cpu.attention import LONG_EXTEND, CpuAttnBackend
from tlt_sglang.cpu.kernels.argmax import argmax
from tlt_sglang.cpu.kernels.committed import Committed, committed

if TYPE_CHECKING:
    from tlt_sglang.cpu.decoder_stack import Stack
    from tlt_sglang.upstream.layers import DrafterModel, DraftForwardBatch
    from tlt_sglang.upstream.protocols import Batch, StepResult, Upstream

Draft = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Parents, indices of the best scores, draft tokens [B, drafts], and draft probs or None."""


Propose = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Given logits [R, D], positions [R] and k: weights and columns [R, k] of the best drafts."""


class PendingInput(Protocol):
    """The tokens that the drafter has not computed yet, of R requests one after the other."""

    @property
    def counts(self) -> Sequence[int]:
        """The number of tokens of each request."""

    @property
    def tokens(self) -> Tensor:
        """The tokens [T] int64, each the one after its position."""

    @property
    def features(self) -> Tensor:
        """The target's features [T, 3N] at these positions."""


def draft(
    original: Upstream, worker: Any, forward_batch: DraftForwardBatch, propose: Propose | None
) -> Draft:
    """Draft as `EagleDraftWorker.draft_forward` does, which is called for unsupported drafters.

    `propose` chooses drafts of known noise, None where there is none.
    """
    from sglang.srt.speculative import eagle_worker_v2 as eagle

    # Unsupported drafters and batches take SGLang's own path.
    drafter, size = _drafter(worker), forward_batch.batch_size
    steps, topk, target_ids = worker.speculative_num_steps, worker.topk, worker.hot_token_id
    parents, score_indices = worker._topk1_parents_prealloc, worker._topk1_score_indices_prealloc
    fits = topk > 1 or size <= len(parents)
    if drafter is None or forward_batch.forward_mode.is_idle() or not fits:
        result: Draft = original(worker, forward_batch)
        return result

    # The first tokens come from the last draft-extend.
    draft_input = forward_batch.spec_info
    hidden, positions = draft_input.hidden_states, forward_batch.positions
    topk_p, token = draft_input.topk_p, draft_input.topk_index
    if target_ids is not None:
        token = target_ids[token]
    slots = eagle.per_step_draft_out_cache_loc(forward_batch.out_cache_loc, size, topk, steps)
    slots = slots.contiguous()

    # Every further step reads the tokens of the one before; the last step only selects.
    chain, tree, scores = [], [], None
    for step in range(steps):
        if topk == 1:
            ids = token.flatten()
            chain.append(token)
        else:
            ids, hidden, scores, level = eagle.select_top_k_tokens(
                step, topk_p, token, hidden, scores, topk
            )
            tree.append(level)
        if step == steps - 1:
            break
        backend = worker.draft_attn_backend.attn_backends[step]
        out, hidden = drafter.step(ids, hidden, positions, slots[step], backend)
        topk_p, token = _propose(drafter.logits(out), topk, positions + 1, propose)
        positions.add_(1)
        if target_ids is not None:
            token = target_ids[token]

    # A tree keeps the best nodes of all levels, a chain every token.
    if topk > 1:
        parents, score_indices, tokens = eagle.organize_draft_results(
            *map(list, zip(*tree, strict=True)), worker.speculative_num_draft_tokens
        )
        return parents, score_indices, tokens, None
    return parents[:size], score_indices[:size], torch.cat(chain, dim=1), None


def extend(
    original: Upstream,
    worker: Any,
    batch: Batch,
    result: StepResult,
    *,
    propose: Propose | None = None,
    **kwargs: object,
) -> None:
    """Run the drafter over the committed tokens; fills `result.next_draft_input`.

    Replaces `EagleDraftWorker._draft_extend_for_decode`, and calls it for unsupported drafters.
    """
    drafter = _drafter(worker)
    if drafter is None or batch.forward_mode.is_idle():
        original(worker, batch, result, **kwargs)
        return

    # One pass over the committed tokens; rejected drafts are left out.
    tokens = committed(
        result.accept_lens,
        batch.seq_lens,
        batch.req_pool_indices,
        worker.speculative_num_draft_tokens,
    )
    logits, hidden = drafter.extend(
        tokens,
        result.next_token_ids[tokens.indices].to(torch.int64),
        result.logits_output.hidden_states[tokens.indices],
        batch.out_cache_loc[tokens.indices],
    )

    # The first draft tokens of the next step.
    draft_input = result.next_draft_input
    draft_input.topk_p, draft_input.topk_index = _propose(
        logits, worker.topk, result.new_seq_lens, propose
    )
    draft_input.hidden_states = hidden
    draft_input.cuda_graph_compatible = True


def catch_up(
    worker: Any, rows: Tensor, pending: PendingInput, lengths: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Run the drafter over pending tokens; return logits [R, D] and hidden states [R, N].

    Both belong to the last pending token of each request. `rows` are rows of the request table,
    `lengths` tokens including the pending ones, `counts` pending tokens, all [R]. Returns None for
    unsupported drafters and long inputs, which take SGLang's own path.
    """
    drafter, longest = _drafter(worker), max(pending.counts)
    if drafter is None or longest > LONG_EXTEND:
        return None
    tokens = committed(counts, lengths - counts, rows, longest)
    table = worker.req_to_token_pool.req_to_token
    slots = table[tokens.rows, tokens.positions].to(torch.int64)
    return drafter.extend(tokens, pending.tokens, pending.features, slots)


class _CpuDrafter:
    """A drafter as its stack of layers and its head."""

    def __init__(self, model: DrafterModel, stack: Stack, backend: CpuAttnBackend) -> None:
        self._model, self._stack, self._backend = model, stack, backend

    def extend(
        self, tokens: Committed, ids: Tensor, features: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run one pass over committed ids [T] with features [T, 3N].

        Returns logits [B, D] and the hidden states for the next step [B, N], both after the last
        token of each request.
        """
        self._backend.plan_queries(tokens.rows, tokens.positions + 1)
        out, hidden = self.step(ids, features, tokens.positions, slots, self._backend)
        return self.logits(out[tokens.last]), hidden[tokens.last]

    def step(
        self, ids: Tensor, hidden: Tensor, positions: Tensor, slots: Tensor, backend: CpuAttnBackend
    ) -> tuple[Tensor, Tensor]:
        """Run one pass over ids [T] with hidden [T, N or 3N].

        Returns the input of the head and the hidden states for the next step, each [T, N].
        """
        return decoder.draft(self._model.model, self._stack, ids, hidden, positions, slots, backend)

    def logits(self, out: Tensor) -> Tensor:
        """Return logits [T, D] of the head's input [T, N], without SGLang's padding."""
        vocab = self._model.logits_processor.config.vocab_size
        return linear.linear(out, self._model.lm_head.weight, None)[:, :vocab]


def _drafter(worker: Any) -> _CpuDrafter | None:
    """Return the worker's drafter, or None if SGLang's own code has to run it."""
    from sglang.srt.models.llama_eagle3 import LlamaForCausalLMEagle3

    model, backend = worker.draft_runner.model, worker.draft_runner.attn_backend
    if (
        type(model) is not LlamaForCausalLMEagle3
        or type(backend) is not CpuAttnBackend
        or worker.draft_runner.canary_manager is not None
        or not linear.packed(model.lm_head.weight)
        or hasattr(model.lm_head, "set_lora")
    ):
        return None
    stack = decoder.drafter(model.model)
    return None if stack is None else _CpuDrafter(model, stack, backend)


def _propose(
    logits: Tensor, topk: int, positions: Tensor, propose: Propose | None
) -> tuple[Tensor, Tensor]:
    """Return probs and ids [B, topk] of draft tokens for logits [B, D], the most likely ones where
    `propose` is None."""
    if propose is not None:
        return propose(logits, positions, topk)
    if topk == 1:
        token = argmax(logits).unsqueeze(-1)
        return torch.ones_like(token, dtype=torch.float32), token
    best = logits.softmax(-1).topk(topk, dim=-1)
    return best.values, best.indices
