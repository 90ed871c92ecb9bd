"""One rollout step of reasoning RL: groups of samples with a long tail of lengths, all at once.

    python benchmarks/bench_longtail.py [--quick] [--natural] [--prompts FILE] [--json PATH]

There are N prompts and G samples of each (as GRPO has them), greedy, with output lengths drawn once
from a lognormal distribution and forced with `ignore_eos`, so that every system generates the same
tokens; with --natural the model ends each response. With --temperature 1, as in RL, each request
has a seed, and all systems but stock SGLang generate the same tokens on CPU; those results have
files of their own. All requests are
submitted at once, and fewer run than there are: the batch fills, then drains, and the last few
requests decide how long the step takes.
Systems take turns, each on a server of its own that has just started; each repetition has them all.

adaptive_vs_off               Time of ours without speculation over that of ours adaptive.
adaptive_vs_stock             Time of stock SGLang (torch_native on CPU, its default on CUDA) over
                              that of ours adaptive.
adaptive_vs_best_fixed        Time of the best of three fixed strategies over that of ours adaptive.
adaptive_vs_upstream_adaptive Time of SGLang's own --speculative-adaptive over that of ours
                              adaptive; on CPU, where SGLang does not speculate, its rule
                              (--tlt-policy ema) runs on our target.
tail_speedup                  Time with at most four unfinished requests: off over adaptive.
outputs_identical             1.0 if all systems generated the same tokens.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):  # started as a file, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import program, provenance
from benchmarks.harness.processes import stop
from benchmarks.harness.program import UsageError, say
from benchmarks.harness.prompts import PROMPTS, in_chat, load_prompts
from benchmarks.harness.server import Server, default_threads
from benchmarks.harness.workload import Request, Rollout, RolloutResult, length
from benchmarks.plots import longtail as plots

MODEL = "smollm2-135m"
OFF, STOCK, ADAPTIVE, UPSTREAM = "off", "stock", "adaptive", "upstream adaptive"
SIDECAR = "adaptive, sidecar"
FIXED = ("eagle3:1x1x2", "eagle3:3x1x4", "eagle3:3x4x8")
SYSTEMS = (OFF, STOCK, *FIXED, UPSTREAM, ADAPTIVE, SIDECAR)
UPSTREAM_POOL = "off,eagle3:1x1x2,eagle3:3x1x4,eagle3:5x1x6,eagle3:7x1x8"
"""Chains with SGLang's own candidates for the number of steps."""
UPSTREAM_FLAGS = (
    *("--speculative-algorithm", "EAGLE3", "--speculative-adaptive"),
    *("--speculative-num-steps", "3", "--speculative-eagle-topk", "1"),
    *("--speculative-num-draft-tokens", "4"),
)
STOCK_CPU_FLAGS = (
    *("--attention-backend", "torch_native", "--dtype", "float32"),
    *("--disable-cuda-graph", "--sleep-on-idle"),
)


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    prompts: list[str]
    json: Path
    quick: bool
    natural: bool
    temperature: float
    device: str
    model: str
    groups: int
    samples: int
    running: int
    median: int
    longest: int
    repetitions: int
    systems: tuple[str, ...]


def workload(options: Options, seed: int = 0) -> list[Request]:
    """Return the requests, group after group; the same for every system and repetition."""
    rng = random.Random(seed)
    return [
        Request(group % len(options.prompts), length(rng, options.median, 8, options.longest))
        for group in range(options.groups)
        for _ in range(options.samples)
    ]


def flags_of(system: str, options: Options, drafter: str, store: Path) -> list[str]:
    """Return the flags of a system's server, without its model and port."""
    cpu = options.device == "cpu"
    flags = ["--device", options.device, "--max-running-requests", str(options.running)]
    if cpu:
        flags += ["--max-total-tokens", "20000"]
    drafter_flags = ["--speculative-draft-model-path", drafter]
    # SGLang without us.
    if system == STOCK:
        return [*flags, *(STOCK_CPU_FLAGS if cpu else ())]
    if system == UPSTREAM and not cpu:
        return [*flags, *drafter_flags, *UPSTREAM_FLAGS]
    # Ours.
    flags += ["--adaptive-spec"]
    if system == UPSTREAM:
        # SGLang cannot speculate on a CPU without us: its rule, over the steps that it tries.
        return [*flags, *drafter_flags, "--tlt-policy", "ema", "--tlt-strategies", UPSTREAM_POOL]
    if system == OFF:
        return [*flags, "--tlt-strategies", "off"]
    if system in FIXED:
        return [*flags, *drafter_flags, "--tlt-strategies", system]
    if system == SIDECAR:
        flags += ["--tlt-store", str(store / "versions"), "--tlt-sidecar", "idle"]
    return [*flags, *drafter_flags]


def measure(options: Options, path: str, folder: Path, logs: Path) -> list[RolloutResult]:
    """Play the step on all systems, in every repetition; stores are made in `folder`."""
    from tlt_sglang.models.shipped import default_drafter

    drafter = default_drafter(options.model)
    if drafter is None:
        raise UsageError(f"There is no drafter for {options.model}; use {MODEL}.")
    requests, prompts = workload(options), in_chat(path, options.prompts)
    threads = default_threads()
    total = sum(request.tokens for request in requests)
    say(f"{len(requests)} requests, {total} tokens, {options.running} at once")
    runs: list[RolloutResult] = []
    for repetition in range(options.repetitions):
        for system in options.systems:
            flags = ["--model", path, *flags_of(system, options, str(drafter), folder)]
            server = Server(system.replace(" ", "_"), flags, threads, logs)
            try:
                server.wait_started()
                server.generate(prompts[:1], 16)
                ids = [prompt for prompt in prompts if not isinstance(prompt, str)]
                rollout = Rollout(server, requests, ids, options.natural, options.temperature)
                runs.append(rollout.play(system, repetition))
            finally:
                stop([server])
            last = runs[-1]
            say(
                f"{system}: {last.seconds:.1f} s, {last.tokens / last.seconds:.1f} tokens/s, tail "
                f"{last.tail_seconds:.1f} s, accept length {last.accept_length:.2f}"
            )
    return runs


def summarise(runs: Sequence[RolloutResult]) -> dict[str, float | None]:
    """Return the figures: medians over the repetitions of paired ratios."""
    return {
        "adaptive_vs_off": ratio_to_adaptive(runs, OFF),
        "adaptive_vs_stock": ratio_to_adaptive(runs, STOCK),
        "adaptive_vs_best_fixed": min(
            (ratio for name in FIXED if (ratio := ratio_to_adaptive(runs, name)) is not None),
            default=None,
        ),
        "adaptive_vs_upstream_adaptive": ratio_to_adaptive(runs, UPSTREAM),
        "tail_speedup": ratio_to_adaptive(runs, OFF, tail=True),
        "outputs_identical": float(len({run.output for run in runs}) == 1),
    }


def ratio_to_adaptive(
    runs: Sequence[RolloutResult], system: str, *, tail: bool = False
) -> float | None:
    """Return the median over the repetitions of `system`'s time over the adaptive one's."""
    times = {
        (run.system, run.repetition): run.tail_seconds if tail else run.seconds for run in runs
    }
    pairs = [
        times[system, repetition] / times[ADAPTIVE, repetition]
        for name, repetition in times
        if name == ADAPTIVE and (system, repetition) in times
    ]
    return round(statistics.median(pairs), 4) if pairs else None


def system_table(runs: Sequence[RolloutResult]) -> str:
    """Return a table of the systems: medians over the repetitions."""
    rows = []
    for system in dict.fromkeys(run.system for run in runs):
        own = [run for run in runs if run.system == system]
        ratio = ratio_to_adaptive(runs, system)
        rows.append(
            (
                system,
                f"{statistics.median(run.seconds for run in own):.1f}",
                f"{statistics.median(run.tokens / run.seconds for run in own):.1f}",
                f"{statistics.median(run.tail_seconds for run in own):.1f}",
                f"{statistics.median(run.accept_length for run in own):.2f}",
                "" if ratio is None else f"{ratio:.2f}",
            )
        )
    header = ("system", "seconds", "tokens/s", "tail s", "accept length", "time over adaptive")
    return program.table(header, rows)


def plot(runs: Sequence[RolloutResult], path: Path, requests: int) -> None:
    """Draw the first repetition of each system."""
    lines = [plots.Line(run.system, run.seconds, run.curve) for run in runs]
    plots.plot(lines, requests, path)


def _parser() -> program.Parser:
    parser = program.Parser("bench_longtail", __doc__, "One repetition of fewer, shorter requests")
    add = parser.add_argument
    add("--natural", action="store_true", help="Responses end where the model ends them")
    program.add_temperature(parser)
    add("--device", choices=["cpu", "cuda"], default="cpu", help="Device (default: cpu)")
    add("--model", default=MODEL, help=f"Model with a shipped drafter (default: {MODEL})")
    add("--groups", type=int, metavar="N", help="Prompts (default: 8, with --quick 4)")
    add("--samples", type=int, metavar="G", help="Samples of each prompt (default: 4)")
    add("--running", type=int, metavar="R", help="Requests that run at once (default: 8)")
    add(
        "--longest",
        type=int,
        metavar="T",
        help="Tokens of the longest response (default: 640, with --quick 400)",
    )
    add("--repetitions", type=int, metavar="N", help="Repetitions (default: 3, with --quick 1)")
    add("--system", action="append", help="System to measure; repeatable (default: all)")
    return parser


def parse(argv: Sequence[str]) -> Options:
    """Return the options; raise UsageError with one sentence for what is wrong."""
    args = _parser().parse_args(argv)
    json_path = args.json or provenance.result_path("bench_longtail", args.temperature)
    program.check_writable(json_path)
    for system in args.system or ():
        if system not in SYSTEMS:
            raise UsageError(f"There is no system {system!r}; choose from {SYSTEMS}.")
    program.check_sizes(args, "groups", "samples", "running", "longest", "repetitions")
    return Options(
        load_prompts(args.prompts) if args.prompts else list(PROMPTS),
        json_path,
        args.quick,
        args.natural,
        args.temperature,
        args.device,
        args.model,
        args.groups or (4 if args.quick else 8),
        args.samples or 4,
        args.running or 8,
        64 if args.quick else 128,
        args.longest or (400 if args.quick else 640),
        args.repetitions or (1 if args.quick else 3),
        tuple(args.system or SYSTEMS),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    return program.run("bench_longtail", lambda logs: _benchmark(parse(arguments), logs))


def _benchmark(options: Options, logs: Path) -> None:
    from tlt_sglang.models.named import resolve_model

    with tempfile.TemporaryDirectory(prefix="bench-longtail-") as work:
        runs = measure(options, resolve_model(options.model), Path(work), logs)
    summary = summarise(runs)
    if options.temperature > 0:  # then only ours on CPU say the same for a seed
        ours = [run for run in runs if run.system != STOCK]
        same = summarise(ours)["outputs_identical"]
        summary["outputs_identical"] = same if options.device == "cpu" else None
    print(system_table(runs))
    rows = [(name, "-" if value is None else f"{value:.3f}") for name, value in summary.items()]
    print(program.table(("figure", "value"), rows))
    requests = workload(options)
    document = provenance.document(
        "longtail",
        summary,
        settings={name: value for name, value in asdict(options).items() if name != "json"},
        workload=[asdict(request) for request in requests],
        runs=[asdict(run) for run in runs],
    )
    provenance.write_json(options.json, document)
    plot(runs, options.json.with_suffix(".png"), len(requests))
    say(f"written to {options.json}")


if __name__ == "__main__":
    sys.exit(main())
