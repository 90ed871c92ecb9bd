"""SGLang's own rule, for comparison: the depth of a chain follows an average of accept lengths.

Facts from SGLang's `speculative/adaptive_spec_params.py`: ranges of batch sizes have their
candidate depths; every few steps the depth goes down while the average lies half a draft or more
below the next lower candidate (a quarter more at the smallest range), else up while it exceeds the
present depth less a half. From depth 0, which drafts nothing, the lowest depth is tried again.

Pure, and runs in the scheduler process. It knows no costs, no trees and no n-grams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tlt_sglang.strategy.policy import Observation
from tlt_sglang.strategy.strategies import Strategy

RANGES = {1: (1, 3, 5, 7), 8: (0, 1, 3), 32: (0, 1), 64: (0,)}
"""Smallest batch size of a range: candidate depths."""
WEIGHT = 0.2
WARM_UP = 10
EVERY = 5


@dataclass(slots=True)
class _Range:
    """The depth of one range of batch sizes, and the average that moves it."""

    depths: list[int]
    depth: int
    extra_drop: float
    average: float
    steps: int = 0

    def update(self, accepted: Sequence[int]) -> None:
        """Take in the accepted drafts of a step, and move the depth every few steps."""
        if self.depth and accepted:
            mean = sum(accepted) / len(accepted)
            self.average += WEIGHT * (mean - self.average)
        self.steps += 1
        if self.steps > WARM_UP and (self.steps - WARM_UP) % EVERY == 0:
            self._move()

    def _move(self) -> None:
        at = self.depths.index(self.depth)
        last = len(self.depths) - 1
        if self.depth == 0:
            # Without drafts there is no average; the lowest depth starts one.
            at = min(at + 1, last)
            if self.average < 0:
                self.average = self.depths[at] - 1.0
        else:
            # Down as far as the average asks, and only up if nothing went down.
            before = at
            while at and self.average <= self._floor(self.depths[at - 1]):
                at -= 1
            while at == before < last and self.average > self.depths[at] - 0.5:
                at = before = at + 1
        self.depth = self.depths[at]

    def _floor(self, lower: int) -> float:
        return max(0.5, lower - 0.5) - self.extra_drop


class Ema:
    """The policy over the chains of `strategies` (topk 1) and `off`.

    Raises ValueError if `strategies` contains no chain.
    """

    def __init__(self, strategies: Sequence[Strategy]) -> None:
        self._by_depth = {
            strategy.num_steps: strategy for strategy in strategies if _is_learned_chain(strategy)
        }
        if not self._by_depth:
            raise ValueError("there is no chain to choose the depth of")
        if Strategy("off") in strategies:
            self._by_depth[0] = Strategy("off")
        self._ranges: dict[int, _Range] = {}
        for start, candidates in RANGES.items():
            depths = sorted(set(candidates) & set(self._by_depth)) or [min(self._by_depth)]
            middle = depths[len(depths) // 2]
            extra = 0.25 if start == 1 else 0.0
            self._ranges[start] = _Range(depths, middle, extra, middle - 1.0)

    def choose(
        self, batch_size: int, match_lengths: Sequence[int] = (), sampled: Sequence[bool] = ()
    ) -> Strategy:
        """Return the chain with the depth of the batch size's range."""
        return self._by_depth[self._range(batch_size).depth]

    def observe(self, step: Observation) -> None:
        """Move the average of the batch size's range."""
        self._range(step.batch_size).update(step.accepted)

    def _range(self, batch_size: int) -> _Range:
        return self._ranges[max(start for start in self._ranges if start <= max(1, batch_size))]


def _is_learned_chain(strategy: Strategy) -> bool:
    return strategy.topk == 1 and strategy.drafter in ("eagle", "eagle3")
