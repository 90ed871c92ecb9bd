"""How a drafter does, request by request: what a hot swap is judged by. Pure; in the engine."""

from __future__ import annotations

import math
from dataclasses import dataclass

REQUESTS = 512
"""Requests that are remembered, those heard of last."""
EASE = 0.4
"""Coefficient of variation of a request's ease before anything is known, worth PRIOR requests."""
PRIOR = 8
LEAST_EASE = 0.1
CAUTION = 2.0
"""Standard errors that the mean is lowered by before anything is held against another drafter."""


class Baseline:
    """Counts of one drafter under one version of the target; fed all the time.

    Begin a new one when the target's weights change: no drafter does as before then.
    """

    def __init__(self) -> None:
        self._counts: dict[str, dict[str, list[int]]] = {}  # request -> strategy -> both counts

    def observe(self, request: str, rounds: int, accepted: int, strategy: str = "") -> None:
        """`accepted` drafts in `rounds` verify rounds of a request, under one strategy."""
        strategies = self._counts.pop(request, {})
        count = strategies.setdefault(strategy, [0, 0])
        count[0] += rounds
        count[1] += accepted
        self._counts[request] = strategies
        if len(self._counts) > REQUESTS:
            del self._counts[next(iter(self._counts))]

    def means(self) -> dict[str, float]:
        """Accepted drafts a round of each strategy that has any."""
        totals: dict[str, list[int]] = {}
        for strategies in self._counts.values():
            for strategy, (rounds, accepted) in strategies.items():
                total = totals.setdefault(strategy, [0, 0])
                total[0] += rounds
                total[1] += accepted
        return {s: accepted / rounds for s, (rounds, accepted) in totals.items() if accepted}

    def requests(self) -> list[str]:
        """Those remembered."""
        return list(self._counts)

    def scaled(self, request: str, means: dict[str, float]) -> tuple[float, float]:
        """(accepted, expected by `means`) of a request; of strategies with a mean.

        In units of dispersion, 1 + mean: that of a geometric law, which is more than a chain of
        finite depth has.
        """
        accepted = expected = 0.0
        for strategy, (rounds, count) in self._counts.get(request, {}).items():
            if mean := means.get(strategy, 0.0):
                accepted += count / (1 + mean)
                expected += rounds * mean / (1 + mean)
        return accepted, expected


@dataclass(frozen=True)
class Spread:
    """How much requests differ, and how well their mean is known."""

    shape: float
    """Of the gamma law of a request's ease, whose mean is 1."""
    low: float
    """Factor that lowers the mean by CAUTION standard errors."""

    @staticmethod
    def of(requests: list[tuple[float, float]]) -> Spread:
        """From (accepted, expected) of each request, by the method of moments."""
        variance = EASE**2
        total = sum(expected for _, expected in requests)
        if not total:
            return Spread(1 / variance, 1.0)
        squares = sum(expected**2 for _, expected in requests)
        count = total**2 / squares  # as many requests of one length
        found = sum((y - expected) ** 2 - expected for y, expected in requests) / squares
        variance = (PRIOR * variance + (count - 1) * max(0.0, found)) / (PRIOR + count - 1)
        variance = max(variance, LEAST_EASE**2)
        error = math.sqrt(1 / total + variance / count)
        return Spread(1 / variance, math.exp(-CAUTION * error))
