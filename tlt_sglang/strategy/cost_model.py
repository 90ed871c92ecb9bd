"""The cost model: expected accept length over measured step cost, for the batch of the moment.

A strategy's expected throughput is the tokens it should commit a second: accept length from
acceptance per depth, which all chains of a drafter share and greedy and sampled requests do not
(`acceptance`), over the median cost of its steps at this batch size (`costs`). `off` is a strategy
like the others, with an accept length of exactly one. What n-grams are expected to add depends on
the suffix match length of each request, so it differs from step to step.

It explores by Thompson sampling (Thompson 1933): it maximises not the expected throughput but a
sample of what the throughput may be, whose spread follows from how much was observed and how long
ago. So a strategy is tried where its uncertainty could change the choice, and no more often.

Pure, and runs in the scheduler process. It measures nothing itself.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from tlt_sglang.strategy.acceptance import Acceptance, Mix, mix_of
from tlt_sglang.strategy.costs import Costs
from tlt_sglang.strategy.policy import AllowedStrategies, Observation, bucket
from tlt_sglang.strategy.strategies import TRUSTED_MATCH, Strategy

MARGIN = 0.02
"""Gain in throughput above which another strategy replaces the current one."""
CATCH_UP_MARGIN = 0.05
"""The margin where the other one's drafter has pending tokens and has to catch up first."""
BREADTH = 0.3
"""Standard deviation of a sample, over that of what is known; 0 never explores."""
MAX_SHIFT = 2.0
"""Samples are cut here, in standard deviations."""
TRIAL = 2
"""Steps of a strategy that is tried although another one is expected to be better."""
WORTH_A_TRIAL = 0.5
"""Expected throughput, over that of the best strategy, from which a strategy is tried again after
the machine has changed."""
NOISE = 0.04
"""Standard deviation of one step's time, as a share of it."""
DERIVED_NOISE = 0.2
"""The noise of a cost that was derived from others, or that is STALE."""
SMALL_BATCH = 2
"""Largest batch in which every change of a match length ends the dwell time."""
MANY = 4
"""A batch's share of requests, as one in so many, by which the number of trusted matches may change
within the dwell time."""
STALE = 1000.0
"""Steps after which a cost that was not measured again is as uncertain as a derived one."""


class CostModel:
    """The policy; raises ValueError without strategies.

    `dwell` is the least number of steps that a choice is kept, unless it is only a trial, the batch
    grows, or the number of requests with a trusted match changes by a quarter of the batch. Where
    match lengths are known, n-grams are not kept, nor is anything for the last requests of a batch
    if a match length has changed. `allowed` maps a batch size to the strategies that can run there.
    """

    def __init__(
        self,
        strategies: Sequence[Strategy],
        *,
        dwell: int = 4,
        max_batch: int | None = None,
        allowed: AllowedStrategies | None = None,
        seed: int = 0,
    ) -> None:
        if not strategies:
            raise ValueError("there is no strategy to choose from")
        self.strategies = tuple(dict.fromkeys(strategies))
        self.acceptance, self.costs = Acceptance(), Costs()
        self._dwell, self._max_batch, self._allowed = dwell, max_batch, allowed
        self._rng = random.Random(seed)
        self._now = 0
        self._current = self.strategies[0]
        self._keep_until = self._size = 0
        self._matches: list[int] = []

    def choose(
        self, batch_size: int, match_lengths: Sequence[int] = (), sampled: Sequence[bool] = ()
    ) -> Strategy:
        """Return the current strategy while it dwells, else the best by a sample of throughput."""
        self._now += 1
        candidates = self._candidates(batch_size)
        if self._dwells(batch_size, match_lengths) and self._current in candidates:
            return self._current
        mix = mix_of(batch_size, match_lengths, sampled)
        expected = {
            strategy: self.expected_throughput(strategy, batch_size, mix) for strategy in candidates
        }
        # Where the machine has changed, what may be worth it is tried once.
        if outdated := self._outdated(batch_size, expected):
            self._current = max(outdated, key=lambda strategy: expected[strategy])
            self._keep_until = self._now + TRIAL
            return self._current
        # Another strategy has to be better than the current one by a margin.
        before, least = self._current, WORTH_A_TRIAL * max(expected.values())
        samples = {
            strategy: self.expected_throughput(
                strategy, batch_size, mix, self._sample_shift(), self._sample_shift()
            )
            for strategy, throughput in expected.items()
            if throughput >= least or strategy == before
        }
        best = max(samples, key=lambda strategy: samples[strategy])
        margin = CATCH_UP_MARGIN if best.num_steps and not self._current.num_steps else MARGIN
        current_is_out = self._current not in candidates
        if current_is_out or samples[best] > samples[self._current] * (1 + margin):
            self._current = best
        # Another strategy that is not expected to be the best is tried, for a short time.
        trial = self._current != before and expected[self._current] < max(expected.values())
        self._keep_until = self._now + (min(TRIAL, self._dwell) if trial else self._dwell)
        return self._current

    def observe(self, step: Observation) -> None:
        """Learn what a step cost and, unless it calibrated, how far its drafts got."""
        calibrates = not step.accepted
        self.costs.observe(
            step.strategy, step.batch_size, step.seconds, self._now, calibrates=calibrates
        )
        if not calibrates:
            self.acceptance.observe(step, self._now)

    def expected_throughput(
        self,
        strategy: Strategy,
        batch_size: int,
        mix: Mix,
        acceptance_shift: float = 0.0,
        cost_shift: float = 0.0,
    ) -> float:
        """Return tokens a second of a batch of this mix; infinity while no cost at all is known.

        The shifts are standard deviations off the means: towards more acceptance, and towards a
        lower cost.
        """
        seconds, count, age = self.costs.seconds(strategy, batch_size, self._now)
        if seconds is None:
            return float("inf")
        if cost_shift:
            staleness = min(1.0, age / STALE) if count else 1.0
            measured = NOISE / math.sqrt(max(1, count))
            spread = measured * (1 - staleness) + DERIVED_NOISE * staleness
            seconds *= math.exp(-cost_shift * spread)
        return self.acceptance.tokens(strategy, mix, self._now, acceptance_shift) / seconds

    def _outdated(self, batch_size: int, expected: Mapping[Strategy, float]) -> list[Strategy]:
        """Return the strategies to try again as the machine has changed."""
        least = WORTH_A_TRIAL * max(expected.values())
        return [
            strategy
            for strategy, throughput in expected.items()
            if throughput >= least and self.costs.is_outdated(strategy, batch_size)
        ]

    def _dwells(self, batch_size: int, match_lengths: Sequence[int]) -> bool:
        """Return whether the last choice still stands; remember the batch for the next call."""
        few = batch_size <= SMALL_BATCH
        shortest = 1 if few else TRUSTED_MATCH
        matches = [length if few else 1 for length in match_lengths if length >= shortest]
        size = bucket(batch_size)
        # Of a large batch, a few matches more or less change little.
        same = abs(len(matches) - len(self._matches)) <= batch_size // MANY
        same_batch = (matches == self._matches if few else same) and size <= self._size
        kept = self._now < self._keep_until
        kept = kept and not (match_lengths and self._current.drafter == "ngram")
        self._matches, self._size = matches, size
        return kept and same_batch

    def _sample_shift(self) -> float:
        return max(-MAX_SHIFT, min(MAX_SHIFT, self._rng.gauss(0, BREADTH)))

    def _candidates(self, batch_size: int) -> Sequence[Strategy]:
        if self._max_batch is not None and batch_size > self._max_batch:
            plain = [strategy for strategy in self.strategies if strategy.drafter == "off"]
            return plain or self.strategies
        if self._allowed is not None:
            allowed = self._allowed(batch_size)
            return [each for each in self.strategies if each in allowed] or self.strategies
        return self.strategies
