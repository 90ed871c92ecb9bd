"""Is the drafter that was just swapped in worse than the one before? Pure: no clock, no torch.

Runs in the engine; a sequential test that may be asked after every round. What makes it hard at
batch size 1 is the text: one request is easier to draft for than another for as long as it runs, so
a thousand rounds of a hard request are little evidence against a drafter. Hence the model: the
drafts y of a request that are accepted, in units of their dispersion, are Poisson with mean
e * r * expected, where `expected` is what the drafter before would have had in the same rounds of
the same strategies, r is the new drafter's ratio to it (1: as good), and e is the request's ease, a
gamma variable with mean 1. With its shape a and rate b, the log likelihood ratio of r to 1 is

    (a + y) log((b + expected) / (b + r * expected)) + y log r

and requests add up (the negative binomial law). The ease of a request that was running before the
swap is known in part: a and b have grown by what it accepted, and what was expected of it, then.

Such a ratio is a martingale where r is 1, and so is the mean of several. It comes to exceed
1 / ERROR with a chance of at most ERROR, however often one looks (Ville 1939). The opposite ratio
ends the test the other way (Wald 1945). The uncertainty of the baseline is met by CAUTION there.

The chances are those of the model. In simulated worlds that are not of it (chains, ease that drifts
within a request) 0 to 3 % of equally good drafters are rolled back, mostly none; one that gets
nothing right goes after 15 to 30 rounds. docs/internals/hot-swap.md has the figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from tlt_sglang.weights.baseline import Baseline, Spread

Verdict = Literal["keep", "roll back", "undecided"]

ERROR = 0.01
"""Chance of rolling back a drafter that is as good as the one before."""
MISSED = 0.05
"""Chance of keeping one early that accepts WORSE[0] of the drafts."""
WORSE = (0.8, 0.5, 0.1)
"""Ratios of accepted drafts that are looked for; the first one is what "worse" means."""
MOST_ROUNDS = 4096
"""Rounds after which a drafter that is not shown to be worse is kept."""
PAIRED = 24.0
"""Most that is learnt of one request's ease, as a gamma's shape: it drifts as the text goes on."""


@dataclass(slots=True)
class _Evidence:
    """Of one request, or of all of them."""

    accepted: float = 0.0
    expected: float = 0.0
    ratios: list[float] = field(default_factory=lambda: [0.0] * len(WORSE))
    """Log likelihood ratio of each of WORSE to 1."""
    good: float = 0.0
    """Log likelihood ratio of 1 to the first of WORSE."""

    def worse(self) -> float:
        """Log of the mean of the ratios."""
        top = max(self.ratios)
        return top + math.log(sum(math.exp(one - top) for one in self.ratios) / len(self.ratios))

    def replace(self, old: _Evidence, new: _Evidence) -> None:
        """Count `new` in the place of `old`."""
        self.accepted += new.accepted - old.accepted
        self.expected += new.expected - old.expected
        self.good += new.good - old.good
        self.ratios = [
            total + one - other
            for total, one, other in zip(self.ratios, new.ratios, old.ratios, strict=True)
        ]


class Guard:
    """Watches one swap. `before` is the baseline of the drafter that went."""

    def __init__(self, before: Baseline, most_rounds: int = MOST_ROUNDS) -> None:
        self._means = before.means()
        self._before = {name: before.scaled(name, self._means) for name in before.requests()}
        self._spread = Spread.of(list(self._before.values()))
        self._most_rounds = most_rounds
        self._each: dict[str, _Evidence] = {}
        self._all = _Evidence()
        self.after = Baseline()
        """Of the new drafter: what the next swap is judged by, if this one is kept."""
        self.rounds = 0
        self.verdict: Verdict = "undecided"

    def observe(self, request: str, rounds: int, accepted: int, strategy: str = "") -> Verdict:
        """Rounds of a request since the swap -> the verdict, which does not change once made.

        Rounds of a strategy that the baseline does not know only count towards `most_rounds`.
        """
        self.after.observe(request, rounds, accepted, strategy)
        if self.verdict == "undecided":
            self.rounds += rounds
            if strategy in self._means:
                new = self._weigh(request)
                self._all.replace(self._each.get(request, _Evidence()), new)
                self._each[request] = new
            self.verdict = self._decide()
        return self.verdict

    def figures(self) -> dict[str, float]:
        """For a note: rounds, requests, accepted drafts over expected ones, log evidence."""
        seen = self._all
        return {
            "rounds": self.rounds,
            "requests": len(self._each),
            "ratio": round(seen.accepted / seen.expected, 3) if seen.expected else 1.0,
            "evidence": round(seen.worse(), 2),
        }

    def _decide(self) -> Verdict:
        if self._all.worse() >= -math.log(ERROR):
            return "roll back"
        if self._all.good >= -math.log(MISSED) or self.rounds >= self._most_rounds:
            return "keep"
        return "undecided"

    def _weigh(self, request: str) -> _Evidence:
        accepted, expected = self.after.scaled(request, self._means)
        low = self._spread.low
        worse = [self._ratio(request, accepted, expected, ratio, low) for ratio in WORSE]
        good = -self._ratio(request, accepted, expected, WORSE[0], 1.0)
        return _Evidence(accepted, expected, worse, good)

    def _ratio(
        self, request: str, accepted: float, expected: float, ratio: float, scale: float
    ) -> float:
        """The log likelihood ratio of `ratio` to 1, with everything expected times `scale`."""
        known, usual = self._before.get(request, (0.0, 0.0))
        shape, rate = self._spread.shape + known, self._spread.shape + usual * scale
        if shape > PAIRED and usual:
            shape, rate = PAIRED, rate * PAIRED / shape
        expected *= scale
        log = math.log((rate + expected) / (rate + ratio * expected))
        return (shape + accepted) * log + accepted * math.log(ratio)
