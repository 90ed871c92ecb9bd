"""Compare sides that were measured in turn: runs, pairs of runs, medians and spreads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

Case = TypeVar("Case")


@dataclass(frozen=True)
class Run:
    """One measurement."""

    part: str
    side: str
    """The system that was measured, one of those that the part compares."""
    repetition: int
    case: int
    """Index of the prompt or batch within the repetition."""
    seconds: float
    tokens: int
    """Tokens generated in these seconds, over all requests."""
    steps: int
    """Steps of the engine in these seconds if there is a single request; else as `tokens`."""
    prompt_tokens: int = 0
    output: str = ""
    """Digest of the generated token ids, which shows if two sides generated the same."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens generated a second, over all requests."""
        return self.tokens / self.seconds

    @property
    def step_ms(self) -> float:
        """Milliseconds that a step took on average."""
        return 1000 * self.seconds / self.steps


@dataclass(frozen=True)
class Spread:
    """The median of some figures, and how far they lie apart."""

    median: float
    min: float
    max: float
    count: int

    def as_json(self) -> dict[str, float | int]:
        """Return the fields, rounded to four digits after the point."""
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in dataclasses.asdict(self).items()
        }


def spread(values: Sequence[float]) -> Spread:
    """Return the spread of `values`; raise ValueError if there are none."""
    if not values:
        raise ValueError("no values to take the median of")
    return Spread(float(statistics.median(values)), min(values), max(values), len(values))


def quantile(ascending: Sequence[float], share: float) -> float:
    """Return the quantile of values in ascending order, 0.0 if there are none."""
    if not ascending:
        return 0.0
    return ascending[min(len(ascending) - 1, int(share * len(ascending)))]


def interleave(
    repetitions: int, cases: Sequence[Case], sides: Sequence[str]
) -> Iterator[tuple[int, int, Case, str]]:
    """Yield (repetition, index, case, side), the sides next to each other: A B A B.

    Other load of the machine, and its clock as it warms up, then affect all sides alike.
    """
    for repetition in range(repetitions):
        for index, case in enumerate(cases):
            for side in sides:
                yield repetition, index, case, side


def paired(
    runs: Sequence[Run], over: str, under: str, value: Callable[[Run], float]
) -> list[float]:
    """Return `value` of `over` divided by that of `under`, for each repetition and case of both."""
    sides: dict[str, dict[tuple[int, int], float]] = {over: {}, under: {}}
    for run in runs:
        if run.side in sides:
            sides[run.side][run.repetition, run.case] = value(run)
    return [sides[over][key] / below for key, below in sides[under].items() if key in sides[over]]


def agreement(runs: Sequence[Run], one: str, other: str) -> float:
    """Return the share of pairs in which both sides generated the very same tokens."""
    outputs: dict[tuple[int, int], list[str]] = {}
    for run in runs:
        if run.side in (one, other):
            outputs.setdefault((run.repetition, run.case), []).append(run.output)
    pairs = [pair for pair in outputs.values() if len(pair) == 2]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else 0.0


def digest(token_ids: Sequence[Sequence[int]]) -> str:
    """Return a short digest of the generated tokens of some requests."""
    return hashlib.sha256(json.dumps(token_ids).encode()).hexdigest()[:12]
