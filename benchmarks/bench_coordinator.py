"""Time to preempt, load and memory of a coordinator with 10 to 10,000 engines, in virtual time.

    python benchmarks/bench_coordinator.py [--quick] [--json PATH] [--prompts FILE]

The coordinator's decisions and messages are the real ones, and each takes the time that it really
takes on this machine; the clients are the real ones, too. Engines, trainers and the network between
them are simulated: every engine has a trainer beside it, and its load follows the unfinished
requests of a rollout that `bench_longtail` recorded, stretched at random. One RL stack announces
every rollout to all devices at once. Messages are delayed (median 0.3 ms) and one in a thousand is
lost; clocks are wrong by up to an hour and by 200 ppm; each second one member in a thousand is
killed, and halfway through the coordinator is, which starts again without any knowledge.

preempt_p99_ms_N  From an engine's new work, or the announcement of a rollout, until its trainer has
                  confirmed that it stopped: 99th percentile with N engines. A trainer looks only
                  between two micro-batches of 20 to 150 ms. The result file counts those that fell
                  into the coordinator's absence apart.
busy_N            Share of one core that the coordinator takes with N engines.
rejoin_s_N        Seconds from its second start until it knows 99 % of the members again.
memory_mb_N       Memory of what it knows.
message_us_ratio  Time of a message with the most engines over that with the fewest: 1 if the cost
                  does not grow with their number.

`--prompts` is accepted, as by every benchmark, but has no effect: the simulation has no prompts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

if __package__ in (None, ""):  # started as a file, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fleet_simulation.coordinator import socket_seconds
from benchmarks.fleet_simulation.members import Curve
from benchmarks.fleet_simulation.simulation import Simulation, SimulationResult
from benchmarks.harness import program, provenance
from benchmarks.harness.program import say
from benchmarks.harness.prompts import load_prompts
from tlt_sglang.coordinator.world import Rules

SIZES = (10, 100, 1000, 10_000)
SECONDS = 40.0
SEED = 7


def recorded_curves() -> list[Curve]:
    """Return the unfinished requests over time of the rollouts that bench_longtail recorded."""
    document = json.loads((provenance.RESULTS / "bench_longtail_sampled.json").read_text())
    runs = [run for run in document["runs"] if run["system"] == "adaptive"]
    curves: list[Curve] = []
    for run in runs:
        points = [(at["seconds"], at["left"]) for at in run["curve"]]
        curves.append([(0.0, points[0][1]), *points, (run["seconds"], 0)])
    return curves


def table(results: Sequence[SimulationResult]) -> str:
    """Return the results as a table, one column a size."""
    rows = [
        (name, *(f"{asdict(each)[name]:,.4g}" for each in results))
        for name in asdict(results[0])
        if name != "engines"
    ]
    return program.table(("engines", *(f"{each.engines:,}" for each in results)), rows)


def summary(results: Sequence[SimulationResult]) -> dict[str, float]:
    """Return the figures of the result file."""
    figures = {}
    for each in results:
        figures[f"preempt_p99_ms_{each.engines}"] = round(each.preempt_p99_ms, 1)
        figures[f"busy_{each.engines}"] = round(each.busy, 4)
        figures[f"rejoin_s_{each.engines}"] = round(each.rejoin_seconds, 3)
        figures[f"memory_mb_{each.engines}"] = round(each.memory_mb, 2)
    figures["message_us_ratio"] = round(results[-1].message_us / results[0].message_us, 3)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    return program.run("bench_coordinator", lambda _logs: _benchmark(arguments))


def _benchmark(argv: Sequence[str]) -> None:
    parser = program.Parser("bench_coordinator", __doc__, "At most 1,000 engines, for 20 seconds")
    args = parser.parse_args(argv)
    if args.prompts:
        load_prompts(args.prompts)
    path = args.json or provenance.result_path("bench_coordinator")
    program.check_writable(path)
    sizes, seconds = (SIZES[:-1], 20.0) if args.quick else (SIZES, SECONDS)
    curves, rules, socket = recorded_curves(), Rules(), socket_seconds()
    results = []
    for engines in sizes:
        results.append(Simulation(engines, curves, rules, socket, SEED).run(seconds))
        say(f"{engines} engines: preempted in {results[-1].preempt_p99_ms:.0f} ms (p99)")
    print(table(results))
    settings = {
        "seconds": seconds,
        "seed": SEED,
        "quick": args.quick,
        "rules": asdict(rules),
        "socket_us": round(1e6 * socket, 2),
    }
    document = provenance.document(
        "coordinator",
        summary(results),
        settings=settings,
        results=[asdict(each) for each in results],
    )
    provenance.write_json(path, document)
    say(f"written to {path}")


if __name__ == "__main__":
    sys.exit(main())
