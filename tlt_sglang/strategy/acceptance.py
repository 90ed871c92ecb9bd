"""The acceptance model: how far drafts get, per depth, tracked as it drifts.

Every strategy tells something about the others. A drafter has a level that moves fast (the target
was updated, the drafter hot-swapped, the text changed), the differences between depths move slowly,
and the gain of a tree over a chain at each depth hardly moves at all. So the acceptance of a draft
at `depth`, if the draft got so far, is modelled as

    1 - exp(-exp(level + by_depth[depth] + by_strategy[strategy][depth]))

(the complementary log-log link: k independent drafts in the place of one add log k), and each of
the three terms is a Gaussian belief with a drift of its own, updated by one step of an extended
Kalman filter for each depth of each decode step. Variances add up to the uncertainty of a strategy
that was not tried for a while.

N-grams are a drafter for each suffix match length, and learn from every step in which the engine
knows how a match went on, whoever drafted.

Greedy and sampled requests have beliefs apart, as a greedy target agrees with its drafter more
often. A batch of both is expected to commit what its requests of either kind do.

Pure, and runs in the scheduler process. It knows no costs; the caller counts the steps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tlt_sglang.strategy.policy import Observation
from tlt_sglang.strategy.strategies import Strategy, depth_of, uses_match

LEVEL_DRIFT = 0.0015
SLOW_DRIFT = 0.00002
"""Variance that a term gains in a step."""
MAX_VARIANCE = 1.0
MAX_TRIALS = 32
CORRELATED_WEIGHT = 0.5
"""Weight of every request but the first, up to MAX_TRIALS: those of a group resemble each other."""
NGRAM_LEVELS = {
    f"ngram after {length}": math.log(-math.log(1 - acceptance))
    for length, acceptance in ((2, 0.3), (3, 0.4), (4, 0.55), (6, 0.65), (8, 0.8), (12, 0.9))
}
"""First levels of n-grams, by suffix match length."""
BRANCH_GAIN = 0.5
"""Prior of a tree: topk branches count as 1 + this * log2(topk) drafts."""
_ANY_CHAIN = Strategy("ngram", num_draft_tokens=2)

Kind = tuple[int | None, bool]
"""Suffix match length of a request, None if unknown, and whether it is sampled."""
Mix = Mapping[Kind, int]
"""How many requests of a batch are of each kind."""


def mix_of(batch_size: int, match_lengths: Sequence[int] = (), sampled: Sequence[bool] = ()) -> Mix:
    """Return the mix of a batch; for empty arguments see `Observation`."""
    if not match_lengths and not sampled:
        return {(None, False): batch_size}
    return Counter(_kinds(batch_size, match_lengths, sampled))


def _kinds(
    batch_size: int, match_lengths: Sequence[int], sampled: Sequence[bool]
) -> Iterable[Kind]:
    lengths: Sequence[int | None] = match_lengths or [None] * batch_size
    return zip(lengths, sampled or [False] * batch_size, strict=True)


@dataclass(slots=True)
class _Term:
    """A Gaussian belief that widens with time."""

    mean: float
    variance: float
    drift: float
    updated: int = 0

    def variance_at(self, now: int) -> float:
        """Return its variance at step `now`."""
        return min(MAX_VARIANCE, self.variance + self.drift * (now - self.updated))


@dataclass(slots=True)
class _DrafterBelief:
    """The terms of one drafter."""

    level: _Term
    by_depth: list[_Term] = field(default_factory=list)
    by_strategy: dict[Strategy, list[_Term]] = field(default_factory=dict)

    def terms(self, strategy: Strategy, depth: int) -> tuple[_Term, _Term, _Term]:
        """Return the three terms whose sum is the strategy's acceptance at `depth`."""
        while len(self.by_depth) <= depth:
            self.by_depth.append(_Term(-0.1 * len(self.by_depth), 0.1, SLOW_DRIFT))
        own = self.by_strategy.setdefault(strategy, [])
        while len(own) <= depth:
            # Chains are the baseline that trees are measured by.
            chain = strategy.topk == 1
            gain = math.log(1 + BRANCH_GAIN * math.log2(strategy.topk))
            own.append(_Term(gain, 0.001 if chain else 0.1, 0.0 if chain else SLOW_DRIFT))
        return self.level, self.by_depth[depth], own[depth]


class Acceptance:
    """The acceptance of every drafter."""

    def __init__(self) -> None:
        self._beliefs: dict[tuple[str, bool], _DrafterBelief] = {}  # name, whether it is sampled

    def observe(self, step: Observation, now: int) -> None:
        """Learn from the accepted drafts and the match outcomes of a step, at step number `now`."""
        strategy, depth = step.strategy, depth_of(step.strategy)
        outcomes = [(count, count < depth) for count in step.accepted]
        # Requests of one step may have had different drafters; each learns from its own.
        by_drafter: dict[tuple[str, bool], list[tuple[int, bool]]] = {}
        kinds = _kinds(len(outcomes), step.match_lengths, step.sampled)
        for index, (length, sampled) in enumerate(kinds):
            if (drafter := _drafter(strategy, length)) is not None:
                by_drafter.setdefault((drafter, sampled), []).append(outcomes[index])
            if length and step.match_outcomes and not uses_match(strategy, length):
                matched = by_drafter.setdefault((_ngram(length), sampled), [])
                matched.append(step.match_outcomes[index])
        for key, own_outcomes in by_drafter.items():
            own = key[0] == strategy.drafter
            _learn(self._belief(*key), strategy if own else _ANY_CHAIN, own_outcomes, now)

    def tokens(self, strategy: Strategy, mix: Mix, now: int, shift: float = 0.0) -> float:
        """Return the tokens that a step is expected to commit over all requests of a batch.

        `off` commits one for each. With `shift` the acceptance is taken that many standard
        deviations off its mean.
        """
        drafters: Counter[tuple[str | None, bool]] = Counter()
        for (length, sampled), count in mix.items():
            drafters[_drafter(strategy, length), sampled] += count
        total = 0.0
        for (name, sampled), count in drafters.items():
            belief = None if name is None else self._belief(name, sampled)
            total += count * (1.0 if belief is None else _length(belief, strategy, now, shift))
        return total

    def _belief(self, name: str, sampled: bool) -> _DrafterBelief:
        key = name, sampled
        if key not in self._beliefs:
            level = NGRAM_LEVELS.get(name, 0.0)
            self._beliefs[key] = _DrafterBelief(_Term(level, MAX_VARIANCE, LEVEL_DRIFT))
        return self._beliefs[key]


def _length(belief: _DrafterBelief, strategy: Strategy, now: int, shift: float) -> float:
    """Return the expected accept length of `strategy` with a drafter."""
    total = reach = 1.0
    for depth in range(depth_of(strategy)):
        level, by_depth, own = belief.terms(strategy, depth)
        at = level.mean + by_depth.mean + own.mean
        if shift:
            at += shift * math.sqrt(sum(t.variance_at(now) for t in (level, by_depth, own)))
        reach *= 1.0 - math.exp(-math.exp(at))
        total += reach
    return total


def _learn(
    belief: _DrafterBelief, strategy: Strategy, outcomes: Sequence[tuple[int, bool]], now: int
) -> None:
    """Update a drafter by outcomes (accepted drafts, whether the next one was rejected)."""
    for depth in range(max(count + failed for count, failed in outcomes)):
        hits = sum(count > depth for count, _ in outcomes)
        trials = hits + sum(count == depth and failed for count, failed in outcomes)
        if not trials:
            return
        weight = 1 + CORRELATED_WEIGHT * (min(trials, MAX_TRIALS) - 1)
        _update(belief.terms(strategy, depth), hits / trials, weight, now)


def _update(terms: Sequence[_Term], hit_rate: float, trials: float, now: int) -> None:
    """Take one Kalman step: a share `hit_rate` of `trials`, predicted by the sum of `terms`."""
    # The prediction, and how it moves with the sum.
    variances = [term.variance_at(now) for term in terms]
    rate = math.exp(min(2.0, max(-5.0, sum(term.mean for term in terms))))
    predicted = 1.0 - math.exp(-rate)
    slope = rate * (1.0 - predicted)
    # Binomial noise, linearised at the prediction.
    spread = max(1e-4, predicted * (1.0 - predicted))
    information = trials * slope * slope / spread
    gradient = trials * (hit_rate - predicted) * slope / spread
    # Every term moves by its share of the variance.
    total = 1.0 + information * sum(variances)
    for term, variance in zip(terms, variances, strict=True):
        term.mean += variance * gradient / total
        term.variance = variance - variance * variance * information / total
        term.updated = now


def _drafter(strategy: Strategy, match_length: int | None) -> str | None:
    """Return who drafts for a request with this match length, or None if nobody does."""
    if match_length is None:
        return None if strategy.drafter == "off" else strategy.drafter
    if uses_match(strategy, match_length):
        return _ngram(match_length)
    return None if strategy.drafter in ("off", "ngram") else strategy.drafter


def _ngram(match_length: int) -> str:
    return f"ngram after {match_length}"
