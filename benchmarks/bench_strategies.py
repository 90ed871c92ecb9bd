"""Throughput of every strategy at every batch size, and of the adaptive engine beside them.

    python benchmarks/bench_strategies.py [--quick] [--temperature T] [--prompts FILE] [--json PATH]

There are two servers: one that decodes plainly and has no drafter, and an adaptive one, whose
strategies are pinned one after another (POST /tlt/strategy) and which then chooses by itself. All
of them answer the same prompts greedily, and so with the same tokens, in turn: A B C ... A B C;
every repetition has other prompts. With --temperature 1, as in RL, each request has a seed, and on
CPU the tokens are the same again; those results have files of their own.

Time counts while the batch has its whole size, except for its first and last tokens (see
`Server.generate`). Then adaptive, the fastest of the fixed ones and plain decoding are measured
once more, in repetitions of their own: the fastest of many is so partly by luck, and that luck must
not count.

adaptive_vs_best_fixed_min   Throughput of adaptive over that of the best single strategy (plain
                             among them) at the worst batch size: medians over the second part.
adaptive_vs_plain_min        Throughput of adaptive over that of plain decoding at the worst batch
                             size, likewise.
switch_cost_fraction         Mean time that a switch of strategies takes, as a share of a plain
                             decode step of one request.
reactivation_accept_ratio    Accept length over the first 16 verify steps after 200 steps of plain
                             decoding, over that of the same strategy without the break.
outputs_identical            1.0 if all sides generated the same tokens in every repetition.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):  # started as a file, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import program, provenance
from benchmarks.harness.fleet import PLAIN, Fleet
from benchmarks.harness.program import say
from benchmarks.harness.prompts import INSTRUCTIONS, Prompt, in_chat, load_prompts
from benchmarks.harness.server import SchedulerStatus, Server, default_threads
from benchmarks.harness.statistics import Run, digest, paired, spread
from benchmarks.plots import strategies as plots

MODEL = "smollm2-135m"
ADAPTIVE = "adaptive"
POOL = ("off", "eagle3:1x1x2", "eagle3:3x1x4", "eagle3:3x4x8", "ngram:8")
BATCHES = (1, 2, 4, 8, 16)
ALL, DUEL = "batch", "duel"
"""Names of the two parts."""
REACTIVATED, OFF_TOKENS, VERIFY_STEPS = "eagle3:3x1x4", 200, 16
FEW = 4
"""Batch size up to which there are twice as many repetitions."""
WARM_REPETITIONS = 1
"""Repetitions in which the adaptive engine learns what steps cost; they do not count."""


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    prompts: list[str]
    json: Path
    quick: bool
    temperature: float = 0.0

    def repetitions(self, size: int) -> int:
        """Return the repetitions with all sides at a batch size; small batches need more."""
        return (1 if self.quick else 3) * (1 if size > FEW else 2)

    def duels(self, size: int) -> int:
        """Return the repetitions with three sides at a batch size."""
        return (5 if self.quick else 9) * (1 if size > FEW else 2)

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes."""
        return (1, 4, 16) if self.quick else BATCHES

    @property
    def tokens(self) -> int:
        """Tokens of an answer."""
        return 64 if self.quick else 96


def measure(fleet: Fleet, prompts: Sequence[Prompt], options: Options) -> list[Run]:
    """Measure every side at every batch size; the first repetition of each warms up."""
    sides = [PLAIN, *(f"pinned {name}" for name in POOL), ADAPTIVE]
    runs: list[Run] = []

    def play(part: str, size: int, number: int, side: str) -> None:
        """Run one side on one batch; a repetition below 0 does not count."""
        server = fleet.server(PLAIN if side == PLAIN else ",".join(POOL))
        if side != PLAIN:
            server.pin(None if side == ADAPTIVE else side.removeprefix("pinned "))
        first = max(0, number) * size
        batch = [prompts[(first + i) % len(prompts)] for i in range(size)]
        sample = server.generate(
            batch, options.tokens, full_batch=True, temperature=options.temperature
        )
        if number >= 0:
            runs.append(
                Run(
                    f"{part} {size}",
                    side,
                    number,
                    0,
                    sample.seconds,
                    sample.tokens,
                    sample.steps,
                    sample.prompt_tokens,
                    digest(sample.output_ids),
                )
            )

    for size in options.batches:
        # All sides in turn, then the three that the figures compare.
        for number in range(-WARM_REPETITIONS, options.repetitions(size)):
            for side in sides:
                play(ALL, size, number, side)
        best = best_fixed(runs, size)
        for number in range(options.duels(size)):
            for side in dict.fromkeys([PLAIN, best, ADAPTIVE]):
                play(DUEL, size, number, side)
        speeds = {side: _median(runs, f"{ALL} {size}", side) for side in sides}
        each = ", ".join(f"{side} {speed:.1f}" for side, speed in speeds.items())
        ratio = ratios(runs, [size])[size]
        say(
            f"batch {size}: {each} tokens/s; adaptive is {ratio['plain']:.2f}x plain, "
            f"{ratio['best']:.2f}x {best}"
        )
    return runs


def best_fixed(runs: Sequence[Run], size: int) -> str:
    """Return the fastest fixed side of the first part at this batch size."""
    part = f"{ALL} {size}"
    sides = sorted({run.side for run in runs if run.part == part} - {ADAPTIVE})
    return max(sides, key=lambda side: _median(runs, part, side))


def ratios(runs: Sequence[Run], sizes: Sequence[int]) -> dict[int, dict[str, float]]:
    """Return, per batch size, adaptive over the best fixed side and over plain decoding."""
    return {
        size: {
            "best": _over(runs, size, best_fixed(runs, size)),
            "plain": _over(runs, size, PLAIN),
        }
        for size in sizes
    }


def switch_cost(runs: Sequence[Run], status: SchedulerStatus) -> float:
    """Return the mean time of a switch as a share of a plain step of one request."""
    plain_step = statistics.median(
        run.seconds / run.steps for run in runs if run.part == f"{ALL} 1" and run.side == PLAIN
    )
    return status["switch_seconds"] / max(1, status["switches"]) / plain_step


def outputs_identical(runs: Sequence[Run]) -> float:
    """Return 1.0 if in every repetition all sides have the same output, else 0.0."""
    outputs: dict[tuple[str, int], set[object]] = {}
    for run in runs:
        outputs.setdefault((run.part, run.repetition), set()).add(run.output)
    return float(all(len(each) == 1 for each in outputs.values()))


def throughput_table(runs: Sequence[Run], sizes: Sequence[int]) -> str:
    """Return a table of the median throughput of every side at every batch size."""
    rows = [
        (side, *(f"{_median(runs, f'{ALL} {size}', side):.1f}" for size in sizes))
        for side in dict.fromkeys(run.side for run in runs)
    ]
    return program.table(("tokens/s", *(f"batch {size}" for size in sizes)), rows)


def speeds(runs: Sequence[Run], sizes: Sequence[int]) -> dict[tuple[str, int], list[float]]:
    """Return the tokens a second of every side and batch size in the first part."""
    sides = dict.fromkeys(run.side for run in runs)
    return {
        (side, size): [
            run.tokens_per_s for run in runs if (run.part, run.side) == (f"{ALL} {size}", side)
        ]
        for side in sides
        for size in sizes
    }


def _median(runs: Sequence[Run], part: str, side: str) -> float:
    return statistics.median(r.tokens_per_s for r in runs if r.part == part and r.side == side)


def _over(runs: Sequence[Run], size: int, side: str) -> float:
    part = [run for run in runs if run.part == f"{DUEL} {size}"]
    pairs = paired(part, ADAPTIVE, side, lambda run: run.tokens_per_s)
    return spread(pairs).median


def measure_reactivation(
    server: Server, prompts: Sequence[Prompt], temperature: float
) -> list[float]:
    """Return a ratio of accept lengths for each prompt.

    Above is that of 16 verify steps after 200 plain steps, below that of the same part of the same
    text when the strategy was in use from the start.
    """
    ratios = []
    for prompt in prompts:
        server.flush()
        whole = server.trace(prompt, OFF_TOKENS + 60, {0: REACTIVATED}, temperature)
        steady = [step.tokens for step in whole if step.start >= OFF_TOKENS][:VERIFY_STEPS]
        server.flush()
        pins = {0: PLAIN, OFF_TOKENS: REACTIVATED}
        late = server.trace(prompt, OFF_TOKENS + 60, pins, temperature)
        # Steps that had begun before the strategy changed do not count.
        after = [step.tokens for step in late if step.pins][1 : VERIFY_STEPS + 1]
        ratios.append(statistics.fmean(after) / statistics.fmean(steady))
        say(f"reactivation: {ratios[-1]:.2f}")
    return ratios


def parse(argv: Sequence[str]) -> Options:
    """Return the options; raise UsageError with one sentence for what is wrong."""
    parser = program.Parser(
        "bench_strategies", __doc__, "Fewer batch sizes, repetitions and tokens"
    )
    program.add_temperature(parser)
    args = parser.parse_args(argv)
    json = args.json or provenance.result_path("bench_strategies", args.temperature)
    program.check_writable(json)
    prompts = load_prompts(args.prompts) if args.prompts else list(INSTRUCTIONS)
    return Options(prompts, json, args.quick, args.temperature)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    return program.run("bench_strategies", lambda logs: _benchmark(parse(arguments), logs))


def _benchmark(options: Options, logs: Path) -> None:
    from tlt_sglang.models.named import resolve_model

    path = resolve_model(MODEL)
    prompts = in_chat(path, options.prompts)
    threads = default_threads()
    fleet = Fleet(MODEL, path, "Hello", threads, logs)
    say(f"{threads} threads each; logs in {logs}")
    pool = ",".join(POOL)
    try:
        fleet.have(PLAIN, pool)
        runs = measure(fleet, prompts, options)
        adaptive = fleet.server(pool)
        resumed = prompts[: 2 if options.quick else 6]
        reactivation = measure_reactivation(adaptive, resumed, options.temperature)
        status = adaptive.scheduler()
        assert status is not None
    finally:
        fleet.close()
    of_sizes = ratios(runs, options.batches)
    summary = {
        "adaptive_vs_best_fixed_min": round(min(one["best"] for one in of_sizes.values()), 4),
        "adaptive_vs_plain_min": round(min(one["plain"] for one in of_sizes.values()), 4),
        "switch_cost_fraction": round(switch_cost(runs, status), 5),
        "reactivation_accept_ratio": round(statistics.fmean(reactivation), 4),
        "outputs_identical": outputs_identical(runs),
    }
    print(throughput_table(runs, options.batches))
    print(program.table(("figure", "value"), [(k, f"{v:.3f}") for k, v in summary.items()]))
    settings = {
        "model": MODEL,
        "pool": list(POOL),
        "threads": threads,
        "repetitions": {size: options.repetitions(size) for size in options.batches},
        "duels": {size: options.duels(size) for size in options.batches},
        "tokens": options.tokens,
        "temperature": options.temperature,
        "quick": options.quick,
        "prompts": options.prompts,
        "servers": fleet.commands,
    }
    document = provenance.document(
        "strategies",
        summary,
        settings=settings,
        ratios=of_sizes,
        reactivation=reactivation,
        status=status,
        runs=[asdict(run) for run in runs],
    )
    provenance.write_json(options.json, document)
    ratios_to_plain = plots.over_plain(speeds(runs, options.batches))
    plots.plot(ratios_to_plain, options.json.with_suffix(".png"))
    say(f"written to {options.json}")


if __name__ == "__main__":
    sys.exit(main())
