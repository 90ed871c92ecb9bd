"""What each policy loses against an oracle, in a simulated engine.

    python benchmarks/bench_policy.py [--quick] [--json PATH] [--prompts FILE]

The simulation has no engine: step costs are a model of a machine (see `MACHINES`), acceptance per
depth drifts and jumps as it does when target and drafter are updated, batches drain from full to
one request, again and again. A policy sees what it would see in an engine: the accepted drafts of
each request and a noisy time. The oracle knows the true costs and the true acceptance of every
step, and takes the strategy with the most expected tokens a second.

regret_NAME     Mean share of the oracle's throughput that the policy loses, over all steps after
                the first 200 of each run: median over machines and seeds. `fixed` is the single
                strategy that does best in hindsight, chosen for each run by the oracle itself.

`--prompts` is taken for the sake of the other benchmarks' callers: prompts play no part here.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # started as a file, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.common import say
from tlt_sglang.strategy.arms import Strategy, parse
from tlt_sglang.strategy.beg_mab import BegMab
from tlt_sglang.strategy.cost_model import CostModel
from tlt_sglang.strategy.ema import Ema
from tlt_sglang.strategy.policy import Fixed, Observation, Policy

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
"""Of a step: what a change of strategy costs."""


@dataclass(frozen=True)
class Machine:
    """Costs of a step, in milliseconds."""

    weights: float
    """To read the target's weights once: what a step costs at least."""
    row: float
    """For each token of the batch that the target computes, once that exceeds `weights`."""
    draft: float
    """For one draft step."""
    overhead: float
    """Of a round of speculation, besides."""
    most: int
    """Requests that run at once."""

    def cost(self, arm: Strategy, batch_size: int) -> float:
        rows = batch_size * arm.num_draft_tokens
        # Memory-bound and compute-bound meet softly.
        target = math.hypot(self.weights, self.row * rows)
        if arm.drafter == "off":
            return target
        if arm.drafter == "ngram":
            return target + self.overhead / 2
        drafted = (
            self.row / 12 * batch_size * (arm.topk * (arm.num_steps - 1) + arm.num_draft_tokens)
        )
        return target + self.draft * (arm.num_steps + 1) + drafted + self.overhead


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
        chance = random.Random(seed)
        self.sizes: list[int] = []
        self.levels: list[tuple[float, float]] = []
        eagle, ngram = chance.uniform(-0.2, 1.2), chance.uniform(-1.5, 0.5)
        while len(self.sizes) < steps:
            # One rollout: the batch is full, then drains with a long tail.
            length = chance.randint(250, 500)
            finish = sorted(chance.lognormvariate(0, 0.7) for _ in range(machine.most))
            scale = length / finish[-1]
            eagle += chance.gauss(0, 0.5)  # the target was updated, or the drafter
            ngram += chance.gauss(0, 0.5)
            for step in range(length):
                eagle += chance.gauss(0.01 * (0.5 - eagle), 0.03)
                ngram += chance.gauss(0.01 * (-0.5 - ngram), 0.03)
                self.sizes.append(sum(end * scale > step for end in finish) or 1)
                self.levels.append((eagle, ngram))

    def chances(self, arm: Strategy, step: int) -> list[float]:
        """Acceptance at each depth, given that the draft got so far."""
        eagle, ngram = self.levels[step]
        if arm.drafter == "off":
            return []
        if arm.drafter == "ngram":
            # Seldom right; but where it is, it goes on being right.
            return [_logistic(ngram)] + [_logistic(ngram + 1.5)] * (arm.num_draft_tokens - 2)
        found = []
        for depth in range(arm.num_steps):
            chance = _logistic(eagle - 0.12 * depth)
            if arm.topk > 1:
                spread = 1 + 0.55 * math.log2(arm.topk)
                full = 1 - (1 - chance) ** spread
                # A tree with few nodes is thin at its deeper levels.
                thick = min(1.0, arm.num_draft_tokens / (arm.topk * (depth + 1)))
                chance += (full - chance) * thick
            found.append(chance)
        return found

    def rate(self, arm: Strategy, step: int) -> float:
        """Expected tokens a millisecond."""
        total = reach = 1.0
        for chance in self.chances(arm, step):
            reach *= chance
            total += reach
        size = self.sizes[step]
        return size * total / self.machine.cost(arm, size)


def regret_of(policy: Policy, world: World, seed: int, best: Sequence[float]) -> float:
    """Mean share of the oracle's rates that `policy` loses, after it has settled."""
    chance = random.Random(seed)
    before: Strategy | None = None
    lost = []
    for step, size in enumerate(world.sizes):
        arm = policy.choose(size)
        chances = world.chances(arm, step)
        accepted = [_accepted(chances, chance) for _ in range(size)]
        cost = world.machine.cost(arm, size) * (1 + SWITCH * (before not in (None, arm)))
        noise = chance.lognormvariate(0, 0.04) * (3 if chance.random() < 0.01 else 1)
        policy.observe(Observation(arm, size, accepted, cost * noise / 1000))
        if step >= SETTLED:
            rate = world.rate(arm, step) / (1 + SWITCH * (before not in (None, arm)))
            lost.append(1 - rate / best[step])
        before = arm
    return sum(lost) / len(lost)


def _accepted(chances: Sequence[float], chance: random.Random) -> int:
    for depth, share in enumerate(chances):
        if chance.random() >= share:
            return depth
    return len(chances)


def _logistic(x: float) -> float:
    return 0.95 / (1 + math.exp(-x))


def measure(seeds: int, steps: int) -> list[dict[str, object]]:
    """The regret of every policy in every world."""
    found: list[dict[str, object]] = []
    for name, machine in MACHINES.items():
        for seed in range(seeds):
            world = World(machine, seed, steps)
            count = len(world.sizes)
            best = [max(world.rate(arm, step) for arm in POOL) for step in range(count)]
            totals = {
                arm: sum(world.rate(arm, step) / best[step] for step in range(SETTLED, count))
                for arm in POOL
            }
            hindsight = max(POOL, key=lambda arm: totals[arm])
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
            told = ", ".join(f"{kind} {100 * regret:.2f} %" for kind, regret in regrets.items())
            say(f"{name} {seed}: {told} (best fixed: {hindsight})")
            found.append({"machine": name, "seed": seed, "best_fixed": str(hindsight), **regrets})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured, 1 a problem, 2 bad input, 130 interrupted."""
    words = sys.argv[1:] if argv is None else argv
    return common.run("bench_policy", lambda _: _benchmark(words))


def _benchmark(argv: Sequence[str]) -> None:
    parser = common.Parser("bench_policy", __doc__, "fewer seeds")
    args = parser.parse_args(argv)
    json = args.json or common.RESULTS / "bench_policy.json"
    common.check_writable(json)
    if args.prompts:
        common.load_prompts(args.prompts)
    seeds, steps = (3, 1500) if args.quick else (10, 3000)
    runs = measure(seeds, steps)
    names = ("cost_model", "beg_mab", "ema", "fixed", "off")
    spreads = {
        f"regret_{name}": common.spread([float(str(run[name])) for run in runs]) for name in names
    }
    rows = [
        (n, f"{s.median:.4f}", f"{s.min:.4f}", f"{s.max:.4f}", str(s.count))
        for n, s in spreads.items()
    ]
    print(common.table(("figure", "median", "min", "max", "count"), rows))
    summary = {name: round(spread.median, 5) for name, spread in spreads.items()}
    settings = {"quick": args.quick, "seeds": seeds, "steps": steps, "pool": [*map(str, POOL)]}
    common.write_json(
        json,
        common.document(
            "policy",
            summary,
            settings=settings,
            runs=runs,
            spreads={name: spread.as_json() for name, spread in spreads.items()},
        ),
    )
    say(f"written to {json}")


if __name__ == "__main__":
    sys.exit(main())
