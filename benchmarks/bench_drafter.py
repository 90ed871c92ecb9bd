"""Accept length of the default drafter in the engine, and its speed beside plain decoding.

    python benchmarks/bench_drafter.py [--quick] [--prompts FILE] [--json PATH]

The accept length is the number of tokens that a verify step commits, over all steps of all answers,
each of which ends where the model ends it: a chain of three drafts, one request at a time.

accept_len_greedy       Ordinary instructions at temperature 0.
accept_len_t1           Ordinary instructions at temperature 1, a fixed seed for each answer; and
accept_len_t1_chain3    again, with the strategies eagle3:3x1x4, 3x4x8 and 3x4x16: on CPU all four
accept_len_t1_tree8     have the same text.
accept_len_t1_tree16
accept_len_reasoning    Problems of reasoning-gym at temperature 0, from seeds that training never
                        uses.

The speedup is the throughput of decoding with the drafter over that without, on the same prompts
and seeds and so with the same tokens, in turn, A B A B; the median over all pairs.

speedup_b1              Ordinary instructions, one at a time.
speedup_b1_reasoning    Problems, one at a time.
speedup_b4              Ordinary instructions, four at once.
speedup_b1_t1           Ordinary instructions at temperature 1, one at a time; the policy chooses
                        among the strategies above and off.
speedup_b8_t1           Eight at once.

With `--prompts` the file holds the ordinary instructions, one a line. Every prompt is put into the
model's chat template.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):  # started as a file, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import program, provenance
from benchmarks.harness.fleet import PLAIN, Fleet
from benchmarks.harness.program import say, spread_table
from benchmarks.harness.prompts import INSTRUCTIONS, Prompt, in_chat, load_prompts
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

MODEL = "smollm2-135m"
SAMPLED = {
    "accept_len_t1_chain3": "eagle3:3x1x4",
    "accept_len_t1_tree8": "eagle3:3x4x8",
    "accept_len_t1_tree16": "eagle3:3x4x16",
}
"""Strategies that are measured at temperature 1."""
POOL = ",".join(("off", "eagle3:1x1x2", *SAMPLED.values()))
EVALUATION_SEED = 20
"""Seed of reasoning-gym; training uses those from a million on."""
LONGEST_PROBLEM = 700
"""Characters of a problem; longer ones take most of their time before the first token."""


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    instructions: list[str]
    problems: list[str]
    json: Path | None
    quick: bool
    strategy: str
    repetitions: int
    tokens: int


@dataclass(frozen=True)
class AnswerCounts:
    """The verify steps of one answer."""

    part: str
    case: int
    steps: int
    tokens: int

    @staticmethod
    def length(answers: Sequence[AnswerCounts]) -> float:
        """Return the tokens per step over all answers, 1.0 if nothing was verified."""
        steps = sum(answer.steps for answer in answers)
        return sum(answer.tokens for answer in answers) / steps if steps else 1.0


def measure_accept(
    server: Server, parts: dict[str, tuple[list[Prompt], float]], tokens: int
) -> list[AnswerCounts]:
    """Return the answers to every prompt of every part, at the temperature of the part."""
    answers = []
    for part, (prompts, temperature) in parts.items():
        for case, prompt in enumerate(prompts):
            info = server.answer(prompt, tokens, temperature, seed=1000 + case)["meta_info"]
            # The first token is the prefill's.
            steps = info["spec_verify_ct"]
            answers.append(AnswerCounts(part, case, steps, info["completion_tokens"] - 1))
        of_part = [answer for answer in answers if answer.part == part]
        say(f"{part}: {AnswerCounts.length(of_part):.3f} over {len(of_part)} answers")
    return answers


def measure_accept_sampled(
    server: Server, prompts: list[Prompt], tokens: int
) -> list[AnswerCounts]:
    """Return the answers at temperature 1 with each strategy of the pool that is measured."""
    answers = []
    for part, strategy in SAMPLED.items():
        server.pin(strategy)
        answers += measure_accept(server, {part: (prompts, 1.0)}, tokens)
    server.pin(None)
    return answers


def measure_speed(
    fleet: Fleet, part: str, cases: Sequence[list[Prompt]], options: Options
) -> list[Run]:
    """Measure every case on both sides, in turn."""
    runs = []
    sampled = part.endswith("_t1")
    sides = [PLAIN, POOL if sampled else options.strategy]
    for number, index, case, side in interleave(options.repetitions, cases, sides):
        server = fleet.server(side)
        sample = server.generate(case, options.tokens, temperature=float(sampled))
        runs.append(
            Run(
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
        )
        if side != PLAIN:
            ratio = paired(runs[-2:], side, PLAIN, lambda run: run.tokens_per_s)
            say(
                f"{part} repetition {number + 1}/{options.repetitions} "
                f"case {index + 1}/{len(cases)}: {ratio[0]:.2f}x, "
                f"{sample.tokens / sample.steps:.2f} tokens a step"
            )
    return runs


def problems(count: int) -> list[str]:
    """Return problems of reasoning-gym, one of each task before a second of any."""
    from tlt_sglang.training.prompts import reasoning

    short = (t for t in reasoning(4 * count, EVALUATION_SEED) if len(t) <= LONGEST_PROBLEM)
    return list(itertools.islice(short, count))


def results(
    answers: Sequence[AnswerCounts],
    runs: Sequence[Run],
    options: Options,
    settings: dict[str, object],
) -> dict[str, object]:
    """Return the content of the result file."""
    speedups = speedups_of(runs)
    parts = sorted({answer.part for answer in answers})
    lengths = {p: AnswerCounts.length([a for a in answers if a.part == p]) for p in parts}
    summary: dict[str, float | None] = {name: round(v, 4) for name, v in lengths.items()}
    summary |= {name: round(spread.median, 4) for name, spread in speedups.items()}
    return provenance.document(
        "drafter",
        summary,
        settings=settings,
        speedups={name: spread.as_json() for name, spread in speedups.items()},
        same_output={
            part: agreement(of_part, PLAIN, other_side(of_part))
            for part in sorted({run.part for run in runs})
            for of_part in [[run for run in runs if run.part == part]]
        },
        answers=[asdict(answer) for answer in answers],
        runs=[asdict(run) for run in runs],
    )


def speedups_of(runs: Sequence[Run]) -> dict[str, Spread]:
    """Return the spread of every part's ratio, by name."""
    spreads = {}
    for part in dict.fromkeys(run.part for run in runs):
        of_part = [run for run in runs if run.part == part]
        ratios = paired(of_part, other_side(of_part), PLAIN, lambda run: run.tokens_per_s)
        spreads[part] = spread(ratios)
    return spreads


def other_side(runs: Sequence[Run]) -> str:
    """Return the side of a part that is compared with plain decoding."""
    return next(run.side for run in runs if run.side != PLAIN)


def parse(argv: Sequence[str]) -> Options:
    """Return the options; raise UsageError with one sentence for what is wrong."""
    parser = program.Parser("bench_drafter", __doc__, "Fewer prompts, repetitions and tokens")
    add = parser.add_argument
    add("--strategy", default="eagle3:3x1x4", help="Strategy (default: eagle3:3x1x4)")
    args = parser.parse_args(argv)
    json = args.json or provenance.RESULTS / "bench_drafter.json"
    program.check_writable(json)
    instructions = load_prompts(args.prompts) if args.prompts else list(INSTRUCTIONS)
    quick = args.quick
    return Options(
        instructions=instructions if args.prompts or not quick else instructions[:12],
        problems=problems(12 if quick else 40),
        json=json,
        quick=quick,
        strategy=args.strategy,
        repetitions=2 if quick else 5,
        tokens=64 if quick else 128,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    return program.run("bench_drafter", lambda logs: _benchmark(parse(arguments), logs))


def _benchmark(options: Options, logs: Path) -> None:
    from tlt_sglang.models.named import resolve_model

    path = resolve_model(MODEL)
    instructions, reasoning = in_chat(path, options.instructions), in_chat(path, options.problems)
    threads = default_threads()
    fleet = Fleet(MODEL, path, "Hello", threads, logs)
    say(f"{threads} threads each; logs in {logs}")
    runs: list[Run] = []
    try:
        fleet.have(PLAIN, options.strategy)
        parts = {
            "accept_len_greedy": (instructions, 0.0),
            "accept_len_t1": (instructions, 1.0),
            "accept_len_reasoning": (reasoning, 0.0),
        }
        answers = measure_accept(fleet.server(options.strategy), parts, 2 * options.tokens)
        fleet.have(PLAIN, options.strategy, POOL)
        answers += measure_accept_sampled(fleet.server(POOL), instructions, 2 * options.tokens)
        few = 4 if options.quick else 8
        cases = {
            "speedup_b1": [[prompt] for prompt in instructions[:few]],
            "speedup_b1_reasoning": [[prompt] for prompt in reasoning[:few]],
            "speedup_b4": [instructions[at : at + 4] for at in range(0, few, 4)],
            "speedup_b1_t1": [[prompt] for prompt in instructions[:few]],
            "speedup_b8_t1": [instructions[at : at + 8] for at in range(0, few, 8)],
        }
        for part, of_part in cases.items():
            runs += measure_speed(fleet, part, of_part, options)
    finally:
        fleet.close()
    print(spread_table(speedups_of(runs)))
    settings: dict[str, object] = {
        "model": MODEL,
        "strategy": options.strategy,
        "threads": threads,
        "repetitions": options.repetitions,
        "tokens": options.tokens,
        "quick": options.quick,
        "instructions": options.instructions,
        "problems": options.problems,
        "servers": fleet.commands,
    }
    assert options.json is not None
    provenance.write_json(options.json, results(answers, runs, options, settings))
    say(f"written to {options.json}")


if __name__ == "__main__":
    sys.exit(main())
