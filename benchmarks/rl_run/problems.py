"""Problems of reasoning-gym with worked solutions, whose length follows the problem's size.

Three families: chains of sums, filtering, and counting legs. A family's size is drawn from a
lognormal distribution, so that most solutions are short and a few are very long: filtering repeats
what is kept at each step, and a large problem is also the one where a policy makes a mistake.

The few problems of a step of RL stand for the hundreds that a step has elsewhere, where some are
always very large: each is from another part of the distribution, which is wider there.
"""

from __future__ import annotations

import itertools
import math
import operator
import random
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

VERSION = 2
"""A part of the policy's name; increment it when problems or solutions change."""
SPREAD = 0.9
"""Standard deviation of the logarithm of a size."""
STEP_SPREAD = 1.8
"""The same for the problems of a step of RL."""
SEEDS = {"training": 10_000_000, "held out": 20_000_000, "run": 30_000_000}
"""First seed of the problems of each use, which have none in common."""


@dataclass(frozen=True)
class Problem:
    """A question, its answer, and one way to it."""

    family: str
    size: int
    question: str
    answer: str
    solution: str


@dataclass(frozen=True)
class Family:
    """How problems of one family of reasoning-gym are made and solved."""

    name: str
    median: int
    """Median size above the least one."""
    least: int
    most: int
    options: Callable[[int], dict[str, Any]]
    """Return the options of reasoning-gym for a size."""
    solve: Callable[[dict[str, Any]], tuple[str, list[str], str]]
    """Return (question, steps, answer) of an entry of reasoning-gym."""

    def problem(self, seed: int, times: float) -> Problem:
        """Return a problem of this seed, about so many times as large as the median."""
        from reasoning_gym.factory import create_dataset

        size = min(self.most, self.least + round(self.median * times))
        options = self.options(size)
        entry = create_dataset(self.name, seed=seed, size=1, **options)[0]
        question, steps, answer = self.solve(entry)
        solution = "\n".join([*steps, f"Answer: {answer}"])
        return Problem(self.name, size, question, answer, solution)


def _solve_sum(entry: dict[str, Any]) -> tuple[str, list[str], str]:
    """Add or subtract one term after another."""
    words = entry["metadata"]["expression"].split()
    total, steps = int(words[0]), []
    for sign, term in zip(words[1::2], words[2::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{total} {sign} {term} = {after}")
        total = after
    return f"Compute {' '.join(words)}", steps, str(total)


RULES: dict[str, tuple[str, Callable[[int, int], bool]]] = {
    "keep_larger": (">", operator.gt),
    "keep_smaller": ("<", operator.lt),
    "remove_larger": ("<=", operator.le),
    "remove_smaller": (">=", operator.ge),
}
"""The numbers that are kept by each operation of reasoning-gym."""


def _solve_filtering(entry: dict[str, Any]) -> tuple[str, list[str], str]:
    """Decide on one number after another, and repeat what has been kept."""
    numbers = [int(float(text)) for text in entry["metadata"]["original_numbers"]]
    bound = int(float(entry["metadata"]["filter_value"]))
    rule, fits = RULES[entry["metadata"]["operation"]]
    kept: list[int] = []
    steps = []
    for number in numbers:
        kept += [number] * fits(number, bound)
        sign = ">" if number > bound else "<" if number < bound else "="
        steps.append(f"{number} {sign} {bound}: {_list(kept)}")
    return f"Keep the numbers {rule} {bound}: {_list(numbers)}", steps, _list(kept)


def _solve_legs(entry: dict[str, Any]) -> tuple[str, list[str], str]:
    """Multiply for each animal, and add to the total."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    total, steps = 0, []
    animals: dict[str, int] = entry["metadata"]["animals"]
    for name, count in animals.items():
        legs = count * ANIMALS[name]
        steps.append(
            f"{name}: {count} x {ANIMALS[name]} = {legs}, {total} + {legs} = {total + legs}"
        )
        total += legs
    listed = ", ".join(f"{count} {name}" for name, count in animals.items())
    return f"Count the legs of {listed}", steps, str(total)


def _list(numbers: list[int]) -> str:
    return " ".join(str(number) for number in numbers) or "none"


FAMILIES = (
    Family(
        "chain_sum",
        *(4, 2, 60),
        lambda size: {"min_terms": size, "max_terms": size, "min_digits": 1, "max_digits": 1},
        _solve_sum,
    ),
    Family(
        "number_filtering",
        *(4, 2, 26),
        lambda size: {
            **{"min_numbers": size, "max_numbers": size, "min_decimals": 0, "max_decimals": 0},
            **{"min_value": 0, "max_value": 99},
        },
        _solve_filtering,
    ),
    Family(
        "leg_counting",
        *(3, 1, 30),
        lambda size: {
            **{"min_animals": size, "max_animals": size},
            **{"min_instances": 1, "max_instances": 9},
        },
        _solve_legs,
    ),
)


def problems(use: str, seed: int = 0) -> Iterator[Problem]:
    """Yield the problems of a use of SEEDS without end; the families take turns."""
    for number, family in zip(itertools.count(_first(use, seed)), itertools.cycle(FAMILIES)):
        yield family.problem(number, random.Random(number).lognormvariate(0, SPREAD))


def of_step(seed: int, step: int, count: int) -> list[Problem]:
    """Return the problems of a step of the run, in ascending parts of the sizes' distribution."""
    chosen = []
    for part, number in enumerate(range(count * step, count * (step + 1))):
        own = _first("run", seed) + number
        share = (part + random.Random(own).random()) / count
        times = math.exp(STEP_SPREAD * NormalDist().inv_cdf(share))
        chosen.append(FAMILIES[number % len(FAMILIES)].problem(own, times))
    return chosen


def _first(use: str, seed: int) -> int:
    return SEEDS[use] + 1_000_000 * seed


def reward(answer: str, text: str) -> float:
    """Return 1.0 if the text ends with the answer, else 0.0."""
    stated = re.findall(r"Answer: ([^\n]*)$", text.strip())
    return float(bool(stated) and stated[-1].strip() == answer)


def most_varied(rewards: Sequence[float], count: int) -> list[int]:
    """Return the places, ascending, of the `count` rewards with the largest variance.

    These are some of the lowest and some of the highest (PODS, arXiv 2504.13818). The result is
    empty if there are fewer rewards, or none differs.
    """
    order = sorted(range(len(rewards)), key=rewards.__getitem__)
    if len(rewards) < count or rewards[order[0]] == rewards[order[-1]]:
        return []
    choices = [order[:low] + order[len(order) - count + low :] for low in range(count + 1)]
    return sorted(max(choices, key=lambda some: statistics.pvariance(rewards[p] for p in some)))


def prompt(question: str) -> str:
    """Return the prompt that the policy answers, in the model's chat format."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
