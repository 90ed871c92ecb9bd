"""The interface of a policy, and the policies that need no model of costs.

A policy chooses the strategy of the next decode step for a batch size, and afterwards observes what
the step committed and how long it took. Where the engine has searched its n-gram index before the
choice, the policy also gets the suffix match length of every request, in tokens. It knows, too,
which requests are sampled at a temperature, as fewer of their drafts are accepted.

Runs in the scheduler process, called by `engine.driver`. Policies are pure: no torch, no clock, no
I/O. The engine measures; a time that becomes available late (CUDA events) is observed late. The
same sequence of calls leads to the same choices, so a trace of them replays.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tlt_sglang.strategy.strategies import TRUSTED_MATCH, Strategy

AllowedStrategies = Callable[[int], Sequence[Strategy]]
"""Maps a batch size to the strategies that can run there."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One decode step of a batch."""

    strategy: Strategy
    batch_size: int
    accepted: Sequence[int]
    """Accepted drafts of each request; the bonus token is not counted. Empty if the step was a
    calibration step, which only policies with a cost model observe."""
    seconds: float
    """Wall time from the draft to the commit."""
    match_lengths: Sequence[int] = ()
    """Suffix match length of each request when the strategy was chosen; empty if unknown."""
    match_outcomes: Sequence[tuple[int, bool]] = ()
    """For each request (committed tokens that equal the continuation of its match, whether the
    token after them differs), whoever drafted; empty if unknown."""
    sampled: Sequence[bool] = ()
    """For each request, whether it is sampled at a temperature; empty if all are greedy."""

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

    def choose(
        self, batch_size: int, match_lengths: Sequence[int] = (), sampled: Sequence[bool] = ()
    ) -> Strategy:
        """Return the strategy of the next step; `sampled` as in `Observation`."""

    def observe(self, step: Observation) -> None:
        """Learn from a step, of the chosen strategy or another."""


@dataclass(frozen=True)
class Fixed:
    """Always chooses the same strategy."""

    strategy: Strategy

    def choose(
        self, batch_size: int, match_lengths: Sequence[int] = (), sampled: Sequence[bool] = ()
    ) -> Strategy:
        """Return the fixed strategy."""
        return self.strategy

    def observe(self, step: Observation) -> None:
        """Ignore the step."""


class Shuffle:
    """Chooses a random strategy for a few steps at a time: any strategy can follow any other."""

    def __init__(self, strategies: Sequence[Strategy], max_steps: int = 4, seed: int = 0) -> None:
        self._strategies, self._max_steps = list(strategies), max_steps
        self._rng = random.Random(seed)
        self._current, self._steps_to_go = self._strategies[0], 0

    def choose(
        self, batch_size: int, match_lengths: Sequence[int] = (), sampled: Sequence[bool] = ()
    ) -> Strategy:
        """Return the current strategy, or another one when its steps are over."""
        if not self._steps_to_go:
            others = [strategy for strategy in self._strategies if strategy != self._current]
            self._current = self._rng.choice(others or self._strategies)
            self._steps_to_go = self._rng.randint(1, self._max_steps)
        self._steps_to_go -= 1
        return self._current

    def observe(self, step: Observation) -> None:
        """Ignore the step."""


@dataclass(frozen=True)
class Restricted:
    """Replaces choices of `policy` that are not allowed by the first strategy that is."""

    policy: Policy
    allowed: AllowedStrategies

    def choose(
        self, batch_size: int, match_lengths: Sequence[int] = (), sampled: Sequence[bool] = ()
    ) -> Strategy:
        """Return the policy's choice where it is allowed, or where nothing is."""
        choice = self.policy.choose(batch_size, match_lengths, sampled)
        allowed = self.allowed(batch_size)
        return choice if choice in allowed or not allowed else allowed[0]

    def observe(self, step: Observation) -> None:
        """Pass the step to the policy."""
        self.policy.observe(step)


@dataclass
class Agreed:
    """The same policy on every tensor-parallel rank, of which the first rank's choice counts.

    Ranks have clocks of their own, would come to different choices, and then wait for each other
    forever. `exchange` takes this rank's choice and returns the first rank's, as indices into
    `strategies`. Each choice holds for `dwell` steps, in which nothing is exchanged, unless the
    batch size changes or a match is long.
    """

    policy: Policy
    strategies: Sequence[Strategy]
    exchange: Callable[[int], int]
    dwell: int = 1
    _choice: Strategy | None = None
    _batch_size: int = 0
    _steps: int = 0

    def choose(
        self, batch_size: int, match_lengths: Sequence[int] = (), sampled: Sequence[bool] = ()
    ) -> Strategy:
        """Return the first rank's choice."""
        self._steps += 1
        holds = self._steps < self.dwell and batch_size == self._batch_size
        matched = max(match_lengths, default=0) >= TRUSTED_MATCH
        if self._choice is None or matched or not holds:
            own = self.strategies.index(self.policy.choose(batch_size, match_lengths, sampled))
            self._choice = self.strategies[self.exchange(own)]
            self._batch_size, self._steps = batch_size, 0
        return self._choice

    def observe(self, step: Observation) -> None:
        """Pass the step to this rank's policy."""
        self.policy.observe(step)


def bucket(batch_size: int) -> int:
    """Return the bucket of a batch size, within which costs are learned together.

    Buckets are 1, 2, 3, 4, 6, 8, 12, 16, 24 ...; the result is the smallest that is not below
    `batch_size`.
    """
    size = 1
    while size < batch_size:
        half = size + size // 2
        if size > 1 and batch_size <= half:
            return half
        size *= 2
    return size
