"""A policy with a clock: asks it at the beginning of each decode step, tells it how the step went.

The time of a step lasts to the beginning of the next one, so that what the scheduler does between
two steps counts, which fewer steps need less of. Where the engine did something else in between (a
prefill, or it waited for requests) it lasts to the end of the step's own work.

While it calibrates, the batches are not of users: all strategies have their turn, and the policy is
told what their steps cost, and nothing about what was accepted.

Plain decoding of many requests is let be for a few steps (`rests`): nothing is looked up, nobody is
asked or told. It is there that choosing pays least, and costs most: every step reads all weights,
so what runs between two of them begins with cold caches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tlt_sglang.engine.clocks import Clock, Wall
from tlt_sglang.strategy.policy import Observation, Policy, bucket
from tlt_sglang.strategy.strategies import Strategy

MOST_BETWEEN = 0.5
"""Time between two steps that is taken for the scheduler's, as a share of the step."""
IN_FLIGHT = 8
"""Steps of which outcome or time may be missing: overlap scheduling leaves one or two open, and
events of a GPU are read late."""
PLAIN = Strategy("off")
REST = 4
"""Steps of which only the first is chosen, of plain decoding of more than FEW requests."""
FEW = 8


@dataclass(slots=True)
class _Step:
    strategy: Strategy
    batch_size: int
    began: Any
    ended: Any = None
    next: Any = None
    """When the step after it began."""
    accepted: Sequence[int] | None = None
    endings: Sequence[int] = ()
    repeated: Sequence[tuple[int, bool]] = ()
    calibrates: bool = False
    chosen: bool = True
    """Not one of a rest, of which the policy is not told."""


class Driver:
    """Of one engine. `rests`: whether plain decoding may be let be for a few steps."""

    def __init__(self, policy: Policy, clock: Clock | None = None, rests: bool = False) -> None:
        self._policy, self._clock = policy, clock or Wall()
        self._steps: deque[_Step] = deque(maxlen=IN_FLIGHT)
        self.pinned: Strategy | None = None
        """Used in the place of what the policy would choose; the policy goes on learning."""
        self._turns: Callable[[int], Sequence[Strategy]] | None = None
        self._taken = 0
        self._may_rest, self._rest, self._rest_size = rests, 0, 0

    def rests(self, batch_size: int) -> bool:
        """Whether the next step, of so many requests, goes on as the one before, unasked."""
        return self._rest > 0 and bucket(batch_size) == self._rest_size and self.pinned is None

    def begin(self, batch_size: int, endings: Sequence[int] = ()) -> Strategy:
        """A decode step begins: its strategy. `endings`: see `Policy`."""
        now = self._clock.mark()
        if self._steps and self._steps[-1].next is None:
            self._steps[-1].next = now
            self._tell()
        if self.rests(batch_size):
            self._rest -= 1
            step = _Step(PLAIN, batch_size, now, chosen=False)
        else:
            strategy = self.pinned or self._turn(batch_size)
            strategy = strategy or self._policy.choose(batch_size, endings)
            step = _Step(strategy, batch_size, now, endings=endings, calibrates=self.calibrating)
            self._begin_rest(step)
        self._steps.append(step)
        return step.strategy

    def _begin_rest(self, step: _Step) -> None:
        many = step.strategy == PLAIN and step.batch_size > FEW
        self._rest = REST - 1 if self._may_rest and many and not step.calibrates else 0
        self._rest_size = bucket(step.batch_size)

    def calibrate(self, possible: Callable[[int], Sequence[Strategy]] | None) -> None:
        """From now on the `possible` strategies of a batch size take turns, of one step each: what
        disturbs the machine disturbs all of them. None ends it."""
        self._turns, self._taken, self._rest = possible, 0, 0

    @property
    def calibrating(self) -> bool:
        """Whether strategies take turns."""
        return self._turns is not None

    def _turn(self, batch_size: int) -> Strategy | None:
        if self._turns is None:
            return None
        arms = self._turns(batch_size)
        self._taken += 1
        return arms[self._taken % len(arms)]

    def begin_again(self) -> None:
        """What was done since the step began is no part of it: a drafter has caught up."""
        if self._steps:
            self._steps[-1].began = self._clock.mark()

    def end(self, repeated: Sequence[tuple[int, bool]] = ()) -> None:
        """The work of the step that began last is done. `repeated`: see `Observation`."""
        if self._steps:
            self._steps[-1].ended = self._clock.mark()
            self._steps[-1].repeated = repeated

    def outcome(self, accepted: Sequence[int]) -> tuple[Strategy, Sequence[int]] | None:
        """Drafts accepted in the oldest step of which that is not known yet; its strategy and
        endings, or None where it only calibrated."""
        for step in self._steps:
            if step.accepted is None:
                step.accepted = accepted
                self._tell()
                return None if step.calibrates else (step.strategy, step.endings)
        return None

    def _tell(self) -> None:
        while self._steps:
            step = self._steps[0]
            seconds = self._seconds(step)
            if seconds is None or step.accepted is None:
                return
            self._steps.popleft()
            if step.chosen and step.accepted and seconds > 0:
                accepted = () if step.calibrates else step.accepted
                seen = Observation(
                    step.strategy, step.batch_size, accepted, seconds, step.endings, step.repeated
                )
                self._policy.observe(seen)

    def _seconds(self, step: _Step) -> float | None:
        """Of a step; None as long as that is not known."""
        if step.next is None:
            return None
        whole = self._clock.seconds(step.began, step.next)
        work = whole if step.ended is None else self._clock.seconds(step.began, step.ended)
        if whole is None or work is None:
            return None
        return whole if whole <= work * (1 + MOST_BETWEEN) else work
