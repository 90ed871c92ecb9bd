"""Compare drafters by what the target accepts, whichever strategies their systems have chosen.

A system whose drafter is better may choose deeper chains, or leave n-grams out, so accept lengths
of whole responses tell of choices as well as of drafters. Here each strategy is compared with
itself: the tokens of a drafter over those that a reference drafter would have had in the same
verify steps (indirect standardization). Only strategies that draft with the drafter count; in their
chains a long match in the n-gram index may stand in for it, in all systems alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.rl_run.settings import Step
from tlt_sglang.strategy.strategies import parse


class Yardstick:
    """The accept length of each strategy in the `steps` of a reference drafter."""

    def __init__(self, steps: Iterable[Step]) -> None:
        verified, accepted = Counter[str](), Counter[str]()
        for step in steps:
            for name, (count, drafts) in step.strategies.items():
                if parse(name).num_steps:
                    verified[name] += count
                    accepted[name] += drafts
        self._lengths = {name: 1 + accepted[name] / n for name, n in verified.items() if n}
        self._mean = 1 + accepted.total() / max(1, verified.total())

    def accept_length(self, steps: Iterable[Step]) -> float | None:
        """Return that of the drafter of `steps`, as if the strategies had been the reference's.

        None where the drafter was not used, or only in strategies that the reference has not used.
        """
        tokens = expected = 0.0
        for step in steps:
            for name, (count, drafts) in step.strategies.items():
                if name in self._lengths:
                    tokens += count + drafts
                    expected += count * self._lengths[name]
        return self._mean * tokens / expected if expected else None

    def each(self, systems: Mapping[str, Sequence[Step]]) -> dict[str, list[float]]:
        """Return the accept length of each step, not a number where none was drafted, by system;
        without the systems that have no drafter."""
        lengths = {
            name: [self.accept_length([step]) or math.nan for step in steps]
            for name, steps in systems.items()
        }
        return {name: own for name, own in lengths.items() if not all(map(math.isnan, own))}
