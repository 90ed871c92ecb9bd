"""The adaptive drafter on a real engine: what it gains, what it costs, how fast it gives way.

    python benchmarks/bench_adaptive_drafter.py [--quick] [--prompts FILE] [--json PATH] [--part P]

The engine has one core and the sidecar another. The traffic consists of prompts sampled at
temperature 1, four at a time. Accept lengths are those of a chain of three drafts, greedy, on
prompts that the traffic never has.

grow      Start with n-grams only, until a drafter that the sidecar trained is swapped in.
domain    Start with the shipped drafter, on prompts of one kind.
drift     Fine-tune the target on another style and update it; measure the frozen drafter, then the
          adapted one.
cost      Log and do not, train and do not, in turn; swap versions under load.
preempt   Train while the engine is idle, and give way when requests arrive.
replicas  Run two engines; train on the core of the first that finishes while the other decodes its
          tail.

ngram_accept_len           Accept length of n-grams on the held-out prompts of `grow`.
grown_accept_len           Accept length of the drafter that was trained, on the same prompts.
domain_accept_ratio        Accept length of the drafter after `domain` over that of the shipped one.
drift_recovered_fraction   Share of the accept length lost by the target's update that came back.
harvest_cost_fraction      Share of throughput lost to the log: 1 - with / without, median of pairs.
training_cost_fraction     Share of throughput lost to a sidecar that trains on the other core.
idle_sidecar_cores         CPU time a second of a sidecar that has nothing to train on.
swap_steps_p50, _p99       Time of a swap in decode steps of four requests.
preempt_ms_p50, _p99       Time from the command to stop until the sidecar reports that it has.
replicas_overlap_fraction  Share of one engine's tail in which the other's core trained.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.adaptive_drafter import costs, learning, sharing
from benchmarks.adaptive_drafter.measurement import HELD_OUT, MODEL, Measurement, Options
from benchmarks.harness import program, provenance
from benchmarks.harness.program import UsageError, say
from benchmarks.harness.prompts import load_prompts
from benchmarks.plots import adaptive_drafter as plots

PARTS: dict[str, Callable[[Measurement], None]] = {
    "grow": learning.grow,
    "domain": learning.domain,
    "drift": learning.drift,
    "cost": costs.cost,
    "preempt": sharing.preempt,
    "replicas": sharing.replicas,
}


def run_part(measurement: Measurement, part: str) -> None:
    """Run one part; whatever it started has ended afterwards."""
    say(f"{part}: begins")
    try:
        PARTS[part](measurement)
    finally:
        measurement.processes.stop()
    say(", ".join(f"{name} {value}" for name, value in measurement.results.summary.items()))


def parse(argv: Sequence[str]) -> Options:
    """Return the options; raise UsageError with one sentence for what is wrong."""
    parser = program.Parser(
        "bench_adaptive_drafter", __doc__, "Three minutes of traffic in each part, not eight"
    )
    parser.add_argument(
        "--part", action="append", choices=PARTS, help="Part to run; repeatable (default: all)"
    )
    args = parser.parse_args(argv)
    json = args.json or provenance.RESULTS / "bench_adaptive_drafter.json"
    program.check_writable(json)
    prompts = load_prompts(args.prompts) if args.prompts else None
    if prompts is not None and len(prompts) <= HELD_OUT:
        raise UsageError(
            f"{len(prompts)} prompts are too few, since {HELD_OUT} are held out; "
            f"give more than {HELD_OUT}."
        )
    return Options(prompts, json, args.quick, tuple(args.part or PARTS))


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    return program.run("bench_adaptive_drafter", lambda logs: _benchmark(parse(arguments), logs))


def _benchmark(options: Options, logs: Path) -> None:
    from tlt_sglang.models.named import resolve_model

    with tempfile.TemporaryDirectory(prefix="bench-adaptive-") as work:
        measurement = Measurement(options, resolve_model(MODEL), Path(work), logs)
        for part in options.parts:
            run_part(measurement, part)
            _write(options, measurement)  # the results are kept if a later part fails
    rows = [(name, f"{value:.3f}") for name, value in measurement.results.summary.items()]
    print(program.table(("figure", "value"), rows))
    say(f"written to {options.json}")


def _write(options: Options, measurement: Measurement) -> None:
    results = measurement.results
    settings = {
        "model": MODEL,
        "minutes": options.minutes,
        "tokens": options.tokens,
        "quick": options.quick,
        "parts": list(options.parts),
        "cores": measurement.processes.cores,
        "commands": measurement.processes.commands,
    }
    document = provenance.document(
        "adaptive_drafter",
        results.summary,
        settings=settings,
        details=results.details,
        curves=results.curves,
    )
    provenance.write_json(options.json, document)
    plots.plot(results.curves, results.details, options.json.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
