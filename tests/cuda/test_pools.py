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
from tlt_sglang.upstream import versions

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
    check_waits()
    assert sum(graph.replays for graph in runner.backend._graphs.values()) >= 18


LENGTH = 100
SWITCHES = 500
UPSTREAM = "sglang/srt/speculative/eagle_utils.py"
"""Copies the lengths of a step from pageable memory, in every step with a drafter."""


@pytest.mark.parametrize(
    "pool",
    [
        "off,eagle3:1x1x2,eagle3:3x1x4,eagle3:3x4x8,ngram:8",
        "eagle3:3x1x4,eagle3:5x1x6",
        None,
    ],
)
@apart
def test_pool(tmp_path: Path, pool: str | None) -> None:
    """A pool at random, None for the default of an engine with a store.

    The tokens of plain decoding, the plan's graphs and no other, and no wait of ours.
    """
    from tests.cuda.device import DEVICE
    from tests.cuda.engine import Engine
    from tlt_sglang.engine import engine as process

    settings = {"strategies": pool} if pool else {"store": str(tmp_path / "store")}
    engine = Engine(tmp_path, policy="random", **settings)
    check_captures(engine)
    features = verified(engine)
    copied = features.clone()
    expected = engine.expected(LENGTH)
    telemetry = process.require().step.telemetry
    assert telemetry is not None
    DEVICE.waits.clear()
    while telemetry.switches < SWITCHES:
        assert engine.generate(LENGTH) == expected
    check_waits(UPSTREAM)
    assert len(telemetry.tallies) == len(process.require().config.pool)
    for strategy, tally in telemetry.tallies.items():
        assert tally.verify_steps > 0
        assert tally.accepted > 0 or strategy.num_draft_tokens == 1
    # Whoever kept features of an earlier step without a copy would have others now.
    assert features.cpu().tolist() != copied.cpu().tolist()


@pytest.mark.parametrize(
    "pool", ["off,eagle3:1x1x2,eagle3:3x1x4,eagle3:5x1x6,eagle3:7x1x8", "off,eagle3:3x1x4,ngram:8"]
)
@apart
def test_other_pools_of_the_docs(tmp_path: Path, pool: str) -> None:
    """They start and answer, with the plan's graphs and no other."""
    from tests.cuda.engine import Engine

    engine = Engine(tmp_path, strategies=pool, policy="random")
    check_captures(engine)
    assert engine.generate(30) == engine.expected(30)


@apart
def test_default_without_a_store(tmp_path: Path) -> None:
    """One chain of the drafter, with SGLang's own graphs."""
    from tests.cuda.device import DEVICE
    from tests.cuda.engine import Engine
    from tlt_sglang.engine import engine as process

    engine = Engine(tmp_path, calibrate="off")
    assert process.require().step.pool is None
    expected = engine.expected(LENGTH)
    DEVICE.waits.clear()
    assert engine.generate(LENGTH) == expected
    check_waits(UPSTREAM)


@apart
def test_matches_are_found_while_steps_overlap(tmp_path: Path) -> None:
    """N-grams draft nearly all of an answer that was given before."""
    from tests.cuda.engine import Engine
    from tlt_sglang.engine import engine as process

    engine = Engine(tmp_path, strategies="off,eagle3:3x1x4,ngram:8", policy="fixed")
    step = process.require().step
    assert step.pool is not None and step.telemetry is not None
    expected = engine.expected(LENGTH)
    step.pool.pin(0)
    assert engine.generate(LENGTH) == expected
    step.pool.pin(2)
    assert engine.generate(LENGTH) == expected
    (tally,) = [one for name, one in step.telemetry.tallies.items() if name.drafter == "ngram"]
    assert tally.accepted > 0.8 * 4 * LENGTH * 7 / 8, tally


@apart
def test_a_step_launches_little_of_ours(tmp_path: Path) -> None:
    """Each operation outside a graph costs the host some microseconds in every step.

    Verify steps launch two to four times as many of SGLang's own as its plain decoding does.
    """
    from tests.cuda.engine import Engine
    from tlt_sglang.engine import engine as process

    engine = Engine(tmp_path, strategies="off,eagle3:3x1x4,eagle3:3x4x8,ngram:8", policy="fixed")
    pool = process.require().step.pool
    assert pool is not None
    most = {"off": 6, "eagle3:3x1x4": 8, "eagle3:3x4x8": 8, "ngram:8": 32}
    for index, strategy in enumerate(process.require().config.pool):
        pool.pin(index)
        engine.generate(20)
        ours, theirs = launched_each_step(engine)
        assert 0 < ours <= most[str(strategy)] and 40 < theirs < 90, (strategy, ours, theirs)


def launched_each_step(engine: Engine) -> tuple[float, float]:
    """Return the operations of a decode step outside graphs, of TLT and of SGLang."""
    from tests.cuda.device import Device

    steps = 0
    run_batch = engine.scheduler.run_batch

    def counted(batch: Any, *rest: object, **more: object) -> Any:
        nonlocal steps
        if batch.forward_mode.is_decode():
            Device.launches = launches
            steps += 1
        else:
            Device.launches = None
        return run_batch(batch, *rest, **more)

    launches: Counter[str] = Counter()
    engine.scheduler.run_batch = counted
    try:
        engine.generate(LENGTH)
    finally:
        engine.scheduler.run_batch = run_batch
        Device.launches = None
    ours = sum(count for file, count in launches.items() if not file.startswith("sglang/"))
    return ours / steps, (launches.total() - ours) / steps


def verified(engine: Engine) -> torch.Tensor:
    """Return the features that a verification of the current strategy writes into its graph."""
    runner = engine.scheduler.tp_worker.model_runner.decode_cuda_graph_runner
    output = next(iter(runner.backend._outputs.values()))
    features: torch.Tensor = output.hidden_states
    return features


def check_waits(*waiting: str) -> None:
    """Assert that only code in the `waiting` files waits; with an older SGLang, that none of ours
    does."""
    from tests.cuda.device import DEVICE

    files = {wait.file for wait in DEVICE.waits}
    if versions.installed() != versions.NEWEST:
        waiting, files = (), {file for file in files if file.startswith("tlt_sglang")}
    assert files == set(waiting), Counter(DEVICE.waits)


def check_captures(engine: Engine) -> None:
    """Assert that the plan's graphs were captured, and nothing beside them."""
    from tests.cuda.graphs import Graph

    assert captured() == planned(engine)
    assert Graph.captures == len(captured())


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
    from tlt_sglang.strategy.strategies import depth_of

    pool = process.require().step.pool
    assert pool is not None
    graphs: set[Graph] = set()
    for strategy, state in pool.states._states.items():
        shape = depth_of(strategy), strategy.topk, strategy.num_draft_tokens
        graphs |= {Graph("verify", shape, size) for size in sizes(state.target_graph_runner)}
        if strategy.num_steps:
            extend = state.cuda_graph_runner_for_draft_extend
            graphs |= {Graph("draft", shape, size) for size in sizes(state.cuda_graph_runner)}
            graphs |= {Graph("extend", shape, size) for size in sizes(extend)}
    return graphs


def sizes(runner: Any) -> list[int]:
    """Return the batch sizes that a graph runner has captured; None has captured none."""
    return [] if runner is None else [key.size for key in runner.backend._graphs]
