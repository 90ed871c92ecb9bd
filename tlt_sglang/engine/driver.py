"""The driver: asks the policy when a decode step begins, and reports to it how the step went.

The time of a step lasts to the beginning of the next one, so that the scheduler's work between two
steps counts, of which a strategy that needs fewer steps has less. Where the engine did something
else in between (a prefill, or waiting for requests) it lasts to the end of the step's own work.

During a calibration the batches are not those of users: all strategies take turns, and the policy
observes what their steps cost and nothing about accepted drafts.

Plain decoding of many requests comes in runs: the policy is asked only for the first of a few
steps, and observes only that one. Selection pays least there and costs most, because every step
reads all weights, and what runs between two of them begins with cold caches.

Runs in the scheduler process. It does not switch strategies and does not draft.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tlt_sglang.engine.clocks import Clock, Moment, Wall
from tlt_sglang.strategy.policy import AllowedStrategies, Observation, Policy, bucket
from tlt_sglang.strategy.strategies import Strategy

MAX_GAP = 0.5
"""Largest gap between two steps that counts as the scheduler's work, as a share of the step."""
IN_FLIGHT = 8
"""Steps whose outcome or time may be unknown: overlap scheduling leaves one or two open, and
events of a GPU are read late."""
PLAIN = Strategy("off")
PLAIN_RUN = 4
"""Plain steps of more than SMALL_BATCH requests that share one selection."""
SMALL_BATCH = 8


@dataclass(slots=True)
class _TimedStep:
    """A step whose time or outcome is not known yet."""

    strategy: Strategy
    batch_size: int
    start: Moment
    end: Moment = None
    """The end of the step's own work."""
    next_start: Moment = None
    accepted: Sequence[int] | None = None
    match_lengths: Sequence[int] = ()
    match_outcomes: Sequence[tuple[int, bool]] = ()
    sampled: Sequence[bool] = ()
    calibrates: bool = False
    selected: bool = True
    """False for forced steps and the later ones of a plain run, which the policy does not
    observe."""


class Driver:
    """The driver of one engine; with `plain_runs`, plain steps of many requests come in runs."""

    def __init__(
        self, policy: Policy, clock: Clock | None = None, plain_runs: bool = False
    ) -> None:
        self._policy, self._clock = policy, clock or Wall()
        self._steps: deque[_TimedStep] = deque(maxlen=IN_FLIGHT)
        self.pinned_strategy: Strategy | None = None
        """Replaces the policy's choice; the policy goes on learning."""
        self._calibrated: AllowedStrategies | None = None
        self._turns = 0
        self._plain_runs, self._run_steps, self._run_size = plain_runs, 0, 0

    def skips_selection(self, batch_size: int) -> bool:
        """Return whether the next step, of so many requests, continues a plain run."""
        same_size = bucket(batch_size) == self._run_size
        return self._run_steps > 0 and same_size and self.pinned_strategy is None

    def begin(
        self,
        batch_size: int,
        match_lengths: Sequence[int] = (),
        forced: Strategy | None = None,
        sampled: Sequence[bool] = (),
    ) -> Strategy:
        """Begin a decode step and return its strategy; for the arguments see `Policy`.

        A `forced` strategy replaces any other, and the policy does not observe the step.
        """
        # The beginning of this step is the end of the one before.
        now = self._clock.mark()
        if self._steps and self._steps[-1].next_start is None:
            self._steps[-1].next_start = now
            self._report()
        # Its strategy: forced, of the plain run, pinned, next in the calibration, or the policy's.
        if forced is not None:
            step = _TimedStep(forced, batch_size, now, selected=False)
        elif self.skips_selection(batch_size):
            self._run_steps -= 1
            step = _TimedStep(PLAIN, batch_size, now, selected=False)
        else:
            strategy = self.pinned_strategy or self._next_turn(batch_size)
            strategy = strategy or self._policy.choose(batch_size, match_lengths, sampled)
            step = _TimedStep(
                strategy,
                batch_size,
                now,
                match_lengths=match_lengths,
                calibrates=self.calibrating,
            )
            self._begin_run(step)
        self._steps.append(step)
        return step.strategy

    def _begin_run(self, step: _TimedStep) -> None:
        begins = step.strategy == PLAIN and step.batch_size > SMALL_BATCH and not step.calibrates
        self._run_steps = PLAIN_RUN - 1 if self._plain_runs and begins else 0
        self._run_size = bucket(step.batch_size)

    def calibrate(self, allowed: AllowedStrategies | None) -> None:
        """Let the `allowed` strategies of a batch size take turns from now on; None ends it.

        A turn is one step, so that a disturbance of the machine affects all of them.
        """
        self._calibrated, self._turns, self._run_steps = allowed, 0, 0

    @property
    def calibrating(self) -> bool:
        """True while the strategies take turns."""
        return self._calibrated is not None

    def _next_turn(self, batch_size: int) -> Strategy | None:
        if self._calibrated is None:
            return None
        strategies = self._calibrated(batch_size)
        self._turns += 1
        return strategies[self._turns % len(strategies)]

    def restart_timer(self) -> None:
        """Exclude the time since the step began: the drafter has caught up in it."""
        if self._steps:
            self._steps[-1].start = self._clock.mark()

    def end(self, match_outcomes: Sequence[tuple[int, bool]] = ()) -> None:
        """End the work of the step that began last; for `match_outcomes` see `Observation`."""
        if self._steps:
            self._steps[-1].end = self._clock.mark()
            self._steps[-1].match_outcomes = match_outcomes

    def outcome(
        self,
        accepted: Sequence[int],
        sampled: Sequence[bool] = (),
        rows: Sequence[int] | None = None,
    ) -> tuple[Strategy, Sequence[int]] | None:
        """Record the accepted drafts of the oldest step without an outcome; for `sampled` see
        `Observation`. They are those of the requests `rows`, None for all of the step.

        Returns its strategy and match lengths, or None if it only calibrated.
        """
        for step in self._steps:
            if step.accepted is None:
                step.accepted, step.sampled = accepted, sampled
                if rows is not None and step.match_lengths:
                    step.match_lengths = [step.match_lengths[row] for row in rows]
                if rows is not None and step.match_outcomes:
                    step.match_outcomes = [step.match_outcomes[row] for row in rows]
                self._report()
                return None if step.calibrates else (step.strategy, step.match_lengths)
        return None

    def _report(self) -> None:
        """Pass the steps that are complete to the policy, oldest first."""
        while self._steps:
            step = self._steps[0]
            seconds = self._seconds(step)
            if seconds is None or step.accepted is None:
                return
            self._steps.popleft()
            if step.selected and step.accepted and seconds > 0:
                self._policy.observe(
                    Observation(
                        step.strategy,
                        step.batch_size,
                        () if step.calibrates else step.accepted,
                        seconds,
                        step.match_lengths,
                        step.match_outcomes,
                        step.sampled,
                    )
                )

    def _seconds(self, step: _TimedStep) -> float | None:
        """Return the time of a step; None while it is unknown."""
        if step.next_start is None:
            return None
        total = self._clock.seconds(step.start, step.next_start)
        work = total if step.end is None else self._clock.seconds(step.start, step.end)
        if total is None or work is None:
            return None
        return total if total <= work * (1 + MAX_GAP) else work
