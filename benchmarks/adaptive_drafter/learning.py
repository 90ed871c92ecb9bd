"""The parts of `bench_adaptive_drafter` that learn: from nothing, on one kind, after an update."""

from __future__ import annotations

from dataclasses import asdict

from benchmarks.adaptive_drafter.measurement import Measurement
from benchmarks.adaptive_drafter.processes import CHAIN, NGRAM
from benchmarks.adaptive_drafter.prompts import one_kind
from benchmarks.adaptive_drafter.traffic import Traffic
from benchmarks.harness.program import say


def grow(bench: Measurement) -> None:
    """Start without a drafter: n-grams, until the sidecar's first drafter is swapped in."""
    traffic, held_out = bench.prompts()
    store = bench.store("grow")
    engine = bench.engine(store, "--tlt-grow")
    sidecar = bench.processes.sidecar(store)
    sidecar.pause()
    ngram = engine.accept_length(held_out, bench.options.tokens, NGRAM)
    say(f"n-grams: accept length {ngram:.3f}")
    sidecar.resume()
    bench.learn("grow", engine, traffic)
    sidecar.pause()
    grown = engine.accept_length(held_out, bench.options.tokens, CHAIN)
    bench.add(ngram_accept_len=ngram, grown_accept_len=grown)


def domain(bench: Measurement) -> None:
    """Adapt the shipped drafter to prompts of one kind."""
    traffic, held_out = bench.prompts(one_kind(400))
    store = bench.store("domain")
    engine = bench.engine(store, *bench.shipped())
    sidecar = bench.processes.sidecar(store)
    sidecar.pause()
    before = engine.accept_length(held_out, bench.options.tokens, CHAIN)
    sidecar.resume()
    bench.learn("domain", engine, traffic)
    sidecar.pause()
    after = engine.accept_length(held_out, bench.options.tokens, CHAIN)
    bench.detail("domain", {"before": before, "after": after})
    bench.add(domain_accept_ratio=after / before)


def drift(bench: Measurement) -> None:
    """Update the target to a fine-tuned one, and adapt the shipped drafter to it."""
    traffic, held_out = bench.prompts()
    tokens = bench.options.tokens
    # The new target is made first, while nothing else runs.
    changed = bench.folder / "changed"
    steps = 12 if bench.options.quick else 30
    program = ("-m", "benchmarks.adaptive_drafter.fine_tune")
    fine_tune = bench.processes.other("fine_tune", *program, bench.path, str(changed), str(steps))
    fine_tune.wait_done(900)
    bench.processes.stop()
    # The accept length before the update, and after it with the drafter as it is.
    store = bench.store("drift")
    engine = bench.engine(store, *bench.shipped())
    sidecar = bench.processes.sidecar(store)
    sidecar.pause()
    before = engine.accept_length(held_out, tokens, CHAIN)
    engine.send("/update_weights_from_disk", {"model_path": str(changed)}, 120)
    fallen = engine.accept_length(held_out, tokens, CHAIN)
    say(f"accept length {before:.3f}; after the update {fallen:.3f}")
    frozen = Traffic(engine, traffic, tokens)
    frozen.run(30)
    bench.results.curves["frozen"] = [asdict(point) for point in frozen.points]
    # The accept length once the drafter has learned.
    sidecar.resume()
    bench.learn("adapted", engine, traffic)
    sidecar.pause()
    adapted = engine.accept_length(held_out, tokens, CHAIN)
    bench.detail("drift", {"before": before, "fallen": fallen, "adapted": adapted})
    lost = before - fallen
    if lost < 0.05:
        say("the drafter lost nothing by the target's update, so there is nothing to recover")
        return
    bench.add(drift_recovered_fraction=(adapted - fallen) / lost)
