"""Upstream's rule, for comparison: the depth of a chain follows a moving average of accept lengths.

Facts from SGLang 0.5.23, `speculative/adaptive_spec_params.py`: ranges of batch sizes have their
candidate depths; every few steps the depth goes down while the average lies half a draft or more
below the next lower candidate (a quarter more at the smallest range), else up while it exceeds the
present depth less a half. From depth 0, which drafts nothing, the lowest depth is tried again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tlt_sglang.strategy.arms import Strategy
from tlt_sglang.strategy.policy import Observation

RANGES = {1: (1, 3, 5, 7), 8: (0, 1, 3), 32: (0, 1), 64: (0,)}
"""Smallest batch size of a range: candidate depths."""
WEIGHT = 0.2
WARM_UP = 10
EVERY = 5


@dataclass(slots=True)
class _Range:
    depths: list[int]
    depth: int
    extra_drop: float
    average: float
    steps: int = 0

    def update(self, accepted: Sequence[int]) -> None:
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
            at = min(at + 1, last)
            if self.average < 0:
                self.average = self.depths[at] - 1.0
        else:
            before = at
            while at and self.average <= self._floor(self.depths[at - 1]):
                at -= 1
            while at == before < last and self.average > self.depths[at] - 0.5:
                at = before = at + 1
        self.depth = self.depths[at]

    def _floor(self, lower: int) -> float:
        return max(0.5, lower - 0.5) - self.extra_drop


class Ema:
    """Over the chains of `strategies` (topk 1) and `off`; raises ValueError if there is none."""

    def __init__(self, strategies: Sequence[Strategy]) -> None:
        self._arms = {arm.num_steps: arm for arm in strategies if arm.topk == 1 and _drafts(arm)}
        if not self._arms:
            raise ValueError("there is no chain to choose the depth of")
        if Strategy("off") in strategies:
            self._arms[0] = Strategy("off")
        self._ranges: dict[int, _Range] = {}
        for start, wanted in RANGES.items():
            depths = sorted(set(wanted) & set(self._arms)) or [min(self._arms)]
            middle = depths[len(depths) // 2]
            extra = 0.25 if start == 1 else 0.0
            self._ranges[start] = _Range(depths, middle, extra, middle - 1.0)

    def choose(self, batch_size: int, endings: Sequence[int] = ()) -> Strategy:
        return self._arms[self._of(batch_size).depth]

    def observe(self, seen: Observation) -> None:
        self._of(seen.batch_size).update(seen.accepted)

    def _of(self, batch_size: int) -> _Range:
        return self._ranges[max(start for start in self._ranges if start <= max(1, batch_size))]


def _drafts(arm: Strategy) -> bool:
    return arm.drafter in ("eagle", "eagle3")
