"""The parts of `bench_adaptive_drafter` in which trainer and engine share a core by turns."""

from __future__ import annotations

import threading
import time

from benchmarks.adaptive_drafter.measurement import Measurement
from benchmarks.adaptive_drafter.processes import AT_ONCE, wait
from benchmarks.adaptive_drafter.traffic import Traffic
from benchmarks.harness.statistics import quantile
from tlt_sglang.coordinator.status import query_status


def preempt(bench: Measurement) -> None:
    """Time how fast the trainer gives way when requests arrive."""
    traffic, _ = bench.prompts()
    store = bench.store("preempt")
    endpoint = bench.coordinator()
    flags = ("--tlt-coordinator", endpoint)
    engine = bench.engine(store, *bench.shipped(), *flags)
    sidecar = bench.processes.sidecar(store, *flags, core=bench.processes.cores[0])
    Traffic(engine, traffic, bench.options.tokens).run(20)
    for number in range(bench.options.preemptions):
        wait("training", lambda: sidecar.status().get("training") is True, 120)
        time.sleep(0.3 + 0.1 * (number % 7))
        engine.generate(traffic[:1], 24)
    status = query_status(endpoint)
    stops = sorted([] if status is None else status.stop_ms)
    late = None if status is None else status.late
    bench.detail("preempt", {"stop_ms": stops, "late": late, "limit_ms": 500})
    bench.add(preempt_ms_p50=quantile(stops, 0.5), preempt_ms_p99=quantile(stops, 0.99))


def replicas(bench: Measurement) -> None:
    """Train on the core of the first of two engines to finish, while the other still decodes."""
    traffic, _ = bench.prompts()
    store = bench.store("replicas")
    endpoint = bench.coordinator()
    flags = ("--tlt-coordinator", endpoint, "--tlt-device-name")
    cores = bench.processes.cores
    engines = [
        bench.processes.engine(store, *bench.shipped(), *flags, f"core{core}", core=core)
        for core in cores
    ]
    for engine in engines:
        engine.wait_started()
    bench.processes.sidecar(store, *flags, f"core{cores[0]}", core=cores[0])
    for engine in engines:
        Traffic(engine, traffic, bench.options.tokens).run(10)
    # The first engine gets the short share, the second the long one.
    short = threading.Thread(target=engines[0].generate, args=(traffic[:AT_ONCE], 64))
    long = threading.Thread(target=engines[1].generate, args=(traffic[:AT_ONCE], 384))
    short.start()
    long.start()
    short.join()
    # From here on the second engine is in its tail: count how often the first core trains.
    looks = training = 0
    while long.is_alive():
        status = query_status(endpoint)
        looks += 1
        training += status is not None and status.states.get(f"core{cores[0]}") == "TRAINING"
        time.sleep(0.1)
    bench.detail("replicas", {"looks": looks, "trained": training})
    bench.add(replicas_overlap_fraction=training / max(1, looks))
