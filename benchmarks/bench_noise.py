"""Share of a decode step that the noise of coupled sampling takes on CPU.

    python benchmarks/bench_noise.py [--quick] [--prompts FILE] [--json PATH]

A server that decodes plainly answers prompts at temperature 1, 1, 8 and 16 at a time, which gives
the time of a step and the tokens. Then, with the server gone, the kernel that chooses each token
from its logits and noise (`tlt_sglang.cpu.kernels.noise.sample`) runs by itself on as many rows of
the logits that the model has for these very answers, on as many threads.

noise_share_N     Time of the kernel over that of a plain decode step, both with N rows and at
                  temperature 1: medians.
filtered_share_N  The same with a top-p of 0.95, for which a row is softmaxed and sorted in part.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # started as a file, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import program, provenance
from benchmarks.harness.fleet import PLAIN, Fleet
from benchmarks.harness.program import say
from benchmarks.harness.prompts import INSTRUCTIONS, Prompt, in_chat, load_prompts
from benchmarks.harness.server import default_threads

if TYPE_CHECKING:
    import torch

MODEL = "smollm2-135m"
ROWS = (1, 8, 16)
TOP_P = 0.95
TOKENS = 64

Answers = list[tuple[list[int], list[int]]]
"""Prompt and output of each."""


def steps(
    fleet: Fleet, prompts: Sequence[Prompt], repetitions: int
) -> tuple[dict[int, float], Answers]:
    """Return the seconds of a step with each number of rows, and the answers to 16 prompts."""
    seconds: dict[int, list[float]] = {rows: [] for rows in ROWS}
    answers: Answers = []
    server = fleet.server(PLAIN)
    for number in range(-1, repetitions):  # the first one warms up
        for rows in ROWS:
            batch = [prompts[(number * rows + i) % len(prompts)] for i in range(rows)]
            sample = server.generate(batch, TOKENS, full_batch=True, temperature=1.0)
            if number >= 0:
                seconds[rows].append(sample.seconds / (sample.tokens / rows))
            texts = [prompt for prompt in batch if not isinstance(prompt, str)]
            answers = list(zip(texts, sample.output_ids, strict=True))
    return {rows: statistics.median(each) for rows, each in seconds.items()}, answers


def logits_of(path: str, answers: Answers) -> torch.Tensor:
    """Return the model's logits [T, answers, V] at every token of the answers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    each = []
    with torch.inference_mode():
        for prompt, output in answers:
            whole = torch.tensor([[*prompt, *output]])
            each.append(model(whole).logits[0, len(prompt) - 1 : -1])
    return torch.stack(each, dim=1)


def kernel_seconds(logits: torch.Tensor, rows: int, top_p: float) -> float:
    """Return the median time in which the kernel chooses `rows` tokens, over all positions."""
    import torch

    from tlt_sglang.cpu.kernels import noise

    top_ps = torch.full((rows,), top_p) if top_p < 1 else None
    ones, seeds = torch.ones(rows), torch.arange(rows)
    times = []
    for position, step in enumerate(logits):
        chosen = step[:rows].contiguous()
        positions = torch.full((rows,), position)
        times.append(_timed(lambda: noise.sample(chosen, ones, seeds, positions, None, top_ps)))  # noqa: B023
    return statistics.median(times)


def _timed(call: Callable[[], object]) -> float:
    """Return the seconds of the second of two calls: in a step the logits are fresh, too."""
    call()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    return program.run("bench_noise", lambda logs: _benchmark(arguments, logs))


def _benchmark(argv: Sequence[str], logs: Path) -> None:
    from tlt_sglang.models.named import resolve_model

    parser = program.Parser("bench_noise", __doc__, "Fewer repetitions")
    args = parser.parse_args(argv)
    json = args.json or provenance.result_path("bench_noise")
    program.check_writable(json)
    path, threads = resolve_model(MODEL), default_threads()
    prompts = in_chat(path, load_prompts(args.prompts) if args.prompts else list(INSTRUCTIONS))
    fleet = Fleet(MODEL, path, "Hello", threads, logs)
    try:
        fleet.have(PLAIN)
        step_seconds, answers = steps(fleet, prompts, 3 if args.quick else 9)
    finally:
        fleet.close()
    say("the server is gone; the kernel by itself")
    logits = logits_of(path, answers)
    kernel = {
        name: {rows: kernel_seconds(logits, rows, top_p) for rows in ROWS}
        for name, top_p in (("noise", 1.0), ("filtered", TOP_P))
    }
    summary = {
        f"{name}_share_{rows}": round(seconds / step_seconds[rows], 5)
        for name, by_rows in kernel.items()
        for rows, seconds in by_rows.items()
    }
    print(program.table(("figure", "value"), [(k, f"{v:.2%}") for k, v in summary.items()]))
    settings = {"model": MODEL, "threads": threads, "tokens": TOKENS, "quick": args.quick}
    document = provenance.document(
        "noise",
        summary,
        settings=settings | {"servers": fleet.commands},
        step_ms={rows: round(1000 * seconds, 3) for rows, seconds in step_seconds.items()},
        kernel_ms={
            name: {rows: round(1000 * seconds, 4) for rows, seconds in by_rows.items()}
            for name, by_rows in kernel.items()
        },
    )
    provenance.write_json(json, document)
    say(f"written to {json}")


if __name__ == "__main__":
    sys.exit(main())
