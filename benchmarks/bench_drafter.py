"""What the default drafter is worth in the engine: accept length, and speed beside plain decoding.

    python benchmarks/bench_drafter.py [--quick] [--prompts FILE] [--json PATH]

Accept length: tokens committed by a verify step, over all steps of all answers, each of which ends
where the model ends it. Chain of three drafts, one request at a time.

accept_len_greedy       Ordinary instructions at temperature 0.
accept_len_t1           The same at temperature 1, a fixed seed for each answer.
accept_len_reasoning    Problems of reasoning-gym at temperature 0, from seeds that training never
                        uses.

Speed: tokens per second of decoding with the drafter over those without, greedily, on the same
prompts and so the same tokens, in turn, A B A B; the median over all pairs.

speedup_b1              Ordinary instructions, one at a time.
speedup_b1_reasoning    Problems, one at a time.
speedup_b4              Ordinary instructions, four at once.

With `--prompts` these are the ordinary instructions, a line each. Every prompt is asked in the
model's chat template.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, server
from benchmarks.common import Run, Spread, say
from benchmarks.fleet import PLAIN, Fleet

MODEL = "smollm2-135m"
EVALUATION_SEED = 20
"""Of reasoning-gym; training uses those from a million on."""
LONGEST_PROBLEM = 700
"""Characters; longer ones take most of their time before the first token."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    instructions: list[str]
    problems: list[str]
    json: Path | None
    quick: bool
    strategy: str
    rounds: int
    tokens: int


@dataclass(frozen=True)
class Accepted:
    """The verify steps of one answer."""

    part: str
    case: int
    steps: int
    tokens: int

    @staticmethod
    def length(answers: Sequence[Accepted]) -> float:
        """Tokens a step, over all of them; 1.0 where nothing was verified."""
        steps = sum(answer.steps for answer in answers)
        return sum(answer.tokens for answer in answers) / steps if steps else 1.0


def measure_accept(
    process: server.Server, prompts: dict[str, tuple[list[server.Prompt], float]], tokens: int
) -> list[Accepted]:
    """The answers to every prompt of every part, at the temperature of the part."""
    found = []
    for part, (asked, temperature) in prompts.items():
        for case, prompt in enumerate(asked):
            info = process.answer(prompt, tokens, temperature, seed=1000 + case)["meta_info"]
            # The first token is the prefill's.
            steps = info["spec_verify_ct"]
            found.append(Accepted(part, case, steps, info["completion_tokens"] - 1))
        of_part = [answer for answer in found if answer.part == part]
        say(f"{part}: {Accepted.length(of_part):.3f} over {len(of_part)} answers")
    return found


def measure_speed(
    fleet: Fleet, part: str, cases: Sequence[list[server.Prompt]], options: Options
) -> list[Run]:
    """Every case on both sides, in turn."""
    runs = []
    sides = [PLAIN, options.strategy]
    for number, index, case, side in common.interleave(options.rounds, cases, sides):
        process = fleet.only(side)
        assert isinstance(process, server.Server)
        sample = process.generate(case, options.tokens)
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
                common.digest(sample.output_ids),
            )
        )
        if side != PLAIN:
            ratio = common.paired(runs[-2:], side, PLAIN, lambda run: run.tokens_per_s)
            say(
                f"{part} round {number + 1}/{options.rounds} case {index + 1}/{len(cases)}: "
                f"{ratio[0]:.2f}x, {sample.tokens / sample.steps:.2f} tokens a step"
            )
    return runs


def problems(count: int) -> list[str]:
    """Problems of reasoning-gym, one of each task as far as they go."""
    from tlt_sglang.training.prompts import reasoning

    asked = (text for text in reasoning(4 * count, EVALUATION_SEED))
    return list(itertools.islice((t for t in asked if len(t) <= LONGEST_PROBLEM), count))


def in_chat(path: str, texts: Sequence[str]) -> list[server.Prompt]:
    """Token ids of each text as a user's message."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    found: list[server.Prompt] = []
    for text in texts:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        found.append(list(tokenizer.encode(chat, add_special_tokens=False)))
    return found


def results(
    answers: Sequence[Accepted], runs: Sequence[Run], options: Options, settings: dict[str, Any]
) -> dict[str, Any]:
    """The document to write."""
    speedups = speedups_of(runs, options.strategy)
    parts = sorted({answer.part for answer in answers})
    lengths = {p: Accepted.length([a for a in answers if a.part == p]) for p in parts}
    summary: dict[str, float | None] = {name: round(v, 4) for name, v in lengths.items()}
    summary |= {name: round(spread.median, 4) for name, spread in speedups.items()}
    return common.document(
        "drafter",
        summary,
        settings=settings,
        speedups={name: spread.as_json() for name, spread in speedups.items()},
        same_output={
            part: common.agreement([r for r in runs if r.part == part], PLAIN, options.strategy)
            for part in sorted({run.part for run in runs})
        },
        answers=[asdict(answer) for answer in answers],
        runs=[asdict(run) for run in runs],
    )


def speedups_of(runs: Sequence[Run], strategy: str) -> dict[str, Spread]:
    """The spread of every part's ratio, by name."""
    return {
        part: common.spread(
            common.paired(
                [r for r in runs if r.part == part], strategy, PLAIN, lambda run: run.tokens_per_s
            )
        )
        for part in dict.fromkeys(run.part for run in runs)
    }


def parse(argv: Sequence[str]) -> Options:
    """The options; raises UsageError with one sentence for what cannot be right."""
    parser = common.Parser("bench_drafter", __doc__, "fewer prompts, rounds and tokens")
    add = parser.add_argument
    add("--strategy", default="eagle3:3x1x4", help="default: eagle3:3x1x4")
    args = parser.parse_args(argv)
    json = args.json or common.RESULTS / "bench_drafter.json"
    common.check_writable(json)
    given = common.load_prompts(args.prompts) if args.prompts else list(common.INSTRUCTIONS)
    quick = args.quick
    return Options(
        instructions=given if args.prompts or not quick else given[:12],
        problems=problems(12 if quick else 40),
        json=json,
        quick=quick,
        strategy=args.strategy,
        rounds=2 if quick else 5,
        tokens=64 if quick else 128,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured, 1 a problem, 2 bad input, 130 interrupted."""
    words = sys.argv[1:] if argv is None else argv
    return common.run("bench_drafter", lambda logs: _benchmark(parse(words), logs))


def _benchmark(options: Options, logs: Path) -> None:
    from tlt_sglang.models.named import resolve_model

    path = resolve_model(MODEL)
    instructions, asked = in_chat(path, options.instructions), in_chat(path, options.problems)
    threads = server.default_threads()
    fleet = Fleet(MODEL, path, "Hello", threads, logs)
    say(f"{threads} threads each; logs in {logs}")
    answers: list[Accepted] = []
    runs: list[Run] = []
    try:
        fleet.have(PLAIN, options.strategy)
        process = fleet.only(options.strategy)
        assert isinstance(process, server.Server)
        parts = {
            "accept_len_greedy": (instructions, 0.0),
            "accept_len_t1": (instructions, 1.0),
            "accept_len_reasoning": (asked, 0.0),
        }
        answers = measure_accept(process, parts, 2 * options.tokens)
        few = 4 if options.quick else 8
        cases = {
            "speedup_b1": [[prompt] for prompt in instructions[:few]],
            "speedup_b1_reasoning": [[prompt] for prompt in asked[:few]],
            "speedup_b4": [instructions[at : at + 4] for at in range(0, few, 4)],
        }
        for part, of_part in cases.items():
            runs += measure_speed(fleet, part, of_part, options)
    finally:
        fleet.close()
    figures = [
        (p, f"{s.median:.3f}", f"{s.min:.3f}", f"{s.max:.3f}", str(s.count))
        for p, s in speedups_of(runs, options.strategy).items()
    ]
    print(common.table(("figure", "median", "min", "max", "count"), figures))
    settings = {
        "model": MODEL,
        "strategy": options.strategy,
        "threads": threads,
        "rounds": options.rounds,
        "tokens": options.tokens,
        "quick": options.quick,
        "instructions": options.instructions,
        "problems": options.problems,
        "servers": fleet.commands,
    }
    assert options.json is not None
    common.write_json(options.json, results(answers, runs, options, settings))
    say(f"written to {options.json}")


if __name__ == "__main__":
    sys.exit(main())
