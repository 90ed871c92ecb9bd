"""A whole RL run in AReaL's trainer, plain and with drafts: the same weights at the end, sooner.

    python benchmarks/bench_rl_run.py [--quick] [--folder DIR] [--seed N] [--json PATH]

The policy is the small model, fine-tuned on worked solutions (benchmarks/rl_run/fine_tune.py), with
a drafter for it (benchmarks/rl_run/drafter.py), and the trainer AReaL's FSDPPPOActor with its own
client: GRPO in groups of 8 at temperature 1, with a seed for every response. The systems run one
after another, each with a policy of its own and two servers of a core each, which share the
responses, on the same problems with the same seeds.
Interrupted, it goes on where it was when it is started with the same --folder.

plain              Ours without drafts.
adaptive           That drafter and n-grams, chosen at every step; the drafter is frozen.
adaptive, sidecar  The same, and the drafter is trained on a server's core when that has finished
                   its share of a rollout. With --faults an engine, the sidecar and the coordinator
                   are killed with SIGKILL, each at a random step.

rollouts_identical       1 if every step of all systems had the very same tokens.
weights_identical        1 if all systems end with the very same weights.
run_speedup              Time of all steps: plain over the last system.
rollout_speedup          Time of all rollouts: plain over the last system.
run_speedup_frozen       The same, of the system whose drafter is frozen.
rollout_speedup_frozen
rollout_share_plain      Share of rollouts in the time of the plain system.
tail_speedup             Time of all tails (an eighth of the responses unfinished, or fewer): plain
                         over the last system.
tail_share_plain         Share of the tails in the rollouts of the plain system.
accept_len_frozen_first  Accept length of the frozen drafter in the first quarter of steps, with the
                         strategies of all its steps (benchmarks/rl_run/acceptance.py).
accept_len_frozen_last   The same, in the last quarter of steps.
accept_len_adapted_last  That of the trained drafter, in the last quarter of steps, as if it had
                         been in those strategies.
accept_len_held_out_...  Of a full run: accept length on problems of the same families that were
                         in no training, with the policy at the end and one strategy: of the drafter
                         `shipped` with this package, of the one that the run began with (`frozen`),
                         of that one trained `offline` for as long as the sidecar has trained, and
                         of the one that the sidecar has made of it (`adapted`).
logprob_gap              Largest difference of the servers' logprobs from the trainer's, in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if __package__ in (None, ""):  # started as a file, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import program, provenance
from benchmarks.harness.program import UsageError, say
from benchmarks.harness.server import default_threads
from benchmarks.plots import rl_run as plots
from benchmarks.rl_run.acceptance import Yardstick
from benchmarks.rl_run.faults import LEAST_STEPS, faults
from benchmarks.rl_run.settings import Settings, Step
from benchmarks.rl_run.systems import ADAPTIVE, PLAIN, SIDECAR, SYSTEMS, System

UPDATES = ("disk", "xccl")


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    json: Path
    folder: Path
    systems: tuple[str, ...]
    faults: bool
    by_product: bool
    """Measure the drafter at the end."""
    settings: Settings
    """Without the policy, which is made first."""


def summarise(
    steps: Mapping[str, Sequence[Step]], weights: Mapping[str, str | None]
) -> dict[str, float | None]:
    """Return the figures of systems that have taken all their steps; None for what is missing."""
    last = SIDECAR if SIDECAR in steps else ADAPTIVE

    def total(system: str, seconds: Callable[[Step], float]) -> float:
        return sum(seconds(step) for step in steps[system])

    def ratio(seconds: Callable[[Step], float], system: str) -> float | None:
        if PLAIN not in steps or system not in steps:
            return None
        return round(total(PLAIN, seconds) / total(system, seconds), 4)

    yardstick = yardstick_of(steps)

    def accepted(system: str, part: slice) -> float | None:
        length = yardstick.accept_length(steps.get(system, ())[part])
        return None if length is None else round(length, 4)

    def share(part: Callable[[Step], float], whole: Callable[[Step], float]) -> float | None:
        return round(total(PLAIN, part) / total(PLAIN, whole), 4) if PLAIN in steps else None

    quarter = max(1, max(map(len, steps.values())) // 4)
    first, end = slice(quarter), slice(-quarter, None)
    tokens = {tuple(step.rollout for step in own) for own in steps.values()}
    return {
        "rollouts_identical": float(len(tokens) == 1),
        "weights_identical": float(len(set(weights.values())) == 1),
        "run_speedup": ratio(_whole, last),
        "rollout_speedup": ratio(_rollout, last),
        "run_speedup_frozen": ratio(_whole, ADAPTIVE),
        "rollout_speedup_frozen": ratio(_rollout, ADAPTIVE),
        "rollout_share_plain": share(_rollout, _whole),
        "tail_speedup": ratio(_tail, last),
        "tail_share_plain": share(_tail, _rollout),
        "accept_len_frozen_first": accepted(ADAPTIVE, first),
        "accept_len_frozen_last": accepted(ADAPTIVE, end),
        "accept_len_adapted_last": accepted(SIDECAR, end),
        "logprob_gap": round(max(step.gap for own in steps.values() for step in own), 7),
    }


def yardstick_of(steps: Mapping[str, Sequence[Step]]) -> Yardstick:
    """Return the frozen drafter's, or that of the trained one where there is no other."""
    return Yardstick(steps.get(ADAPTIVE) or steps.get(SIDECAR, ()))


def _rollout(step: Step) -> float:
    return step.rollout_seconds


def _tail(step: Step) -> float:
    return step.tail_seconds


def _whole(step: Step) -> float:
    return step.rollout_seconds + step.train_seconds + step.update_seconds


def parse(argv: Sequence[str]) -> Options:
    """Return the options; raise UsageError with one sentence for what is wrong."""
    parser = program.Parser("bench_rl_run", __doc__, "4 steps of 16 responses, not 40 of 64")
    add = parser.add_argument
    add("--folder", type=Path, metavar="DIR", help="Folder of the run (default: build/rl_run)")
    add("--seed", type=int, default=0, metavar="N", help="Seed of problems and responses")
    add("--steps", type=int, metavar="N", help="Steps (default: 40, with --quick 4)")
    add("--problems", type=int, metavar="N", help="Problems of a step (default: 8, with --quick 2)")
    add("--group", type=int, metavar="G", help="Responses to each problem (default: 8)")
    add(
        "--longest",
        type=int,
        metavar="T",
        help="Tokens of the longest response (2048, with --quick 1024)",
    )
    add("--threads", type=int, metavar="N", help="Threads of server and trainer (default: torch's)")
    add("--replicas", type=int, metavar="N", help="Servers that share the responses (default: 2)")
    add("--update", choices=UPDATES, default="disk", help="How weights reach the server")
    add("--shipped", action="store_true", help="Begin with the shipped drafter, not the policy's")
    add("--faults", action="store_true", help="Kill engine, sidecar and coordinator, once each")
    add("--system", action="append", choices=SYSTEMS, help="System to run (default: all)")
    args = parser.parse_args(argv)
    if args.prompts is not None:
        raise UsageError(
            "--prompts has no meaning here: rewards need problems with known answers; leave it out."
        )
    json = args.json or provenance.RESULTS / "bench_rl_run.json"
    program.check_writable(json)
    program.check_sizes(args, "steps", "problems", "group", "longest", "threads", "replicas")
    steps = args.steps or (4 if args.quick else 40)
    if args.faults and steps < LEAST_STEPS:
        raise UsageError(f"--faults needs {LEAST_STEPS} steps or more; give --steps a number.")
    settings = Settings(
        policy="",
        seed=args.seed,
        steps=steps,
        problems=args.problems or (2 if args.quick else 8),
        group=args.group or 8,
        longest=args.longest or (1024 if args.quick else 2048),
        threads=args.threads or 0,
        replicas=args.replicas or 2,
        update=args.update,
        shipped=args.shipped,
        checkpoint_every=max(1, steps // 8),
    )
    folder = args.folder or provenance.REPOSITORY / "build" / "rl_run"
    systems = tuple(args.system or SYSTEMS)
    by_product = SIDECAR in systems and not (args.quick or args.faults or args.shipped)
    return Options(json, folder, systems, args.faults, by_product, settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    return program.run("bench_rl_run", lambda logs: _benchmark(parse(arguments), logs))


def _benchmark(options: Options, logs: Path) -> None:
    from benchmarks.rl_run.by_product import accept_lengths
    from benchmarks.rl_run.drafter import DrafterRecipe, drafter_of, shipped_drafter
    from benchmarks.rl_run.fine_tune import Recipe, fine_tuned

    policy = fine_tuned(Recipe())
    assert policy is not None  # it has no time limit
    recipe = DrafterRecipe()
    drafter = shipped_drafter() if options.settings.shipped else drafter_of(policy, recipe)
    threads = options.settings.threads or default_threads()
    settings = replace(options.settings, policy=str(policy), threads=threads)
    systems = [
        System(name, options.folder / name.replace(", ", "-"), settings, drafter, logs)
        for name in options.systems
    ]
    for system in systems:
        kills = options.faults and system.name == SIDECAR
        system.run(faults(settings.seed, settings.steps) if kills else ())
    steps = {system.name: system.steps for system in systems}
    weights = {system.name: system.weights for system in systems}
    summary = summarise(steps, weights)
    if options.by_product:
        (trained,) = (system for system in systems if system.name == SIDECAR)
        summary |= accept_lengths(trained.policy, drafter, trained.store, threads, logs)
    document = provenance.document(
        "rl_run",
        summary,
        settings=asdict(settings),
        drafter=None if settings.shipped else asdict(recipe),
        weights=weights,
        complaints={system.name: system.complaints for system in systems},
        steps=[{"system": name, **asdict(step)} for name, own in steps.items() for step in own],
    )
    provenance.write_json(options.json, document)
    plots.plot(steps, yardstick_of(steps).each(steps), options.json.with_suffix(".png"))
    figures = [(name, "-" if value is None else f"{value:.3f}") for name, value in summary.items()]
    print(program.table(("figure", "value"), figures))
    say(f"written to {options.json}")


if __name__ == "__main__":
    sys.exit(main())
