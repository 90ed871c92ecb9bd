"""SGLang's CUDA code under pools of strategies, with overlap scheduling.

The same tokens as plain decoding over random switches, the graphs of the plan, and no wait for the
device in our part of a step.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.cuda.apart import apart

if TYPE_CHECKING:
    import torch

    from tests.cuda.engine import Engine
    from tlt_sglang.graphs.plan import Graph


@apart
def test_plain_decoding(tmp_path: Path) -> None:
    """SGLang alone, from its graphs: tokens as transformers has them, and not a wait."""
    from tests.cuda.device import DEVICE
    from tests.cuda.engine import Engine

    engine = Engine(tmp_path)
    runner = engine.scheduler.tp_worker.model_runner.decode_cuda_graph_runner
    assert sorted(sizes(runner)) == [1, 2, 4]
    DEVICE.waits.clear()
    assert engine.generate(20) == engine.expected(20)
    assert not DEVICE.waits
    assert sum(graph.replays for graph in runner.backend._graphs.values()) >= 18


LENGTH = 100
UPSTREAM = "sglang/srt/speculative/eagle_utils.py"
"""Copies the lengths of a step from pageable memory, in every step with a drafter."""


@pytest.mark.parametrize(
    ("pool", "waiting"),
    [
        ("off,eagle3:1x1x2,eagle3:3x1x4,eagle3:3x4x8", {UPSTREAM}),
        ("eagle3:3x1x4,eagle3:5x1x6", {UPSTREAM}),
    ],
)
@apart
def test_pool(tmp_path: Path, pool: str, waiting: list[str]) -> None:
    """A pool at random: the tokens of plain decoding, the plan's graphs, and the known waits."""
    from tests.cuda.device import DEVICE
    from tests.cuda.engine import Engine
    from tlt_sglang.engine import engine as process

    engine = Engine(tmp_path, pool, policy="random")
    assert captured() == planned(engine)
    features = verified(engine)
    copied = features.clone()
    DEVICE.waits.clear()
    assert engine.generate(LENGTH) == engine.expected(LENGTH)
    assert {wait.file for wait in DEVICE.waits} == set(waiting), Counter(DEVICE.waits)
    telemetry = process.require().step.telemetry
    assert telemetry is not None
    for strategy, tally in telemetry.tallies.items():
        assert tally.verify_steps > 0
        assert tally.accepted > 0 or not strategy.num_steps
    # Whoever kept features of an earlier step without a copy would have others now.
    assert features.cpu().tolist() != copied.cpu().tolist()


def verified(engine: Engine) -> torch.Tensor:
    """Return the features that a verification of the current strategy writes into its graph."""
    runner = engine.scheduler.tp_worker.model_runner.decode_cuda_graph_runner
    output = next(iter(runner.backend._outputs.values()))
    features: torch.Tensor = output.hidden_states
    return features


def planned(engine: Engine) -> set[Graph]:
    """Return the graphs that the plan has for the pool of an engine."""
    from tlt_sglang.engine import build
    from tlt_sglang.engine import engine as process
    from tlt_sglang.graphs.plan import needs

    config, worker = process.require().config, engine.scheduler.draft_worker
    plan = build.plan(config, "cuda", worker)
    assert plan is not None
    return {graph for use in plan.uses if use.strategy in config.pool for graph in needs(use)}


def captured() -> set[Graph]:
    """Return the graphs that the states of this process's pool replay."""
    from tlt_sglang.engine import engine as process
    from tlt_sglang.graphs.plan import Graph

    pool = process.require().step.pool
    assert pool is not None
    graphs: set[Graph] = set()
    for strategy, state in pool.states._states.items():
        tokens, shape = (strategy.num_draft_tokens,), (strategy.num_steps, strategy.topk)
        graphs |= {Graph("verify", tokens, size) for size in sizes(state.target_graph_runner)}
        if strategy.num_steps:
            extend = state.cuda_graph_runner_for_draft_extend
            graphs |= {Graph("draft", shape, size) for size in sizes(state.cuda_graph_runner)}
            graphs |= {Graph("extend", tokens, size) for size in sizes(extend)}
    return graphs


def sizes(runner: Any) -> list[int]:
    """Return the batch sizes that a graph runner has captured; None has captured none."""
    return [] if runner is None else [key.size for key in runner.backend._graphs]
