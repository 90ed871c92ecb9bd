"""Throughput that each policy loses against an oracle, in a simulated engine.

    python benchmarks/bench_policy.py [--quick] [--json PATH] [--prompts FILE]

The simulation has no engine: step costs follow a model of a machine (see `MACHINES`), acceptance
per depth drifts and jumps as it does when target and drafter are updated, and batches drain from
full to one request, repeatedly. Of the requests of a batch none, half or all are sampled at a
temperature; fewer of their drafts are accepted than of greedy requests. A policy observes the same
as in an engine: which requests are sampled, their accepted drafts, and a noisy time. The oracle
knows the true costs and the true acceptance of every step, and chooses the strategy with the
highest expected throughput.

regret_NAME     Mean share of the oracle's throughput that the policy loses, over all steps after
                the first 200 of each run: median over machines and seeds. `fixed` is the single
                strategy that does best in hindsight, chosen for each run by the oracle itself.

`--prompts` is accepted, as by every benchmark, but has no effect: the simulation has no prompts.
"""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # started as a file, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import program, provenance
from benchmarks.harness.program import say, spread_table
from benchmarks.harness.prompts import load_prompts
from benchmarks.harness.statistics import spread
from tlt_sglang.strategy.beg_mab import BegMab
from tlt_sglang.strategy.cost_model import CostModel
from tlt_sglang.strategy.ema import Ema
from tlt_sglang.strategy.policy import Fixed, Observation, Policy
from tlt_sglang.strategy.strategies import Strategy, parse

POOL = tuple(
    parse(text)
    for text in (
        "off",
        "eagle3:1x1x2",
        "eagle3:3x1x4",
        "eagle3:5x1x6",
        "eagle3:7x1x8",
        "eagle3:3x4x8",
        "eagle3:5x4x16",
        "ngram:8",
    )
)
SETTLED = 200
"""Steps after which regret counts."""
SWITCH = 0.01
"""Cost of a change of strategy, as a share of a step."""
SAMPLED_LEVEL = -0.9
"""How much lower the logit of acceptance is for sampled requests: 0.44 where greedy ones have 0.65.
"""


@dataclass(frozen=True)
class Machine:
    """Costs of a step, in milliseconds."""

    weights: float
    """The least cost of a step: the target's weights are read once."""
    row: float
    """Cost of each token of the batch that the target computes, once that exceeds `weights`."""
    draft: float
    """Cost of one draft step."""
    overhead: float
    """Further cost of a verify step."""
    most: int
    """The largest number of requests that run at once."""

    def cost(self, strategy: Strategy, batch_size: int) -> float:
        """Return the milliseconds of a step with this many requests."""
        rows = batch_size * strategy.num_draft_tokens
        # Memory-bound and compute-bound meet softly.
        target = math.hypot(self.weights, self.row * rows)
        if strategy.drafter == "off":
            return target
        if strategy.drafter == "ngram":
            return target + self.overhead / 2
        nodes = strategy.topk * (strategy.num_steps - 1) + strategy.num_draft_tokens
        tokens = self.row / 12 * batch_size * nodes
        return target + self.draft * (strategy.num_steps + 1) + tokens + self.overhead


MACHINES = {
    # An 8B target in bfloat16: 16 GB at 3 TB/s, 16 GFLOP a token at 500 TFLOP/s.
    "gpu": Machine(weights=6.0, row=0.034, draft=0.45, overhead=0.5, most=128),
    # The default model on two cores: 0.54 GB at 18 GB/s; 0.27 GFLOP a token at 140 GFLOP/s.
    "cpu": Machine(weights=31.0, row=2.0, draft=2.5, overhead=3.0, most=16),
}


class World:
    """Acceptance and batch sizes over the steps of one run."""

    def __init__(self, machine: Machine, seed: int, steps: int) -> None:
        self.machine = machine
        rng = random.Random(seed)
        self.sizes: list[int] = []
        self.levels: list[tuple[float, float]] = []
        self.sampled: list[list[bool]] = []
        eagle, ngram = rng.uniform(-0.2, 1.2), rng.uniform(-1.5, 0.5)
        while len(self.sizes) < steps:
            # One rollout: the batch is full, then drains with a long tail.
            length = rng.randint(250, 500)
            finish = sorted(rng.lognormvariate(0, 0.7) for _ in range(machine.most))
            scale = length / finish[-1]
            share = rng.choice((0.0, 0.5, 1.0))
            kinds = [rng.random() < share for _ in finish]
            eagle += rng.gauss(0, 0.5)  # the target was updated, or the drafter
            ngram += rng.gauss(0, 0.5)
            for step in range(length):
                eagle += rng.gauss(0.01 * (0.5 - eagle), 0.03)
                ngram += rng.gauss(0.01 * (-0.5 - ngram), 0.03)
                running = [
                    kind for kind, end in zip(kinds, finish, strict=True) if end * scale > step
                ]
                self.sampled.append(running or kinds[-1:])
                self.sizes.append(len(self.sampled[-1]))
                self.levels.append((eagle, ngram))

    def probs(self, strategy: Strategy, step: int, sampled: bool) -> list[float]:
        """Return the probability of acceptance at each depth once the depth before is accepted."""
        eagle, ngram = (level + SAMPLED_LEVEL * sampled for level in self.levels[step])
        if strategy.drafter == "off":
            return []
        if strategy.drafter == "ngram":
            # The first draft is seldom accepted; those after an accepted one often are.
            deeper = [_logistic(ngram + 1.5)] * (strategy.num_draft_tokens - 2)
            return [_logistic(ngram), *deeper]
        probs = []
        for depth in range(strategy.num_steps):
            prob = _logistic(eagle - 0.12 * depth)
            if strategy.topk > 1:
                branches = 1 + 0.55 * math.log2(strategy.topk)
                full = 1 - (1 - prob) ** branches
                # A tree with few nodes is thin at its deeper levels.
                share = min(1.0, strategy.num_draft_tokens / (strategy.topk * (depth + 1)))
                prob += (full - prob) * share
            probs.append(prob)
        return probs

    def rate(self, strategy: Strategy, step: int) -> float:
        """Return the expected tokens a millisecond."""
        total = 0.0
        for sampled, count in Counter(self.sampled[step]).items():
            reach = 1.0
            total += count
            for prob in self.probs(strategy, step, sampled):
                reach *= prob
                total += count * reach
        return total / self.machine.cost(strategy, self.sizes[step])


def regret_of(policy: Policy, world: World, seed: int, best: Sequence[float]) -> float:
    """Return the mean share of the oracle's rates that `policy` loses, after it has settled."""
    rng = random.Random(seed)
    before: Strategy | None = None
    losses = []
    for step, size in enumerate(world.sizes):
        kinds = world.sampled[step]
        strategy = policy.choose(size, sampled=kinds)
        probs = [world.probs(strategy, step, sampled) for sampled in (False, True)]
        accepted = [_accepted(probs[sampled], rng) for sampled in kinds]
        switch = 1 + SWITCH * (before not in (None, strategy))
        cost = world.machine.cost(strategy, size) * switch
        noise = rng.lognormvariate(0, 0.04) * (3 if rng.random() < 0.01 else 1)
        seconds = cost * noise / 1000
        policy.observe(Observation(strategy, size, accepted, seconds, sampled=kinds))
        if step >= SETTLED:
            rate = world.rate(strategy, step) / switch
            losses.append(1 - rate / best[step])
        before = strategy
    return sum(losses) / len(losses)


def _accepted(probs: Sequence[float], rng: random.Random) -> int:
    """Draw the number of accepted drafts of one request."""
    for depth, prob in enumerate(probs):
        if rng.random() >= prob:
            return depth
    return len(probs)


def _logistic(x: float) -> float:
    return 0.95 / (1 + math.exp(-x))


def measure(seeds: int, steps: int) -> list[dict[str, object]]:
    """Return the regret of every policy in every world."""
    runs: list[dict[str, object]] = []
    for name, machine in MACHINES.items():
        for seed in range(seeds):
            world = World(machine, seed, steps)
            count = len(world.sizes)
            best = [max(world.rate(each, step) for each in POOL) for step in range(count)]
            totals = {
                each: sum(world.rate(each, step) / best[step] for step in range(SETTLED, count))
                for each in POOL
            }
            hindsight = max(POOL, key=lambda each: totals[each])
            policies: dict[str, Callable[[], Policy]] = {
                "cost_model": lambda: CostModel(POOL),
                "beg_mab": lambda: BegMab(POOL),
                "ema": lambda: Ema(POOL),
                "fixed": lambda hindsight=hindsight: Fixed(hindsight),  # type: ignore[misc]
                "off": lambda: Fixed(POOL[0]),
            }
            regrets = {
                kind: regret_of(make(), world, seed, best) for kind, make in policies.items()
            }
            each = ", ".join(f"{kind} {100 * regret:.2f} %" for kind, regret in regrets.items())
            say(f"{name} {seed}: {each} (best fixed: {hindsight})")
            runs.append({"machine": name, "seed": seed, "best_fixed": str(hindsight), **regrets})
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    return program.run("bench_policy", lambda _: _benchmark(arguments))


def _benchmark(argv: Sequence[str]) -> None:
    parser = program.Parser("bench_policy", __doc__, "Fewer seeds and steps")
    args = parser.parse_args(argv)
    json = args.json or provenance.RESULTS / "bench_policy.json"
    program.check_writable(json)
    if args.prompts:
        load_prompts(args.prompts)
    seeds, steps = (3, 1500) if args.quick else (10, 3000)
    runs = measure(seeds, steps)
    names = ("cost_model", "beg_mab", "ema", "fixed", "off")
    spreads = {f"regret_{name}": spread([float(str(run[name])) for run in runs]) for name in names}
    print(spread_table(spreads, digits=4))
    summary = {name: round(each.median, 5) for name, each in spreads.items()}
    settings = {"quick": args.quick, "seeds": seeds, "steps": steps, "pool": [*map(str, POOL)]}
    provenance.write_json(
        json,
        provenance.document(
            "policy",
            summary,
            settings=settings,
            runs=runs,
            spreads={name: each.as_json() for name, each in spreads.items()},
        ),
    )
    say(f"written to {json}")


if __name__ == "__main__":
    sys.exit(main())
