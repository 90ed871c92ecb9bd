"""How a policy is asked, and what it is told. Policies are pure: no torch, no clock, no I/O.

A policy chooses the strategy of the next decode step for a batch size, and is told afterwards what
the step brought and how long it took. Where the engine has looked up its n-grams first, it also
says of each request how long the ending is that was there before (`endings`, in tokens). The engine
measures; where time is known late (CUDA events) it is told late. The same sequence of calls leads
to the same choices, so a recorded one replays.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tlt_sglang.strategy.arms import Strategy


@dataclass(frozen=True, slots=True)
class Observation:
    """One decode step of a batch."""

    strategy: Strategy
    batch_size: int
    accepted: Sequence[int]
    """Drafts accepted for each request; the token that the target adds is not counted. Empty where
    the step was only to learn what it costs, which policies with a model of costs are told."""
    seconds: float
    """Wall time from the draft to the commit."""
    endings: Sequence[int] = ()
    """Of each request, as they were when the strategy was chosen; empty where that is not known."""
    repeated: Sequence[tuple[int, bool]] = ()
    """Of each request: tokens that came again as after that ending, and whether one then did not.
    Whoever drafted; empty where that is not known."""

    @property
    def committed(self) -> int:
        """Tokens that the step committed."""
        return len(self.accepted) + sum(self.accepted)

    @property
    def reward(self) -> float:
        """Committed tokens a second."""
        return self.committed / self.seconds


class Policy(Protocol):
    """Chooses among the strategies it was made with."""

    def choose(self, batch_size: int, endings: Sequence[int] = ()) -> Strategy:
        """The strategy of the next step."""

    def observe(self, seen: Observation) -> None:
        """Learn from a step, of a chosen strategy or another."""


@dataclass(frozen=True)
class Fixed:
    """Always the same strategy."""

    strategy: Strategy

    def choose(self, batch_size: int, endings: Sequence[int] = ()) -> Strategy:
        return self.strategy

    def observe(self, seen: Observation) -> None:
        pass


class Shuffle:
    """A random strategy, for a few steps each: to show that any can follow any other."""

    def __init__(self, strategies: Sequence[Strategy], most_steps: int = 4, seed: int = 0) -> None:
        self._strategies, self._most = list(strategies), most_steps
        self._chance = random.Random(seed)
        self._current, self._left = self._strategies[0], 0

    def choose(self, batch_size: int, endings: Sequence[int] = ()) -> Strategy:
        if not self._left:
            others = [arm for arm in self._strategies if arm != self._current]
            self._current = self._chance.choice(others or self._strategies)
            self._left = self._chance.randint(1, self._most)
        self._left -= 1
        return self._current

    def observe(self, seen: Observation) -> None:
        pass


@dataclass(frozen=True)
class Restricted:
    """`policy`, but where its choice is not possible, the first strategy that is."""

    policy: Policy
    possible: Callable[[int], Sequence[Strategy]]

    def choose(self, batch_size: int, endings: Sequence[int] = ()) -> Strategy:
        chosen, possible = self.policy.choose(batch_size, endings), self.possible(batch_size)
        return chosen if chosen in possible or not possible else possible[0]

    def observe(self, seen: Observation) -> None:
        self.policy.observe(seen)


@dataclass(frozen=True)
class Agreed:
    """The same policy on every tensor-parallel rank, of which the first one's choice counts.

    Ranks have clocks of their own and would come to choose differently, and wait for each other for
    ever. `exchange` takes this rank's choice and gives back the first one's, as places in
    `strategies`.
    """

    policy: Policy
    strategies: Sequence[Strategy]
    exchange: Callable[[int], int]

    def choose(self, batch_size: int, endings: Sequence[int] = ()) -> Strategy:
        own = self.strategies.index(self.policy.choose(batch_size, endings))
        return self.strategies[self.exchange(own)]

    def observe(self, seen: Observation) -> None:
        self.policy.observe(seen)


def bucket(batch_size: int) -> int:
    """The batch sizes that are learned about together: 1, 2, 3, 4, 6, 8, 12, 16, 24 ...

    The smallest of these that is not below `batch_size`.
    """
    size = 1
    while size < batch_size:
        half = size + size // 2
        if size > 1 and batch_size <= half:
            return half
        size *= 2
    return size
