"""The baseline that a hot swap is judged by: accepted drafts, request by request.

Pure; runs in the engine.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

REQUESTS = 512
"""Number of requests that are remembered, the most recent ones."""
EASE = 0.4
"""Coefficient of variation of a request's ease a priori, weighted as PRIOR requests."""
PRIOR = 8
LEAST_EASE = 0.1
CAUTION = 2.0
"""Standard errors by which the mean is lowered before another drafter is compared with it."""


class Baseline:
    """Counts of one drafter under one version of the target.

    Start a new baseline when the target's weights change: no drafter does as well as before then.
    """

    def __init__(self) -> None:
        self._counts: dict[str, dict[str, list[int]]] = {}  # request -> strategy -> both counts

    def observe(self, request: str, verify_steps: int, accepted: int, strategy: str = "") -> None:
        """Add the accepted drafts of some verify steps of a request, under one strategy."""
        strategies = self._counts.pop(request, {})
        count = strategies.setdefault(strategy, [0, 0])
        count[0] += verify_steps
        count[1] += accepted
        self._counts[request] = strategies
        if len(self._counts) > REQUESTS:
            del self._counts[next(iter(self._counts))]

    def means(self) -> dict[str, float]:
        """Return the accepted drafts per verify step of each strategy that has any."""
        verify_steps, accepted = Counter[str](), Counter[str]()
        for strategies in self._counts.values():
            for strategy, counts in strategies.items():
                verify_steps[strategy] += counts[0]
                accepted[strategy] += counts[1]
        return {name: count / verify_steps[name] for name, count in accepted.items() if count}

    def requests(self) -> list[str]:
        """Return the requests that are remembered."""
        return list(self._counts)

    def scaled(self, request: str, means: dict[str, float]) -> tuple[float, float]:
        """Return (accepted, expected by `means`) of a request, over the strategies in `means`.

        Both are in units of the dispersion 1 + mean, that of a geometric law, which exceeds the
        dispersion of a chain of finite depth.
        """
        accepted = expected = 0.0
        for strategy, (verify_steps, count) in self._counts.get(request, {}).items():
            if mean := means.get(strategy, 0.0):
                accepted += count / (1 + mean)
                expected += verify_steps * mean / (1 + mean)
        return accepted, expected


@dataclass(frozen=True)
class Spread:
    """The spread of ease between requests, and the uncertainty of their mean."""

    shape: float
    """Shape of the gamma law of a request's ease, whose mean is 1."""
    low: float
    """Factor that lowers the mean by CAUTION standard errors."""

    @staticmethod
    def of(requests: list[tuple[float, float]]) -> Spread:
        """Estimate it from (accepted, expected) of each request, by the method of moments."""
        variance = EASE**2
        total = sum(expected for _, expected in requests)
        if not total:
            return Spread(1 / variance, 1.0)
        squares = sum(expected**2 for _, expected in requests)
        count = total**2 / squares  # the number of equally long requests with as much information
        observed = sum((y - expected) ** 2 - expected for y, expected in requests) / squares
        variance = (PRIOR * variance + (count - 1) * max(0.0, observed)) / (PRIOR + count - 1)
        variance = max(variance, LEAST_EASE**2)
        error = math.sqrt(1 / total + variance / count)
        return Spread(1 / variance, math.exp(-CAUTION * error))
