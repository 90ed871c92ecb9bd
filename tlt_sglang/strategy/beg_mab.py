"""BEG-MAB: bucketed epsilon-greedy, as the paper publishes it (TLT, arXiv 2511.16665, section 5).

Strategies are grouped by the number of tokens they verify. Batch sizes are cut into as many ranges
as there are groups, the group with the most tokens for the smallest batches. Within its group the
policy takes a random strategy with probability epsilon, else the one with the best median reward of
a sliding window. Above a threshold of the batch size nothing is speculated.

The paper leaves two points open. Here a strategy without rewards is tried first, and ranges double.

Pure, and runs in the scheduler process. It has no model of costs and ignores n-gram matches.
"""

from __future__ import annotations

import random
import statistics
from collections import deque
from collections.abc import Sequence

from tlt_sglang.strategy.policy import Observation
from tlt_sglang.strategy.strategies import Strategy

OFF = Strategy("off")


class BegMab:
    """The policy; raises ValueError if there is no strategy but `off`."""

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
        drafting = [strategy for strategy in strategies if strategy.drafter != "off"]
        if not drafting:
            raise ValueError("there is no strategy to choose from")
        widths = sorted({strategy.num_draft_tokens for strategy in drafting}, reverse=True)
        self._groups = [
            [strategy for strategy in drafting if strategy.num_draft_tokens == width]
            for width in widths
        ]
        self._first_range, self._max_batch, self._epsilon = first_range, max_batch, epsilon
        self._rewards: dict[Strategy, deque[float]] = {
            strategy: deque(maxlen=window) for strategy in drafting
        }
        self._rng = random.Random(seed)

    def choose(
        self, batch_size: int, match_lengths: Sequence[int] = (), sampled: Sequence[bool] = ()
    ) -> Strategy:
        """Return a strategy of the batch size's group: untried, random, or the best so far."""
        if self._off and batch_size > self._max_batch:
            return OFF
        group = self._group(batch_size)
        for strategy in group:
            if not self._rewards[strategy]:
                return strategy
        if self._rng.random() < self._epsilon:
            return self._rng.choice(group)
        return max(group, key=lambda strategy: statistics.median(self._rewards[strategy]))

    def observe(self, step: Observation) -> None:
        """Add the step's reward to its strategy's window."""
        if step.strategy in self._rewards:
            self._rewards[step.strategy].append(step.reward)

    def _group(self, batch_size: int) -> list[Strategy]:
        end = self._first_range
        for group in self._groups[:-1]:
            if batch_size <= end:
                return group
            end *= 2
        return self._groups[-1]
