"""The part of `bench_adaptive_drafter` that measures what learning costs the engine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.adaptive_drafter.measurement import MODEL, Measurement
from benchmarks.adaptive_drafter.processes import AT_ONCE, CHAIN, Engine, Sidecar, wait
from benchmarks.adaptive_drafter.traffic import Traffic
from benchmarks.harness.processes import stop
from benchmarks.harness.prompts import Prompt
from benchmarks.harness.statistics import quantile, spread


def cost(bench: Measurement) -> None:
    """Measure an idle sidecar, the log, swaps under load, and training on the other core."""
    traffic, _ = bench.prompts()
    store = bench.store("cost")
    engine = bench.engine(store, *bench.shipped())
    _idle_cost(bench, store)
    engine.pin(CHAIN)
    _harvest_cost(bench, engine, traffic)
    _swap_cost(bench, engine, traffic, store)
    sidecar = bench.processes.sidecar(store, "--tlt-sidecar-gate-steps", "1000000")
    Traffic(engine, traffic, bench.options.tokens).run(20)
    wait("the sidecar's first step", lambda: sidecar.status().get("step", 0) > 1, 120)
    _training_cost(bench, engine, traffic, sidecar)


def _idle_cost(bench: Measurement, store: Path) -> None:
    sidecar = bench.processes.sidecar(store)
    wait("the start of the sidecar", sidecar.status, 120)
    bench.add(idle_sidecar_cores=sidecar.idle_share(10.0))
    stop([sidecar])


def _harvest_cost(bench: Measurement, engine: Engine, prompts: Sequence[Prompt]) -> None:
    speeds = _in_turn(bench, engine, prompts, lambda on: engine.harvest(1.0 if on else 0.0))
    engine.harvest(1.0)
    _add_cost(bench, "harvest_cost_fraction", speeds)


def _training_cost(
    bench: Measurement, engine: Engine, prompts: Sequence[Prompt], sidecar: Sidecar
) -> None:
    def switch(on: bool) -> None:
        if on:
            sidecar.resume()
        else:
            sidecar.pause()

    _add_cost(bench, "training_cost_fraction", _in_turn(bench, engine, prompts, switch))


def _in_turn(
    bench: Measurement, engine: Engine, prompts: Sequence[Prompt], switch: Callable[[bool], None]
) -> list[tuple[float, float]]:
    """Return (tokens/s with the cost, tokens/s without it) of each pair; one more warms up."""
    pairs = []
    for number in range(-1, bench.options.pairs):
        speed = {}
        for on in (True, False):
            switch(on)
            sample = engine.generate(prompts[:AT_ONCE], 64)
            speed[on] = sample.tokens / sample.seconds
        if number >= 0:
            pairs.append((speed[True], speed[False]))
    return pairs


def _add_cost(bench: Measurement, name: str, speeds: list[tuple[float, float]]) -> None:
    ratios = [on / off for on, off in speeds]
    bench.detail(name, {"tokens_per_s": speeds, "ratios": spread(ratios).as_json()})
    bench.add(**{name: 1 - statistics.median(ratios)})


def _swap_cost(bench: Measurement, engine: Engine, prompts: Sequence[Prompt], store: Path) -> None:
    """Time swaps under load, in decode steps of four requests."""
    from tlt_sglang.models.shipped import default_drafter
    from tlt_sglang.weights import describe
    from tlt_sglang.weights.store import Store

    folder = default_drafter(MODEL)
    assert folder is not None
    expected = describe.expected(folder, describe.target_config(bench.path), "F32")
    weights, versions = describe.load(folder), Store(store)
    # The unit: a decode step, from a batch of which the number of verify steps is counted.
    sample = engine.generate(prompts[:AT_ONCE], 64)
    before = engine.status()["strategies"][CHAIN]["verify_steps"]
    engine.generate(prompts[:AT_ONCE], 64)
    steps = (engine.status()["strategies"][CHAIN]["verify_steps"] - before) / AT_ONCE
    step_ms = 1000 * sample.seconds / steps
    # Versions with the same weights are published one after another, under load.
    with Traffic(engine, prompts, bench.options.tokens).in_background():
        for _ in range(bench.options.swaps):
            number = versions.publish(weights, expected.architecture, expected.base)
            wait("a swap", lambda: engine.status()["drafter_version"] == number, 60)  # noqa: B023
    swaps = sorted(ms for _, ms in engine.status()["swap"]["swaps"])
    bench.detail("swap", {"ms": swaps, "step_ms": round(step_ms, 2)})
    bench.add(
        swap_steps_p50=quantile(swaps, 0.5) / step_ms,
        swap_steps_p99=quantile(swaps, 0.99) / step_ms,
    )
