"""BEG-MAB: bucketed epsilon-greedy, as the paper publishes it (TLT, arXiv 2511.16665, section 5).

Strategies are grouped by the number of tokens they verify. Batch sizes are cut into as many ranges
as there are groups, the group with the most tokens for the smallest batches. Within its group the
policy takes a random strategy with probability epsilon, else the one with the best median reward of
a sliding window. Above a threshold of the batch size nothing is speculated.

What the paper leaves open: an arm that was never tried comes first, and ranges double.
"""

from __future__ import annotations

import random
import statistics
from collections import deque
from collections.abc import Sequence

from tlt_sglang.strategy.arms import Strategy
from tlt_sglang.strategy.policy import Observation

OFF = Strategy("off")


class BegMab:
    """Raises ValueError if there is no strategy but `off`."""

    def __init__(
        self,
        strategies: Sequence[Strategy],
        *,
        first_range: int = 4,
        max_batch: int = 32,
        epsilon: float = 0.1,
        window: int = 32,
        seed: int = 0,
    ) -> None:
        self._off = OFF in strategies
        arms = [strategy for strategy in strategies if strategy.drafter != "off"]
        if not arms:
            raise ValueError("there is no strategy to choose from")
        sizes = sorted({arm.num_draft_tokens for arm in arms}, reverse=True)
        self._groups = [[arm for arm in arms if arm.num_draft_tokens == size] for size in sizes]
        self._first_range, self._max_batch, self._epsilon = first_range, max_batch, epsilon
        self._rewards: dict[Strategy, deque[float]] = {arm: deque(maxlen=window) for arm in arms}
        self._chance = random.Random(seed)

    def choose(self, batch_size: int, endings: Sequence[int] = ()) -> Strategy:
        if self._off and batch_size > self._max_batch:
            return OFF
        group = self._group(batch_size)
        for arm in group:
            if not self._rewards[arm]:
                return arm
        if self._chance.random() < self._epsilon:
            return self._chance.choice(group)
        return max(group, key=lambda arm: statistics.median(self._rewards[arm]))

    def observe(self, seen: Observation) -> None:
        if seen.strategy in self._rewards:
            self._rewards[seen.strategy].append(seen.reward)

    def _group(self, batch_size: int) -> list[Strategy]:
        end = self._first_range
        for group in self._groups[:-1]:
            if batch_size <= end:
                return group
            end *= 2
        return self._groups[-1]
