"""How fast the engine is on CPU: against transformers, against stock SGLang, and its own steps.

    python benchmarks/bench_engine.py [--quick] [--only NAME[,NAME]] [--prompts FILE]

Every figure but the last is a ratio of two sides measured in turn, A B A B, on the same prompts,
greedily, with the same number of threads and never both at once; the median is taken over all
pairs. The time is that of decoding: from the first token to the last, prompt processing excluded on
every side.

plain_b1_vs_transformers  Tokens per second of our engine without speculation (strategy `off`) over
                          those of transformers' `generate` in float32; one request at a time.
plain_b8_vs_torch_native  Tokens per second of our engine without speculation over those of stock
                          SGLang with its `torch_native` attention backend; eight requests at once.
verify4_vs_plain          Time of a step that verifies 4 tokens (strategy `ngram:4`) over that of a
verify8_vs_plain          plain step, at the same context; of 8 tokens likewise. At 1.0 verifying
                          costs nothing. The step includes the look-up of the draft in the n-gram
                          corpus, sampling and bookkeeping. The time is divided by the number of
                          verify steps that SGLang reports, so the accept length does not matter.
startup_s                 Seconds from spawning the launcher with `--adaptive-spec`, in its default
                          configuration and with warm caches, to the first token of a request.

The benchmark prints a table and writes the raw measurements with their origin as JSON; with
`--only` it writes no file unless `--json` names one.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

if __package__ in (None, ""):  # started as a file, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import program, provenance
from benchmarks.harness.fleet import BUSY, DEFAULT, PLAIN, STOCK, TRANSFORMERS, Fleet
from benchmarks.harness.program import UsageError, say, spread_table
from benchmarks.harness.prompts import PROMPTS, load_prompts
from benchmarks.harness.server import Server, default_threads
from benchmarks.harness.statistics import (
    Run,
    Spread,
    agreement,
    digest,
    interleave,
    paired,
    spread,
)

BATCH = 8


@dataclass(frozen=True)
class Ratio:
    """One figure: side `over` divided by side `under` of a part."""

    part: str
    over: str
    under: str
    value: Callable[[Run], float]


def _tokens_per_s(run: Run) -> float:
    return run.tokens_per_s


def _step_ms(run: Run) -> float:
    return run.step_ms


RATIOS = {
    "plain_b1_vs_transformers": Ratio("b1", PLAIN, TRANSFORMERS, _tokens_per_s),
    "plain_b8_vs_torch_native": Ratio("b8", PLAIN, STOCK, _tokens_per_s),
    "verify4_vs_plain": Ratio("verify", "ngram:4", PLAIN, _step_ms),
    "verify8_vs_plain": Ratio("verify", "ngram:8", PLAIN, _step_ms),
}
NAMES = (*RATIOS, "startup_s")


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    model: str
    path: str
    """The folder or hub id of the model."""
    prompts: list[str]
    only: tuple[str, ...]
    json: Path | None
    quick: bool
    repetitions: int
    starts: int
    tokens: int

    def wants(self, part: str) -> bool:
        """Return True if a figure that is to be measured belongs to `part`."""
        return any(RATIOS[name].part == part for name in self.only if name in RATIOS)


# -- the parts -------------------------------------------------------------------------------------


def measure(fleet: Fleet, options: Options, part: str, cases: Sequence[Sequence[str]]) -> list[Run]:
    """Return all runs of one part: every case on every side, in every repetition."""
    ratios = [RATIOS[name] for name in options.only if name in RATIOS]
    ratios = [ratio for ratio in ratios if ratio.part == part]
    sides = list(dict.fromkeys(side for ratio in ratios for side in (ratio.over, ratio.under)))
    sides.sort(key=lambda side: side != PLAIN)
    fleet.have(*sides)
    runs = []
    for number, index, case, side in interleave(options.repetitions, cases, sides):
        sample = fleet.only(side).generate(case, options.tokens)
        run = Run(
            part,
            side,
            number,
            index,
            sample.seconds,
            sample.tokens,
            sample.steps,
            sample.prompt_tokens,
            digest(sample.output_ids),
        )
        runs.append(run)
        say(
            f"{part} repetition {number + 1}/{options.repetitions} "
            f"case {index + 1}/{len(cases)} {side}: {run.tokens_per_s:.1f} tokens/s"
            + (f", {run.step_ms:.1f} ms a step" if part == "verify" else "")
        )
    return runs


def measure_startup(fleet: Fleet, options: Options, warm: bool) -> list[Run]:
    """Time starts of the default server with nothing else alive.

    Unless `warm`, one more start comes first and does not count.
    """
    fleet.have()
    runs = []
    for number in range(0 if warm else -1, options.starts):
        started = fleet.start(DEFAULT)
        assert isinstance(started, Server)
        seconds = started.wait_first_token(options.prompts[0])
        fleet.stop([DEFAULT])
        say(f"startup: {seconds:.1f} s" + (" (not counted)" if number < 0 else ""))
        if number >= 0:
            runs.append(Run("startup", DEFAULT, number, 0, seconds, tokens=1, steps=1))
    return runs


def batches(prompts: Sequence[str], size: int) -> list[list[str]]:
    """Return all prompts in batches of `size`, the last filled up from the start again."""
    endless = itertools.cycle(prompts)
    count = -(-len(prompts) // size)
    return [list(itertools.islice(endless, size)) for _ in range(count)]


def run_all(fleet: Fleet, options: Options, runs: list[Run]) -> None:
    """Add the runs of every part that is to be measured to `runs`."""
    single = [[prompt] for prompt in options.prompts]
    together = batches(options.prompts, BATCH)
    if options.quick:
        single, together = single[:3], together[:1]
    for part, cases in (("b1", single), ("b8", together), ("verify", single)):
        if options.wants(part):
            runs += measure(fleet, options, part, cases)
    if "startup_s" in options.only:
        runs += measure_startup(fleet, options, warm=options.quick and options.wants("verify"))


# -- results ---------------------------------------------------------------------------------------


def ratios_of(runs: Sequence[Run]) -> dict[str, Spread]:
    """Return the spread of every figure that was measured, by name."""
    spreads = {}
    for name, ratio in RATIOS.items():
        of_part = [run for run in runs if run.part == ratio.part]
        values = paired(of_part, ratio.over, ratio.under, ratio.value)
        if values:
            spreads[name] = spread(values)
    starts = [run.seconds for run in runs if run.part == "startup"]
    if starts:
        spreads["startup_s"] = spread(starts)
    return spreads


def summary_of(ratios: dict[str, Spread]) -> dict[str, float | None]:
    """Return the median of every figure, None for one that was not measured."""
    return {name: round(ratios[name].median, 4) if name in ratios else None for name in NAMES}


def results(runs: Sequence[Run], settings: dict[str, object]) -> dict[str, object]:
    """Return the content of the result file."""
    ratios = ratios_of(runs)
    same = {
        name: round(
            agreement([r for r in runs if r.part == ratio.part], ratio.over, ratio.under), 4
        )
        for name, ratio in RATIOS.items()
        if name in ratios
    }
    return provenance.document(
        "engine",
        summary_of(ratios),
        settings=settings,
        ratios={name: ratio.as_json() for name, ratio in ratios.items()},
        sides=[
            {
                "part": part,
                "side": side,
                "tokens_per_s": spread([r.tokens_per_s for r in of_side]).as_json(),
                "step_ms": spread([r.step_ms for r in of_side]).as_json(),
            }
            for (part, side), of_side in by_side(runs).items()
            if part != "startup"
        ],
        same_output=same,
        runs=[asdict(run) for run in runs],
    )


def by_side(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    """Return the runs of each (part, side)."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.part, run.side), []).append(run)
    return groups


def tables(runs: Sequence[Run]) -> str:
    """Return the tables to print: the sides in their own units, then the figures."""
    sides = [
        (
            f"{part} {side}",
            f"{spread([r.tokens_per_s for r in of_side]).median:.1f}",
            f"{spread([r.step_ms for r in of_side]).median:.1f}" if part != "b8" else "",
            f"{sum(r.tokens for r in of_side) / sum(r.steps for r in of_side):.2f}"
            if part == "verify"
            else "",
            str(len(of_side)),
        )
        for (part, side), of_side in by_side(runs).items()
        if part != "startup"
    ]
    parts = [spread_table(ratios_of(runs))]
    if sides:
        header = ("side", "tokens/s", "ms/step", "tokens/step", "count")
        parts.insert(0, program.table(header, sides))
    return "\n\n".join(parts)


# -- the command line ------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> Options:
    """Return the options; raise UsageError or ConfigError with one sentence for what is wrong."""
    parser = program.Parser(
        "bench_engine", __doc__, "Fewer repetitions, prompts and tokens: about five minutes"
    )
    add = parser.add_argument
    add("--only", default=",".join(NAMES), metavar="NAME[,NAME]", help="Figures (default: all)")
    add("--repetitions", type=int, metavar="N", help="Repetitions (default: 3, with --quick 2)")
    add(
        "--tokens",
        type=int,
        metavar="N",
        help="Tokens of an answer (default: 128, with --quick 40)",
    )
    add("--model", default="smollm2-135m", help="Folder, hub id or alias (default: smollm2-135m)")
    args = parser.parse_args(argv)
    only = tuple(dict.fromkeys(name.strip() for name in args.only.split(",") if name.strip()))
    for name in only:
        if name not in NAMES:
            raise UsageError(f"--only {name} is not a figure; choose from {', '.join(NAMES)}.")
    if not only:
        raise UsageError(f"--only names nothing; choose from {', '.join(NAMES)}.")
    quick = args.quick
    repetitions = _default(args.repetitions, 2 if quick else 3)
    tokens = _default(args.tokens, 40 if quick else 128)
    if repetitions < 1:
        raise UsageError(f"--repetitions {repetitions} is too few; give 1 or more.")
    if tokens < 2:
        raise UsageError(f"--tokens {tokens} is too few; give 2 or more.")
    json = args.json
    if json is None and set(only) == set(NAMES):
        json = provenance.RESULTS / "bench_engine.json"
    prompts = load_prompts(args.prompts) if args.prompts else list(PROMPTS)
    if json is not None:
        program.check_writable(json)
    starts = 1 if quick else 3
    path = _model(args.model)
    return Options(args.model, path, prompts, only, json, quick, repetitions, starts, tokens)


def _default(flag: int | None, default: int) -> int:
    return default if flag is None else flag


def _model(name: str) -> str:
    from tlt_sglang.models.drafter_checkpoint import read_config
    from tlt_sglang.models.named import resolve_model

    path = resolve_model(name)
    if read_config(path, "model") is None:
        return path
    return str(Path(path).expanduser().absolute())


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    return program.run("bench_engine", lambda logs: _benchmark(parse(arguments), logs))


def _benchmark(options: Options, logs: Path) -> None:
    busy = psutil.cpu_percent(interval=2.0) / 100 * (psutil.cpu_count() or 1)
    if busy > BUSY:
        say(f"other processes use {busy:.1f} cores of this machine; the figures will be noisy")
    threads = default_threads()
    fleet = Fleet(options.model, options.path, options.prompts[0], threads, logs)
    say(f"{fleet.threads} threads each; logs in {logs}")
    runs: list[Run] = []
    try:
        run_all(fleet, options, runs)
    finally:
        fleet.close()
        if runs:
            print(tables(runs), flush=True)
    settings: dict[str, object] = {
        "model": options.model,
        "threads": fleet.threads,
        "repetitions": options.repetitions,
        "tokens": options.tokens,
        "quick": options.quick,
        "prompts": options.prompts,
        "servers": fleet.commands,
        "idle_cores": fleet.idle,
        "busy_cores_before": round(busy, 2),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }
    if options.json is not None:
        provenance.write_json(options.json, results(runs, settings))
        say(f"written to {options.json}")


if __name__ == "__main__":
    sys.exit(main())
