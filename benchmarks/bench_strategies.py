"""Tokens per second of every strategy at every batch size, and of the adaptive engine beside them.

    python benchmarks/bench_strategies.py [--quick] [--prompts FILE] [--json PATH]

Two servers: one that decodes plainly and has no drafter, and an adaptive one, whose strategies are
pinned one after the other (POST /tlt/strategy) and which then chooses by itself. All of them answer
the same prompts greedily, and so with the same tokens, in turn: A B C ... A B C; every round has
other prompts. Time counts while the batch has its whole size, but for its first and last tokens
(see `Server.generate`). Then adaptive, the fastest of the fixed ones and plain decoding meet once
more, in rounds of their own: the fastest of many is so by luck, too, and that luck must not count.

adaptive_vs_best_fixed_min   Adaptive over the best single strategy (plain among them), the worst
                             batch size: medians over the rounds of that second part.
adaptive_vs_plain_min        Adaptive over plain decoding, the worst batch size, likewise.
switch_cost_fraction         Mean time that a switch of strategies takes, as a share of a plain
                             decode step of one request.
reactivation_accept_ratio    Accept length over the first 16 rounds after 200 steps of plain
                             decoding, over that of the same strategy all along.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):  # started as a file, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, server
from benchmarks.bench_drafter import in_chat
from benchmarks.common import Run, say
from benchmarks.fleet import PLAIN, Fleet

MODEL = "smollm2-135m"
ADAPTIVE = "adaptive"
POOL = ("off", "eagle3:1x1x2", "eagle3:3x1x4", "eagle3:3x4x8", "ngram:8")
BATCHES = (1, 2, 4, 8, 16)
ALL, DUEL = "batch", "duel"
"""Names of the two parts."""
REACTIVATED, OFF_TOKENS, ROUNDS = "eagle3:3x1x4", 200, 16
FEW = 4
"""Requests of which there are twice as many rounds."""
WARM_ROUNDS = 1
"""Rounds in which the adaptive engine learns what steps cost; they do not count."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    prompts: list[str]
    json: Path
    quick: bool

    def rounds(self, size: int) -> int:
        """In which all take part, of so many requests: a few say little."""
        return (1 if self.quick else 3) * (1 if size > FEW else 2)

    def duels(self, size: int) -> int:
        """In which three do."""
        return (5 if self.quick else 9) * (1 if size > FEW else 2)

    @property
    def batches(self) -> tuple[int, ...]:
        return (1, 4, 16) if self.quick else BATCHES

    @property
    def tokens(self) -> int:
        return 64 if self.quick else 96


def measure(fleet: Fleet, prompts: Sequence[server.Prompt], options: Options) -> list[Run]:
    """Every side at every batch size, round after round; the first rounds are to warm up."""
    sides = [PLAIN, *(f"pinned {name}" for name in POOL), ADAPTIVE]
    runs: list[Run] = []

    def play(part: str, size: int, number: int, side: str) -> None:
        process = fleet.only(PLAIN if side == PLAIN else ",".join(POOL))
        assert isinstance(process, server.Server)
        if side != PLAIN:
            strategy = None if side == ADAPTIVE else side.removeprefix("pinned ")
            process.post("/tlt/strategy", {"strategy": strategy})
        first = max(0, number) * size
        batch = [prompts[(first + i) % len(prompts)] for i in range(size)]
        sample = process.generate(batch, options.tokens, full_batch=True)
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
                    common.digest(sample.output_ids),
                )
            )

    for size in options.batches:
        for number in range(-WARM_ROUNDS, options.rounds(size)):
            for side in sides:
                play(ALL, size, number, side)
        best = best_fixed(runs, size)
        for number in range(options.duels(size)):
            for side in dict.fromkeys([PLAIN, best, ADAPTIVE]):
                play(DUEL, size, number, side)
        speeds = {side: _median(runs, f"{ALL} {size}", side) for side in sides}
        told = ", ".join(f"{side} {speed:.1f}" for side, speed in speeds.items())
        say(f"batch {size}: {told} tokens/s; " + _told(ratios(runs, [size])[size], best))
    return runs


def best_fixed(runs: Sequence[Run], size: int) -> str:
    """The fastest fixed side of the first part at this batch size."""
    part = f"{ALL} {size}"
    sides = sorted({run.side for run in runs if run.part == part} - {ADAPTIVE})
    return max(sides, key=lambda side: _median(runs, part, side))


def ratios(runs: Sequence[Run], sizes: Sequence[int]) -> dict[int, dict[str, float]]:
    """Of every batch size: adaptive over the best fixed side, and over plain decoding."""
    return {
        size: {
            "best": _over(runs, size, best_fixed(runs, size)),
            "plain": _over(runs, size, PLAIN),
        }
        for size in sizes
    }


def _told(ratio: dict[str, float], best: str) -> str:
    return f"adaptive is {ratio['plain']:.2f}x plain, {ratio['best']:.2f}x {best}"


def _median(runs: Sequence[Run], part: str, side: str) -> float:
    return statistics.median(r.tokens_per_s for r in runs if r.part == part and r.side == side)


def _over(runs: Sequence[Run], size: int, side: str) -> float:
    part = [run for run in runs if run.part == f"{DUEL} {size}"]
    pairs = common.paired(part, ADAPTIVE, side, lambda run: run.tokens_per_s)
    return common.spread(pairs).median


def measure_reactivation(process: server.Server, prompts: Sequence[server.Prompt]) -> list[float]:
    """Of each prompt: accept length of 16 rounds after 200 plain steps, over that at the same
    place of the same text when it was drafted for all along."""
    found = []
    for prompt in prompts:
        process.flush()
        whole = process.trace(prompt, OFF_TOKENS + 60, {0: REACTIVATED})
        steady = [step.tokens for step in whole if step.start >= OFF_TOKENS][:ROUNDS]
        process.flush()
        pins = {0: PLAIN, OFF_TOKENS: REACTIVATED}
        late = process.trace(prompt, OFF_TOKENS + 60, pins)
        # Steps that had begun before the strategy changed do not count.
        after = [step.tokens for step in late if step.pins][1 : ROUNDS + 1]
        found.append(statistics.fmean(after) / statistics.fmean(steady))
        say(f"reactivation: {found[-1]:.2f}")
    return found


def parse(argv: Sequence[str]) -> Options:
    """The options; raises UsageError with one sentence for what cannot be right."""
    parser = common.Parser("bench_strategies", __doc__, "fewer batch sizes, rounds and tokens")
    args = parser.parse_args(argv)
    json = args.json or common.RESULTS / "bench_strategies.json"
    common.check_writable(json)
    prompts = common.load_prompts(args.prompts) if args.prompts else list(common.INSTRUCTIONS)
    return Options(prompts, json, args.quick)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured, 1 a problem, 2 bad input, 130 interrupted."""
    words = sys.argv[1:] if argv is None else argv
    return common.run("bench_strategies", lambda logs: _benchmark(parse(words), logs))


def _benchmark(options: Options, logs: Path) -> None:
    from tlt_sglang.models.named import resolve_model

    path = resolve_model(MODEL)
    prompts = in_chat(path, options.prompts)
    threads = server.default_threads()
    fleet = Fleet(MODEL, path, "Hello", threads, logs)
    say(f"{threads} threads each; logs in {logs}")
    pool = ",".join(POOL)
    try:
        fleet.have(PLAIN, pool)
        runs = measure(fleet, prompts, options)
        adaptive = fleet.only(pool)
        assert isinstance(adaptive, server.Server)
        back = measure_reactivation(adaptive, prompts[: 2 if options.quick else 6])
        status = (adaptive.get("/tlt/status") or {})["schedulers"][0]
    finally:
        fleet.close()
    found = ratios(runs, options.batches)
    plain_step = statistics.median(
        run.seconds / run.steps for run in runs if run.part == f"{ALL} 1" and run.side == PLAIN
    )
    switch = status["switch_seconds"] / max(1, status["switches"]) / plain_step
    summary = {
        "adaptive_vs_best_fixed_min": round(min(one["best"] for one in found.values()), 4),
        "adaptive_vs_plain_min": round(min(one["plain"] for one in found.values()), 4),
        "switch_cost_fraction": round(switch, 5),
        "reactivation_accept_ratio": round(statistics.fmean(back), 4),
    }
    sides = list(dict.fromkeys(run.side for run in runs))
    rows = [
        (side, *(f"{_median(runs, f'{ALL} {size}', side):.1f}" for size in options.batches))
        for side in sides
    ]
    print(common.table(("tokens/s", *(f"batch {size}" for size in options.batches)), rows))
    print(common.table(("figure", "value"), [(k, f"{v:.3f}") for k, v in summary.items()]))
    settings = {
        "model": MODEL,
        "pool": list(POOL),
        "threads": threads,
        "rounds": {size: options.rounds(size) for size in options.batches},
        "duels": {size: options.duels(size) for size in options.batches},
        "tokens": options.tokens,
        "quick": options.quick,
        "prompts": options.prompts,
        "servers": fleet.commands,
    }
    document = common.document(
        "strategies",
        summary,
        settings=settings,
        ratios=found,
        reactivation=back,
        status=status,
        runs=[asdict(run) for run in runs],
    )
    common.write_json(options.json, document)
    say(f"written to {options.json}")


if __name__ == "__main__":
    sys.exit(main())
