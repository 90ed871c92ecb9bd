"""The runtime states of a pool of strategies, and the switch between them.

SGLang's adaptive speculation swaps the resources of one number of draft steps for those of another
(`SpecRuntimeState`): draft, verify and draft-extend backends, and their graph runners. This module
does the same for whole strategies, topk included. The configuration that sizes SGLang's buffers
stays at the pool's maximum; only the workers' own attributes change, so that a switch is a handful
of assignments.

Batch sizes outside the plan are not captured. A strategy without a drafter has no graphs but those
of the target's verification, and shares the graphs of one that verifies as many tokens.

Runs in the scheduler process, on SGLang's EAGLE workers. It does not choose a strategy.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from tlt_sglang import upstream
from tlt_sglang.strategy.strategies import Strategy, depth_of

if TYPE_CHECKING:
    import torch

    from tlt_sglang.upstream.protocols import EagleWorker, RuntimeState

    ChainTables = tuple[torch.Tensor, torch.Tensor]


class RuntimeStates:
    """The states of SGLang's `EAGLEWorkerV2`, one for each strategy."""

    def __init__(
        self,
        worker: EagleWorker,
        strategies: Sequence[Strategy],
        captured: Mapping[Strategy, list[int]] | None = None,
        started: bool = True,
    ) -> None:
        """Build the states that are missing, and capture graphs where SGLang does.

        `captured` holds the batch sizes to capture for each strategy; None for those that SGLang
        captures.
        `started` tells whether SGLang has built the state of its own flags.
        """
        self.worker = worker
        draft = worker._draft_worker
        self.topk: int = draft.topk
        """The pool's largest topk: so many drafts come out of every draft-extend."""
        shape = worker.speculative_num_steps, self.topk, worker.speculative_num_draft_tokens
        self._started = shape if started else None
        self._tables: dict[Strategy, ChainTables] = {}
        self._states: dict[Strategy, RuntimeState] = {}
        self.strategies = tuple(dict.fromkeys(strategies))
        with upstream.current().draft_contexts(draft):
            # Those with a drafter first, so that the others can share their graphs.
            for strategy in sorted(self.strategies, key=lambda one: not one.num_steps):
                state = self._present(strategy) or self._shared(strategy, captured)
                self._states[strategy] = state or self._build(
                    strategy, None if captured is None else captured.get(strategy, [])
                )
        self.current = self.strategies[0]
        self._apply(self.current)

    def _present(self, strategy: Strategy) -> RuntimeState | None:
        """Return the state that SGLang has built for its own flags if they are this strategy's."""
        from sglang.srt.speculative.adaptive_runtime_state import SpecRuntimeState

        worker, draft = self.worker, self.worker._draft_worker
        if self._started != (depth_of(strategy), strategy.topk, strategy.num_draft_tokens):
            return None
        target = worker._target_worker.model_runner
        state: RuntimeState = SpecRuntimeState(
            speculative_num_steps=depth_of(strategy),
            speculative_num_draft_tokens=strategy.num_draft_tokens,
            draft_attn_backend=draft.draft_attn_backend,
            cuda_graph_runner=draft.cuda_graph_runner,
            target_attn_backend=target.attn_backend,
            target_graph_runner=target.decode_cuda_graph_runner,
            draft_extend_attn_backend=draft.draft_extend_attn_backend,
            cuda_graph_runner_for_draft_extend=draft.cuda_graph_runner_for_draft_extend,
        )
        return state

    def _shared(
        self, strategy: Strategy, captured: Mapping[Strategy, list[int]] | None
    ) -> RuntimeState | None:
        """Return the state of a strategy that verifies as many tokens, at the same batch sizes;
        None for a drafter's own."""
        if strategy.num_steps:
            return None
        sizes = captured or {}
        for other, state in self._states.items():
            if sizes.get(other) != sizes.get(strategy):
                continue
            if (other.topk, other.num_draft_tokens) == (strategy.topk, strategy.num_draft_tokens):
                shared = copy.copy(state)
                shared.speculative_num_steps = depth_of(strategy)
                return shared
        return None

    def _build(self, strategy: Strategy, batch_sizes: list[int] | None) -> RuntimeState:
        self._set_shape(strategy)
        with _configured(strategy.topk, batch_sizes):
            if not strategy.num_steps:
                return self._build_verification(strategy, batch_sizes)
            return self.worker.build_adaptive_runtime_state(
                speculative_num_steps=depth_of(strategy),
                speculative_num_draft_tokens=strategy.num_draft_tokens,
                cuda_graph_bs=batch_sizes,
            )

    def _build_verification(
        self, strategy: Strategy, batch_sizes: list[int] | None
    ) -> RuntimeState:
        """Build the target's part of a state; the drafter's is that of another strategy."""
        from sglang.srt.model_executor.cuda_graph_config import Phase, check_cuda_graph_backend

        steps, tokens = depth_of(strategy), strategy.num_draft_tokens
        state = copy.copy(next(iter(self._states.values())))
        state.speculative_num_steps, state.speculative_num_draft_tokens = steps, tokens
        target = self.worker._target_worker.model_runner
        with self.worker._override_worker_state(steps, tokens, cuda_graph_bs=batch_sizes):
            workspace = target.init_new_workspace
            try:
                state.target_attn_backend = target._get_attention_backend(init_new_workspace=True)
            finally:
                target.init_new_workspace = workspace
            state.target_graph_runner = None
            if not check_cuda_graph_backend(Phase.DECODE, "disabled"):
                runner = upstream.current().decode_graph_runner(target)
                state.target_graph_runner = runner(
                    target,
                    attn_backend=state.target_attn_backend,
                    speculative_num_steps=steps,
                    speculative_num_draft_tokens=tokens,
                )
        return state

    def switch(self, strategy: Strategy) -> None:
        """Make `strategy` the one of the next step."""
        if strategy != self.current:
            self._apply(strategy)

    def _apply(self, strategy: Strategy) -> None:
        state = self._states[strategy]
        worker, draft = self.worker, self.worker._draft_worker
        target = worker._target_worker.model_runner
        self._set_shape(strategy)
        # The drafter: backends and graphs of its draft steps, and of its draft-extend.
        draft.draft_attn_backend = state.draft_attn_backend
        draft.draft_runner.draft_attn_backend = state.draft_attn_backend
        draft.cuda_graph_runner = state.cuda_graph_runner
        draft.draft_extend_attn_backend = state.draft_extend_attn_backend
        if state.draft_extend_attn_backend is not None:
            draft.draft_runner.attn_backend = state.draft_extend_attn_backend
        draft.cuda_graph_runner_for_draft_extend = state.cuda_graph_runner_for_draft_extend
        if strategy.topk == 1:
            self._set_tables(strategy)
        # The target: those of its verification.
        target.attn_backend = state.target_attn_backend
        target.decode_cuda_graph_runner = state.target_graph_runner
        self.current = strategy

    def _set_tables(self, strategy: Strategy) -> None:
        """Set the constant tables of a chain, which are filled when it is first used."""
        draft, tables = self.worker._draft_worker, self._tables.get(strategy)
        if tables is None:
            draft._rebuild_topk1_chain_buffers()
            tables = draft._topk1_parents_prealloc, draft._topk1_score_indices_prealloc
            self._tables[strategy] = tables
        draft._topk1_parents_prealloc, draft._topk1_score_indices_prealloc = tables

    def _set_shape(self, strategy: Strategy) -> None:
        for worker in (self.worker, self.worker._draft_worker):
            worker.topk = strategy.topk
            worker.speculative_num_steps = depth_of(strategy)
            worker.speculative_num_draft_tokens = strategy.num_draft_tokens


def nothing_captured() -> contextlib.AbstractContextManager[object]:
    """Return a context in which SGLang captures no graphs of decode steps."""
    return upstream.current().with_captured_sizes([])


@contextlib.contextmanager
def _configured(topk: int, batch_sizes: list[int] | None) -> Iterator[None]:
    """Set `topk` and the batch sizes to capture while SGLang builds runners and backends.

    They read SGLang's configuration, not the worker. None leaves the batch sizes as they are.
    """
    sglang = upstream.current()
    with sglang.with_spec(speculative_eagle_topk=topk), sglang.with_captured_sizes(batch_sizes):
        yield
