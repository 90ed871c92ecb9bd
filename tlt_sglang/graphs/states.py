"""The runtime states of a pool of strategies, and the switch between them.

SGLang's adaptive speculation swaps the resources of one number of draft steps for those of another
(`SpecRuntimeState`): draft, verify and draft-extend backends, and their graph runners. This does
the same for whole strategies, topk included. The configuration that sizes SGLang's buffers stays at
the pool's maximum; only the workers' own attributes change, so that a switch is some assignments.

Runs in the scheduler process; knows SGLang's EAGLE workers by their attributes and imports nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tlt_sglang.strategy.acceptance import depth_of
from tlt_sglang.strategy.arms import Strategy


class States:
    """Of SGLang's `EAGLEWorkerV2`, one for each strategy."""

    def __init__(self, worker: Any, strategies: Sequence[Strategy]) -> None:
        """Build what is not there; captures graphs where SGLang does."""
        self.worker = worker
        draft = worker._draft_worker
        self.topk: int = draft.topk
        """Of the pool: as many drafts come out of every draft-extend."""
        self._states: dict[Strategy, Any] = {}
        for strategy in dict.fromkeys(strategies):
            self._shape(strategy)
            self._states[strategy] = worker.build_adaptive_runtime_state(
                speculative_num_steps=depth_of(strategy),
                speculative_num_draft_tokens=strategy.num_draft_tokens,
            )
        self.strategies = tuple(self._states)
        self.current = self.strategies[0]
        self._apply(self.current)

    def switch(self, strategy: Strategy) -> None:
        """Make `strategy` the one of the next step."""
        if strategy != self.current:
            self._apply(strategy)

    def _apply(self, strategy: Strategy) -> None:
        state = self._states[strategy]
        worker, draft = self.worker, self.worker._draft_worker
        target = worker._target_worker.model_runner
        self._shape(strategy)
        draft.draft_attn_backend = state.draft_attn_backend
        draft.draft_runner.draft_attn_backend = state.draft_attn_backend
        draft.cuda_graph_runner = state.cuda_graph_runner
        draft.draft_extend_attn_backend = state.draft_extend_attn_backend
        if state.draft_extend_attn_backend is not None:
            draft.draft_runner.attn_backend = state.draft_extend_attn_backend
        draft.cuda_graph_runner_for_draft_extend = state.cuda_graph_runner_for_draft_extend
        draft._rebuild_topk1_chain_buffers()
        target.attn_backend = state.target_attn_backend
        target.decode_cuda_graph_runner = state.target_graph_runner
        self.current = strategy

    def _shape(self, strategy: Strategy) -> None:
        for one in (self.worker, self.worker._draft_worker):
            one.topk = strategy.topk
            one.speculative_num_steps = depth_of(strategy)
            one.speculative_num_draft_tokens = strategy.num_draft_tokens
