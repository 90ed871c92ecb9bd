"""The cost model: expected accept length over measured step cost, for the batch of the moment.

A strategy's worth is the tokens it is expected to commit a second: accept length from acceptance
per depth, which all chains of a drafter share (`acceptance`), over the median cost of its steps at
this batch size (`costs`). `off` is an arm like the others, with an accept length of exactly one.

What is expected of n-grams depends on how long each request's ending is that was there before, so
it differs from step to step, and what they would have drafted is learned from whoever drafts.

It explores by Thompson sampling (Thompson 1933): what it maximises is not the expected worth but a
draw from what the worth may be, given how much was seen and how long ago. So a strategy is tried
where its uncertainty could change the choice, as often as it may be the best one, and no more.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence

from tlt_sglang.strategy.acceptance import Acceptance
from tlt_sglang.strategy.arms import TRUSTED_ENDING, Strategy
from tlt_sglang.strategy.costs import Costs
from tlt_sglang.strategy.policy import Observation, bucket

MARGIN = 0.02
"""A strategy is left only for one that is better by more than this."""
WAKING = 0.05
"""And the same of a strategy whose drafter has waited: it has to catch up first."""
BREADTH = 0.3
"""Standard deviations of a draw, over those of what is known; 0 never explores."""
WIDEST = 2.0
"""Draws are cut here, in standard deviations."""
TRIAL = 2
"""Steps of a strategy that is tried although another one is expected to be better."""
NOISE = 0.04
"""Standard deviation of one step's time, as a share of it."""
UNKNOWN = 0.2
"""The same of a cost that was derived from others, or that is STALE."""
FEW = 2
"""Requests at most of which every ending counts for whether a choice is kept."""
STALE = 1000.0
"""Steps in which a cost that is not measured again becomes as good as derived."""


class CostModel:
    """Raises ValueError without strategies.

    `dwell`: steps a choice is kept at least, but for one that is only a trial, and as long as the
    batch does not grow and as many of its requests repeat what was there before. Where endings are
    known, n-grams are not kept, nor is anything for the last requests of a batch if an ending has
    changed. `possible`: strategies that a batch size can have.
    """

    def __init__(
        self,
        strategies: Sequence[Strategy],
        *,
        dwell: int = 4,
        max_batch: int | None = None,
        possible: Callable[[int], Collection[Strategy]] | None = None,
        seed: int = 0,
    ) -> None:
        if not strategies:
            raise ValueError("there is no strategy to choose from")
        self.arms = tuple(dict.fromkeys(strategies))
        self.acceptance, self.costs = Acceptance(), Costs()
        self._dwell, self._max_batch, self._possible = dwell, max_batch, possible
        self._chance = random.Random(seed)
        self._now = 0
        self._current = self.arms[0]
        self._keep_until = self._size = 0
        self._repeating: list[int] = []

    def choose(self, batch_size: int, endings: Sequence[int] = ()) -> Strategy:
        self._now += 1
        arms = self._allowed(batch_size)
        few = batch_size <= FEW
        repeating = [e if few else 1 for e in endings if e >= (1 if few else TRUSTED_ENDING)]
        size = bucket(batch_size)
        same = repeating == self._repeating and size <= self._size
        kept = self._now < self._keep_until and not (endings and self._current.drafter == "ngram")
        self._repeating, self._size = repeating, size
        if self._current in arms and kept and same:
            return self._current
        drawn = {
            arm: self.worth(arm, batch_size, self._draw(), self._draw(), endings) for arm in arms
        }
        best = max(arms, key=lambda arm: drawn[arm])
        margin = WAKING if best.num_steps and not self._current.num_steps else MARGIN
        if self._current not in arms or drawn[best] > drawn[self._current] * (1 + margin):
            self._current = best
        expected = {arm: self.worth(arm, batch_size, endings=endings) for arm in arms}
        trial = expected[self._current] < max(expected.values())
        self._keep_until = self._now + (min(TRIAL, self._dwell) if trial else self._dwell)
        return self._current

    def observe(self, seen: Observation) -> None:
        calibrates = not seen.accepted
        self.costs.observe(
            seen.strategy, seen.batch_size, seen.seconds, self._now, calibrates=calibrates
        )
        if not calibrates:
            self.acceptance.observe(seen, self._now)

    def worth(
        self,
        arm: Strategy,
        batch_size: int,
        shift: float = 0.0,
        faster: float = 0.0,
        endings: Sequence[int] = (),
    ) -> float:
        """Tokens a second; infinite where nothing at all is known of costs.

        With an acceptance `shift`, and a cost `faster`, standard deviations off what is expected.
        """
        seconds, count, age = self.costs.seconds(arm, batch_size, self._now)
        if seconds is None:
            return float("inf")
        if faster:
            share = min(1.0, age / STALE) if count else 1.0
            spread = NOISE / math.sqrt(max(1, count)) * (1 - share) + UNKNOWN * share
            seconds *= math.exp(-faster * spread)
        return self.acceptance.tokens(arm, batch_size, self._now, shift, endings) / seconds

    def _draw(self) -> float:
        return max(-WIDEST, min(WIDEST, self._chance.gauss(0, BREADTH)))

    def _allowed(self, batch_size: int) -> Sequence[Strategy]:
        if self._max_batch is not None and batch_size > self._max_batch:
            plain = [arm for arm in self.arms if arm.drafter == "off"]
            return plain or self.arms
        if self._possible is not None:
            possible = self._possible(batch_size)
            return [arm for arm in self.arms if arm in possible] or self.arms
        return self.arms
