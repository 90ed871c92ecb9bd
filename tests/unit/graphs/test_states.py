"""Runtime states of a pool: which are built, and with which graphs. SGLang's worker is a mock."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tlt_sglang.graphs.states import RuntimeStates, nothing_captured
from tlt_sglang.strategy.strategies import Strategy, parse

OFF, CHAIN, TREE, NGRAM = Strategy("off"), *map(parse, ("eagle:3x1x4", "eagle:3x4x8", "ngram:4"))


ALL_SIZES = [1, 2, 4, 8]


class Bag(SimpleNamespace):
    """A part of SGLang's configuration, which its runners read while they are built."""

    @contextlib.contextmanager
    def override(self, **changes: Any) -> Iterator[None]:
        before = {name: getattr(self, name) for name in changes}
        vars(self).update(changes)
        yield
        vars(self).update(before)


SPEC = Bag(speculative_eagle_topk=4)
GRAPH = Bag(cuda_graph_config={"decode": {"bs": ALL_SIZES}})


@dataclass
class SpecRuntimeState:
    """SGLang's class, reduced to the fields that are switched."""

    speculative_num_steps: int
    speculative_num_draft_tokens: int
    draft_attn_backend: Any = None
    cuda_graph_runner: Any = None
    target_attn_backend: Any = None
    target_graph_runner: Any = None
    draft_extend_attn_backend: Any = None
    cuda_graph_runner_for_draft_extend: Any = None


@dataclass
class Worker:
    """An EAGLE worker that was started for a tree."""

    topk: int = 4
    speculative_num_steps: int = 3
    speculative_num_draft_tokens: int = 8
    built: list[tuple[int, int, int, Any]] = field(default_factory=list)
    """Shapes and batch sizes of whole states."""
    verified: list[tuple[int, int, int, Any]] = field(default_factory=list)
    """Shapes and batch sizes of states whose drafter is another's."""

    def __post_init__(self) -> None:
        self.target = SimpleNamespace(
            attn_backend="started",
            decode_cuda_graph_runner="started",
            init_new_workspace=False,
            _get_attention_backend=lambda init_new_workspace: "new",
            _decode_cuda_graph_runner_cls=lambda: self._capture,
        )
        self._target_worker = SimpleNamespace(model_runner=self.target)
        self._draft_worker = SimpleNamespace(
            topk=4,
            parallel_layout=None,
            draft_attn_backend="started",
            cuda_graph_runner="started",
            draft_extend_attn_backend=None,
            cuda_graph_runner_for_draft_extend=None,
            draft_runner=SimpleNamespace(draft_attn_backend=None, attn_backend=None),
            _rebuild_topk1_chain_buffers=self._fill_tables,
        )
        self.filled: list[int] = []

    def _fill_tables(self) -> None:
        self.filled.append(self.speculative_num_steps)
        self._draft_worker._topk1_parents_prealloc = f"parents {self.speculative_num_steps}"
        self._draft_worker._topk1_score_indices_prealloc = "scores"

    def _sizes(self) -> list[int]:
        decode: Any = GRAPH.cuda_graph_config["decode"]
        return [] if decode.get("backend") == "disabled" else list(decode["bs"])

    @contextlib.contextmanager
    def _override_worker_state(
        self, steps: int, tokens: int, cuda_graph_bs: Any = None
    ) -> Iterator[None]:
        assert tokens == steps + 1
        yield

    def _capture(self, target: Any, *, attn_backend: str, **shape: int) -> str:
        """SGLang's DecodeCudaGraphRunner."""
        steps, tokens = shape["speculative_num_steps"], shape["speculative_num_draft_tokens"]
        self.verified.append((steps, SPEC.speculative_eagle_topk, tokens, self._sizes()))
        return f"{attn_backend} verify {tokens}"

    def build_adaptive_runtime_state(
        self, speculative_num_steps: int, speculative_num_draft_tokens: int, cuda_graph_bs: Any
    ) -> SpecRuntimeState:
        shape = speculative_num_steps, SPEC.speculative_eagle_topk, speculative_num_draft_tokens
        self.built.append((*shape, self._sizes()))
        return SpecRuntimeState(
            *shape[::2],
            cuda_graph_runner=f"draft {shape[0]}",
            target_graph_runner=f"verify {shape[2]}",
        )


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    @contextlib.contextmanager
    def surroundings(*layout: object) -> Iterator[None]:
        yield

    eagle, adaptive = ModuleType("eagle"), ModuleType("adaptive")
    for name in ("draft_tp", "speculative_moe_backend", "speculative_moe_a2a_backend"):
        setattr(eagle, f"{name}_context", surroundings)
    adaptive.SpecRuntimeState = SpecRuntimeState  # type: ignore[attr-defined]
    package = ModuleType("sglang.srt.speculative")
    graphs, context = ModuleType("cuda_graph_config"), ModuleType("runtime_context")
    graphs.Phase = SimpleNamespace(DECODE="decode")  # type: ignore[attr-defined]
    graphs.check_cuda_graph_backend = lambda phase, backend: (  # type: ignore[attr-defined]
        GRAPH.cuda_graph_config[phase].get("backend") == backend
    )
    graphs.with_phase = lambda config, phase, **changes: {  # type: ignore[attr-defined]
        **config,
        phase: config[phase] | changes,
    }
    context.get_spec = lambda: SPEC  # type: ignore[attr-defined]
    context.get_exec = lambda: SimpleNamespace(graph=GRAPH)  # type: ignore[attr-defined]
    package.eagle_worker_v2 = eagle  # type: ignore[attr-defined]
    for name, module in {
        "sglang": ModuleType("sglang"),
        "sglang.srt": ModuleType("sglang.srt"),
        "sglang.srt.model_executor.cuda_graph_config": graphs,
        "sglang.srt.runtime_context": context,
        "sglang.srt.speculative": package,
        "sglang.srt.speculative.eagle_worker_v2": eagle,
        "sglang.srt.speculative.adaptive_runtime_state": adaptive,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    return Worker()


def test_only_what_is_missing_is_built(worker: Any) -> None:
    """SGLang has built the tree, and n-grams are verified in the graphs of the chain."""
    captured = {OFF: [1, 2, 4], CHAIN: [1, 2], TREE: [1], NGRAM: [1, 2]}
    states = RuntimeStates(worker, [OFF, CHAIN, TREE, NGRAM], captured)
    assert worker.built == [(3, 1, 4, [1, 2])]
    assert worker.verified == [(0, 1, 1, [1, 2, 4])]
    assert states.strategies == (OFF, CHAIN, TREE, NGRAM)
    assert states.current == OFF
    states.switch(TREE)
    assert worker.target.decode_cuda_graph_runner == "started"
    assert (worker.topk, worker.speculative_num_draft_tokens) == (4, 8)
    for strategy in (CHAIN, NGRAM):
        states.switch(strategy)
        assert worker.target.decode_cuda_graph_runner == "verify 4"
        assert worker.topk == worker._draft_worker.topk == 1


def test_without_a_plan_sglang_names_the_batch_sizes(worker: Any) -> None:
    RuntimeStates(worker, [NGRAM, CHAIN])
    assert worker.built == [(3, 1, 4, ALL_SIZES)]


def test_batch_sizes_outside_the_plan_are_not_captured(worker: Any) -> None:
    RuntimeStates(worker, [OFF, CHAIN], {OFF: [1]})
    assert worker.built == [(3, 1, 4, [])]
    assert worker.verified == [(0, 1, 1, [1])]


def test_the_configuration_is_as_before_afterwards(worker: Any) -> None:
    RuntimeStates(worker, [OFF, CHAIN], {OFF: [1]})
    assert SPEC.speculative_eagle_topk == 4
    assert GRAPH.cuda_graph_config == {"decode": {"bs": ALL_SIZES}}


def test_plain_decoding_has_no_graphs_of_a_drafter(worker: Any) -> None:
    states = RuntimeStates(worker, [OFF, CHAIN, TREE], {OFF: [8], CHAIN: [1], TREE: [1]})
    states.switch(CHAIN)
    states.switch(OFF)
    assert worker.target.decode_cuda_graph_runner == "new verify 1"
    assert worker._draft_worker.cuda_graph_runner == "draft 3"  # which it never replays


def test_the_strategy_of_sglangs_flags_is_captured_as_planned(worker: Any) -> None:
    """On a GPU SGLang captures nothing for its own flags, as most pools have no such strategy."""
    RuntimeStates(worker, [OFF, TREE], {OFF: [1, 2], TREE: [1]}, started=False)
    assert worker.built == [(3, 4, 8, [1])]
    with nothing_captured():
        assert worker._sizes() == []
    assert worker._sizes() == ALL_SIZES


def test_a_switch_fills_no_table_twice(worker: Any) -> None:
    states = RuntimeStates(worker, [OFF, CHAIN, TREE])
    for strategy in (CHAIN, TREE, OFF, CHAIN, OFF):
        states.switch(strategy)
    assert worker.filled == [0, 3]
    assert worker._draft_worker._topk1_parents_prealloc == "parents 0"
    states.switch(CHAIN)
    assert worker._draft_worker._topk1_parents_prealloc == "parents 3"
