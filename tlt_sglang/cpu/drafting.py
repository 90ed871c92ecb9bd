"""The drafter's part of a decode step on CPU: its layer and its head, and nothing around them.

SGLang drafts through a model runner, a forward batch and a logits processor for every step of a
chain. On CUDA a captured graph takes the place of all that; on CPU it takes longer than the layer.
This is what SGLang's eager code computes, for the EAGLE-3 drafters that `decoder` takes apart.
Others keep SGLang's own.

A draft-extend goes over the tokens that were committed, and its head over the last of each request;
SGLang's goes over all that were verified.

Runs in the scheduler process. Shapes: B requests, T tokens, D draft vocabulary, N hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tlt_sglang.cpu import decoder, linear
from tlt_sglang.cpu.attention import LONG_EXTEND, CpuAttnBackend
from tlt_sglang.cpu.kernels.argmax import argmax
from tlt_sglang.cpu.kernels.committed import Committed, committed
from tlt_sglang.engine.pending import PendingBatch


def draft(original: Callable[..., Any], worker: Any, forward_batch: Any) -> Any:
    """(parents, places of the best scores, draft tokens [B, drafts], distributions or None).

    Takes the place of `EagleDraftWorker.draft_forward`, and calls it where it must.
    """
    from sglang.srt.runtime_context import get_spec
    from sglang.srt.speculative import eagle_worker_v2 as upstream

    drafter, size = _drafter(worker), forward_batch.batch_size
    steps, topk, known = worker.speculative_num_steps, worker.topk, worker.hot_token_id
    parents, places = worker._topk1_parents_prealloc, worker._topk1_score_indices_prealloc
    fits = topk > 1 or size <= len(parents)
    if drafter is None or forward_batch.forward_mode.is_idle() or not fits:
        return original(worker, forward_batch)
    ahead, info = forward_batch.spec_info, forward_batch.sampling_info
    hidden, positions = ahead.hidden_states, forward_batch.positions
    chance, token = ahead.topk_p, ahead.topk_index if known is None else known[ahead.topk_index]
    slots = upstream.per_step_draft_out_cache_loc(forward_batch.out_cache_loc, size, topk, steps)
    slots = slots.contiguous()
    sampled = get_spec().speculative_use_rejection_sampling and not info.is_all_greedy
    distributions = [ahead.draft_probs] if sampled else []
    chain, tree, scores = [], [], None
    for step in range(steps):
        if topk == 1:
            ids = token.flatten()
            chain.append(token)
        else:
            ids, hidden, scores, grown = upstream.select_top_k_tokens(
                step, chance, token, hidden, scores, topk
            )
            tree.append(grown)
        if step == steps - 1:
            break
        backend = worker.draft_attn_backend.attn_backends[step]
        out, hidden = drafter.step(ids, hidden, positions, slots[step], backend)
        probs, chance, token = _propose(
            drafter.logits(out), topk, info if sampled else None, positions + 1, step + 1
        )
        if sampled:
            distributions.append(probs)
        positions.add_(1)
        if known is not None:
            token = known[token]
    drawn = torch.stack(distributions, dim=1) if sampled else None
    if topk > 1:
        told = upstream.organize_draft_results(
            *map(list, zip(*tree, strict=True)), worker.speculative_num_draft_tokens
        )
        return *told, drawn
    return parents[:size], places[:size], torch.cat(chain, dim=1), drawn


def extend(
    original: Callable[..., Any], worker: Any, batch: Any, result: Any, **kwargs: Any
) -> None:
    """Let the drafter see what was committed; fills `result.next_draft_input`.

    Takes the place of `EagleDraftWorker._draft_extend_for_decode`, and calls it where it must.
    """
    from sglang.srt.runtime_context import get_spec

    drafter = _drafter(worker)
    if drafter is None or batch.forward_mode.is_idle():
        original(worker, batch, result, **kwargs)
        return
    seen = committed(
        result.accept_lens,
        batch.seq_lens,
        batch.req_pool_indices,
        worker.speculative_num_draft_tokens,
    )
    logits, hidden = drafter.see(
        seen,
        result.next_token_ids[seen.places].to(torch.int64),
        result.logits_output.hidden_states[seen.places],
        batch.out_cache_loc[seen.places],
    )
    ahead = result.next_draft_input
    sampled = get_spec().speculative_use_rejection_sampling
    probs, ahead.topk_p, ahead.topk_index = _propose(
        logits, worker.topk, batch.sampling_info if sampled else None, result.new_seq_lens
    )
    if sampled:
        ahead.draft_probs = probs
    ahead.hidden_states = hidden
    ahead.cuda_graph_compatible = True


def catch_up(
    worker: Any, rows: Tensor, pending: PendingBatch, lengths: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The drafter's logits [R, D] and hidden states [R, N] after the last token that was missed.

    Of R requests; rows: of the request table; lengths: tokens with what was missed; counts: tokens
    missed, all [R]. None where SGLang's own code has to do it.
    """
    drafter, longest = _drafter(worker), max(pending.counts)
    if drafter is None or longest > LONG_EXTEND:
        return None
    seen = committed(counts, lengths - counts, rows, longest)
    slots = worker.req_to_token_pool.req_to_token[seen.rows, seen.positions].to(torch.int64)
    return drafter.see(seen, pending.tokens, pending.features, slots)


class _Drafter:
    """A drafter taken apart."""

    def __init__(self, model: Any, stack: decoder.Stack, backend: CpuAttnBackend) -> None:
        self._model, self._stack, self._backend = model, stack, backend

    def see(
        self, seen: Committed, ids: Tensor, features: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One pass over ids [T] that were committed, beside features [T, 3N]: (logits [B, D], what
        the next step takes [B, N]) after the last of each request."""
        self._backend.use_queries(seen.rows, seen.positions + 1)
        out, hidden = self.step(ids, features, seen.positions, slots, self._backend)
        return self.logits(out[seen.last]), hidden[seen.last]

    def step(
        self, ids: Tensor, hidden: Tensor, positions: Tensor, slots: Tensor, backend: CpuAttnBackend
    ) -> tuple[Tensor, Tensor]:
        """One pass: ids [T] beside hidden [T, N or 3N] -> (what the head takes, what the next step
        takes), each [T, N]."""
        return decoder.draft(self._model.model, self._stack, ids, hidden, positions, slots, backend)

    def logits(self, out: Tensor) -> Tensor:
        """[T, D] of what the head takes [T, N]; SGLang pads its rows."""
        vocab = self._model.logits_processor.config.vocab_size
        return linear.linear(out, self._model.lm_head.weight, None)[:, :vocab]


def _drafter(worker: Any) -> _Drafter | None:
    """None where SGLang's own code has to do it."""
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
    return None if stack is None else _Drafter(model, stack, backend)


def _propose(
    logits: Tensor, topk: int, info: Any, positions: Tensor, step: int = 0
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(distribution or None, chances, draft ids), the latter [B, topk], of logits [B, D]: drawn
    where there is the `info` of how requests sample, and else the most likely ones."""
    from sglang.srt.speculative import eagle_worker_v2 as upstream

    if info is not None:
        told: tuple[Tensor, Tensor, Tensor] = upstream.sample_draft_proposal(
            logits,
            info.temperatures,
            info.top_ks,
            sampling_seed=info.sampling_seed,
            positions=positions,
            draft_step=step,
        )
        return told
    if topk == 1:
        token = argmax(logits).unsqueeze(-1)
        return None, torch.ones_like(token, dtype=torch.float32), token
    best = logits.softmax(-1).topk(topk, dim=-1)
    return None, best.values, best.indices
