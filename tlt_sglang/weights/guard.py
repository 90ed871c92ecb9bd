"""A sequential test: is the drafter that was just swapped in worse than the one before?

Pure: no clock, no torch. Runs in the engine, and may be asked after every verify step. The
difficulty at batch size 1 is the text: one request is easier to draft for than another for as long
as it runs, so a thousand verify steps of a hard request are little evidence against a drafter. The
model accounts for that. The accepted drafts y of a request, in units of their dispersion, are
Poisson with mean e * r * expected, where `expected` is what the drafter before would have had in
the same verify steps of the same strategies, r is the ratio of the new drafter to it (1: as good),
and e is the request's ease, a gamma variable with mean 1. With its shape a and rate b, the log
likelihood ratio of r to 1 is

    (a + y) log((b + expected) / (b + r * expected)) + y log r

and requests add up (the negative binomial law). The ease of a request that was running before the
swap is partly known: a and b have grown by its accepted and expected drafts until then.

Such a ratio is a martingale where r is 1, and so is the mean of several. It exceeds 1 / ERROR with
probability at most ERROR, however often one looks (Ville 1939). The opposite ratio ends the test
the other way (Wald 1945). CAUTION accounts for the uncertainty of the baseline.

The probabilities are those of the model. In simulations that deviate from it (chains, ease that
drifts within a request), 0 to 3 % of equally good drafters are rolled back, mostly none; a drafter
that gets nothing right is rolled back after 15 to 30 verify steps. docs/internals/hot-swap.md has
the figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from tlt_sglang.weights.baseline import Baseline, Spread

Verdict = Literal["keep", "roll back", "undecided"]

ERROR = 0.01
"""Probability of rolling back a drafter that is as good as the one before."""
FALSE_KEEP = 0.05
"""Probability of keeping early a drafter that accepts WORSE[0] times as many drafts."""
WORSE = (0.8, 0.5, 0.1)
"""Ratios of accepted drafts that the test looks for; "worse" means the first one."""
MOST_VERIFY_STEPS = 4096
"""Verify steps after which a drafter is kept unless it has been shown to be worse."""
MOST_SHAPE = 24.0
"""Upper bound of a gamma's shape learned from one request: ease drifts as its text goes on."""


@dataclass(slots=True)
class _Evidence:
    """Evidence of one request, or of all of them."""

    accepted: float = 0.0
    expected: float = 0.0
    ratios: list[float] = field(default_factory=lambda: [0.0] * len(WORSE))
    """Log likelihood ratio of each of WORSE to 1."""
    good: float = 0.0
    """Log likelihood ratio of 1 to the first of WORSE."""

    def worse(self) -> float:
        """Return the log of the mean of the ratios."""
        top = max(self.ratios)
        return top + math.log(sum(math.exp(one - top) for one in self.ratios) / len(self.ratios))

    def replace(self, old: _Evidence, new: _Evidence) -> None:
        """Count `new` instead of `old`."""
        self.accepted += new.accepted - old.accepted
        self.expected += new.expected - old.expected
        self.good += new.good - old.good
        self.ratios = [
            total + one - other
            for total, one, other in zip(self.ratios, new.ratios, old.ratios, strict=True)
        ]


class Guard:
    """Watches one swap. `before` is the baseline of the replaced drafter."""

    def __init__(self, before: Baseline, most_verify_steps: int = MOST_VERIFY_STEPS) -> None:
        self._means = before.means()
        self._before = {name: before.scaled(name, self._means) for name in before.requests()}
        self._spread = Spread.of(list(self._before.values()))
        self._most_verify_steps = most_verify_steps
        self._each: dict[str, _Evidence] = {}
        self._all = _Evidence()
        self.after = Baseline()
        """Baseline of the new drafter, by which the next swap is judged if this one is kept."""
        self.verify_steps = 0
        self.verdict: Verdict = "undecided"

    def observe(
        self, request: str, verify_steps: int, accepted: int, strategy: str = ""
    ) -> Verdict:
        """Add verify steps of a request since the swap; return the verdict, final once made.

        A strategy without a baseline counts only towards `most_verify_steps`.
        """
        self.after.observe(request, verify_steps, accepted, strategy)
        if self.verdict == "undecided":
            self.verify_steps += verify_steps
            if strategy in self._means:
                new = self._weigh(request)
                self._all.replace(self._each.get(request, _Evidence()), new)
                self._each[request] = new
            self.verdict = self._decide()
        return self.verdict

    def figures(self) -> dict[str, float]:
        """Return the figures for a note; `ratio` is accepted over expected drafts."""
        total = self._all
        return {
            "verify_steps": self.verify_steps,
            "requests": len(self._each),
            "ratio": round(total.accepted / total.expected, 3) if total.expected else 1.0,
            "evidence": round(total.worse(), 2),
        }

    def _decide(self) -> Verdict:
        if self._all.worse() >= -math.log(ERROR):
            return "roll back"
        if self._all.good >= -math.log(FALSE_KEEP) or self.verify_steps >= self._most_verify_steps:
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
        """Return the log likelihood ratio of `ratio` to 1, with expected drafts times `scale`."""
        accepted_before, expected_before = self._before.get(request, (0.0, 0.0))
        shape = self._spread.shape + accepted_before
        rate = self._spread.shape + expected_before * scale
        if shape > MOST_SHAPE and expected_before:
            shape, rate = MOST_SHAPE, rate * MOST_SHAPE / shape
        expected *= scale
        log = math.log((rate + expected) / (rate + ratio * expected))
        return (shape + accepted) * log + accepted * math.log(ratio)
