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
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tlt_sglang.strategy.arms import Strategy, repeats
from tlt_sglang.strategy.policy import Observation

LEVEL_DRIFT = 0.0015
SLOW_DRIFT = 0.00002
"""Variance that a term gains in a step."""
MOST_VARIANCE = 1.0
MOST_TRIALS = 32
ALIKE = 0.5
"""What each request beside the first counts, and how many: those of a group say much the same."""
FIRST_LEVELS = {
    f"ngram after {ending}": math.log(-math.log(1 - chance))
    for ending, chance in ((2, 0.3), (3, 0.4), (4, 0.55), (6, 0.65), (8, 0.8), (12, 0.9))
}
"""What is believed at first of n-grams, by the length of the ending they follow."""
BRANCHES = 0.5
"""Expected of a tree: topk branches are worth 1 + this * log2(topk) drafts."""
_ANY_CHAIN = Strategy("ngram", num_draft_tokens=2)


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

    def observe(self, seen: Observation, now: int) -> None:
        """A step at step `now`: drafts accepted for each request, and what repeated itself."""
        strategy, depth = seen.strategy, depth_of(seen.strategy)
        drafts = [(count, count < depth) for count in seen.accepted]
        if not seen.endings:
            self._learn(strategy.drafter, strategy, drafts, now)
            return
        by_drafter: dict[str, list[tuple[int, bool]]] = {}
        for place, ending in enumerate(seen.endings):
            if (drafter := _drafter(strategy, ending)) is not None:
                by_drafter.setdefault(drafter, []).append(drafts[place])
            if ending and seen.repeated and not repeats(strategy, ending):
                by_drafter.setdefault(_of_ending(ending), []).append(seen.repeated[place])
        for drafter, outcomes in by_drafter.items():
            own = drafter == strategy.drafter
            self._learn(drafter, strategy if own else _ANY_CHAIN, outcomes, now)

    def tokens(
        self,
        strategy: Strategy,
        batch_size: int,
        now: int,
        shift: float = 0.0,
        endings: Sequence[int] = (),
    ) -> float:
        """Expected tokens that a step commits, of all requests: one of each for `off`.

        With `shift` the acceptance is taken that many standard deviations off its mean.
        """
        if not endings:
            return batch_size * self._length(strategy.drafter, strategy, now, shift)
        drafters: Counter[str | None] = Counter()
        for ending, count in Counter(endings).items():
            drafters[_drafter(strategy, ending)] += count
        return sum(
            count * (1.0 if name is None else self._length(name, strategy, now, shift))
            for name, count in drafters.items()
        )

    def _length(self, name: str, strategy: Strategy, now: int, shift: float) -> float:
        drafter = self._known(name)
        total = reach = 1.0
        for depth in range(depth_of(strategy)):
            level, by_depth, own = drafter.terms(strategy, depth)
            at = level.mean + by_depth.mean + own.mean
            if shift:
                at += shift * math.sqrt(level.aged(now) + by_depth.aged(now) + own.aged(now))
            reach *= 1.0 - math.exp(-math.exp(at))
            total += reach
        return total

    def _learn(
        self, name: str, strategy: Strategy, outcomes: Sequence[tuple[int, bool]], now: int
    ) -> None:
        """Drafts that were accepted, and whether one then was not."""
        drafter = self._known(name)
        for depth in range(max(count + failed for count, failed in outcomes)):
            hits = sum(count > depth for count, _ in outcomes)
            trials = hits + sum(count == depth and failed for count, failed in outcomes)
            if not trials:
                return
            certain = 1 + ALIKE * (min(trials, MOST_TRIALS) - 1)
            _update(drafter.terms(strategy, depth), hits / trials, certain, now)

    def _known(self, name: str) -> _Drafter:
        if name not in self._drafters:
            level = FIRST_LEVELS.get(name, 0.0)
            self._drafters[name] = _Drafter(_Term(level, MOST_VARIANCE, LEVEL_DRIFT))
        return self._drafters[name]


def _update(terms: Sequence[_Term], hits: float, trials: float, now: int) -> None:
    """A share of `hits` where the acceptance is the sum of these terms."""
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


def _drafter(strategy: Strategy, ending: int) -> str | None:
    """Who drafts for a request whose ending is so long; None for nobody."""
    if repeats(strategy, ending):
        return _of_ending(ending)
    return None if strategy.drafter in ("off", "ngram") else strategy.drafter


def _of_ending(ending: int) -> str:
    return f"ngram after {ending}"


def depth_of(strategy: Strategy) -> int:
    """Drafts that can be accepted, one after the other."""
    if strategy.drafter == "ngram":
        return strategy.num_draft_tokens - 1
    return strategy.num_steps
