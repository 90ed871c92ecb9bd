"""A pool chooses among its own strategies, and captures their graphs itself."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from tlt_sglang.config.settings import Config
from tlt_sglang.engine import build
from tlt_sglang.engine.driver import Driver
from tlt_sglang.engine.step import SpeculationStep
from tlt_sglang.engine.telemetry import Telemetry
from tlt_sglang.graphs import states
from tlt_sglang.graphs.model_plan import BATCH_SIZES, plan_for_model
from tlt_sglang.strategy import policies
from tlt_sglang.strategy.strategies import parse

LLAMA = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 1000,
    "num_attention_heads": 4,
}
CHAINS = tuple(map(parse, ("eagle3:3x1x4", "eagle3:5x1x6")))


@pytest.mark.parametrize("policy", ["cost-model", "beg-mab", "ema", "random"])
@pytest.mark.parametrize("size", [1, 64, 200])
def test_a_pool_without_off_never_decodes_plainly(policy: Any, size: int) -> None:
    """A plan always holds `off`, and at 200 requests of six tokens nothing else."""
    plan = plan_for_model(CHAINS, LLAMA)
    allowed = build._within(plan.strategies, CHAINS)
    config = Config(tuple(map(str, CHAINS)), policy=policy)
    driver = Driver(policies.make(config, CHAINS, allowed))
    driver.calibrate(allowed)
    assert {driver.begin(size) for _ in range(6)} <= set(CHAINS)
    driver.calibrate(None)
    assert {driver.begin(size) for _ in range(20)} <= set(CHAINS)


def test_the_drafter_captures_nothing_for_the_flags_of_a_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nothing = contextlib.nullcontext()
    monkeypatch.setattr(states, "nothing_captured", lambda: nothing)
    config, step = Config(tuple(map(str, CHAINS))), SpeculationStep()
    assert build.drafter_capture(config, "cuda", step) is nothing
    assert build.drafter_capture(config, "cpu", step) is not nothing
    assert build.drafter_capture(Config(("eagle3:3x1x4",)), "cuda", step) is not nothing
    step.telemetry = Telemetry(CHAINS)  # from now on the pool builds its states
    assert build.drafter_capture(config, "cuda", step) is not nothing


@pytest.mark.parametrize(
    ("of_sglang", "captured"),
    [
        ([], list(BATCH_SIZES)),
        ([1, 3, 7], [1, 3, 7]),
        ([*range(1, 301)], [*BATCH_SIZES, 300]),
    ],
)
def test_a_pool_captures_no_more_sizes_than_it_has_memory_for(
    monkeypatch: pytest.MonkeyPatch, of_sglang: list[int], captured: list[int]
) -> None:
    sglang = SimpleNamespace(captured_sizes=lambda: of_sglang)
    monkeypatch.setattr("tlt_sglang.upstream.current", lambda: sglang)
    assert [*build._captured_sizes()] == captured
