"""Runtime states of a pool: which are built, and with which graphs. SGLang's worker is a mock."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tlt_sglang.graphs.states import RuntimeStates
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

    def __post_init__(self) -> None:
        self.target = SimpleNamespace(attn_backend="started", decode_cuda_graph_runner="started")
        self._target_worker = SimpleNamespace(model_runner=self.target)
        self._draft_worker = SimpleNamespace(
            topk=4,
            parallel_layout=None,
            draft_attn_backend="started",
            cuda_graph_runner="started",
            draft_extend_attn_backend=None,
            cuda_graph_runner_for_draft_extend=None,
            draft_runner=SimpleNamespace(draft_attn_backend=None, attn_backend=None),
            _rebuild_topk1_chain_buffers=lambda: None,
        )

    def build_adaptive_runtime_state(
        self, speculative_num_steps: int, speculative_num_draft_tokens: int, cuda_graph_bs: Any
    ) -> SpecRuntimeState:
        shape = speculative_num_steps, SPEC.speculative_eagle_topk, speculative_num_draft_tokens
        decode = GRAPH.cuda_graph_config["decode"]
        self.built.append((*shape, [] if decode.get("backend") == "disabled" else decode["bs"]))
        return SpecRuntimeState(*shape[::2], target_graph_runner=f"verify {shape[2]}")


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
    assert worker.built == [(3, 1, 4, [1, 2]), (0, 1, 1, [1, 2, 4])]
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
    assert worker.built == [(3, 1, 4, []), (0, 1, 1, [1])]


def test_the_configuration_is_as_before_afterwards(worker: Any) -> None:
    RuntimeStates(worker, [OFF, CHAIN], {OFF: [1]})
    assert SPEC.speculative_eagle_topk == 4
    assert GRAPH.cuda_graph_config == {"decode": {"bs": ALL_SIZES}}
