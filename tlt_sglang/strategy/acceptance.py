"""How far drafts get: acceptance per depth, tracked as it drifts.

What one strategy shows tells of the others. A drafter has a level that moves fast (the target was
updated, the drafter hot-swapped, the text changed), how that differs by depth moves slowly, and how
a tree does better than a chain at each depth hardly moves at all. So the acceptance of a draft at
`depth`, given that the draft got so far, is modelled as

    1 - exp(-exp(level + by_depth[depth] + by_strategy[strategy][depth]))

(the complementary log-log link: k independent drafts in the place of one add log k), and each of
the three terms is a Gaussian belief with a drift of its own, updated by one step of an extended
Kalman filter for each depth of each decode step. Variances add up to the uncertainty of a strategy
that was not tried for a while.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from tlt_sglang.strategy.arms import Strategy

LEVEL_DRIFT = 0.0015
SLOW_DRIFT = 0.00002
"""Variance that a term gains in a step."""
MOST_VARIANCE = 1.0
MOST_TRIALS = 32
ALIKE = 0.5
"""What each request beside the first counts, and how many: those of a group say much the same."""
BRANCHES = 0.5
"""Expected of a tree: topk branches are worth 1 + this * log2(topk) drafts."""


@dataclass(slots=True)
class _Term:
    """A Gaussian belief that widens with time."""

    mean: float
    variance: float
    drift: float
    at: int = 0

    def aged(self, now: int) -> float:
        """Its variance at step `now`."""
        return min(MOST_VARIANCE, self.variance + self.drift * (now - self.at))


@dataclass(slots=True)
class _Drafter:
    """What is believed of one drafter."""

    level: _Term
    by_depth: list[_Term] = field(default_factory=list)
    by_strategy: dict[Strategy, list[_Term]] = field(default_factory=dict)

    def terms(self, strategy: Strategy, depth: int) -> tuple[_Term, _Term, _Term]:
        while len(self.by_depth) <= depth:
            self.by_depth.append(_Term(-0.1 * len(self.by_depth), 0.1, SLOW_DRIFT))
        own = self.by_strategy.setdefault(strategy, [])
        while len(own) <= depth:
            # Chains are what the others are measured by.
            chain = strategy.topk == 1
            gain = math.log(1 + BRANCHES * math.log2(strategy.topk))
            own.append(_Term(gain, 0.001 if chain else 0.1, 0.0 if chain else SLOW_DRIFT))
        return self.level, self.by_depth[depth], own[depth]


class Acceptance:
    """Of every drafter. Steps are counted by the caller."""

    def __init__(self) -> None:
        self._drafters: dict[str, _Drafter] = {}

    def observe(self, strategy: Strategy, accepted: Sequence[int], now: int) -> None:
        """A step of `strategy` at step `now`: drafts accepted for each request."""
        for depth in range(depth_of(strategy)):
            trials = sum(count >= depth for count in accepted)
            if not trials:
                return
            hits = sum(count > depth for count in accepted) / trials
            self._update(strategy, depth, hits, 1 + ALIKE * (min(trials, MOST_TRIALS) - 1), now)

    def length(self, strategy: Strategy, now: int, shift: float = 0.0) -> float:
        """Expected tokens a request commits in a step: 1 for `off`.

        With `shift` the acceptance is taken that many standard deviations off its mean.
        """
        drafter = self._drafter(strategy)
        total = reach = 1.0
        for depth in range(depth_of(strategy)):
            level, by_depth, own = drafter.terms(strategy, depth)
            at = level.mean + by_depth.mean + own.mean
            if shift:
                at += shift * math.sqrt(level.aged(now) + by_depth.aged(now) + own.aged(now))
            reach *= 1.0 - math.exp(-math.exp(at))
            total += reach
        return total

    def _update(self, strategy: Strategy, depth: int, hits: float, trials: float, now: int) -> None:
        terms = self._drafter(strategy).terms(strategy, depth)
        variances = [term.aged(now) for term in terms]
        rate = math.exp(min(2.0, max(-5.0, sum(term.mean for term in terms))))
        chance = 1.0 - math.exp(-rate)
        slope = rate * (1.0 - chance)
        spread = max(1e-4, chance * (1.0 - chance))
        information = trials * slope * slope / spread
        gradient = trials * (hits - chance) * slope / spread
        total = 1.0 + information * sum(variances)
        for term, variance in zip(terms, variances, strict=True):
            term.mean += variance * gradient / total
            term.variance = variance - variance * variance * information / total
            term.at = now

    def _drafter(self, strategy: Strategy) -> _Drafter:
        name = strategy.drafter
        if name not in self._drafters:
            self._drafters[name] = _Drafter(_Term(0.0, MOST_VARIANCE, LEVEL_DRIFT))
        return self._drafters[name]


def depth_of(strategy: Strategy) -> int:
    """Drafts that can be accepted, one after the other."""
    if strategy.drafter == "ngram":
        return strategy.num_draft_tokens - 1
    return strategy.num_steps
