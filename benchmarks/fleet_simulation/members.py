"""The simulated members: engines with recorded loads, trainers, and the RL stack that drives both.

Each is the real `tlt_sglang.coordinator.client.Client` with a clock of its own, which is wrong and
too fast or too slow.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.fleet_simulation.network import Network
from tlt_sglang.coordinator import messages
from tlt_sglang.coordinator.client import Client

ENGINE_INTERVAL = 0.25
"""Seconds between two reports of an engine whose load does not change."""
TRAINER_INTERVAL = 0.1
"""Seconds between two looks of a trainer that is off."""
MICRO_BATCH = (0.02, 0.15)
"""The shortest and the longest micro-batch, in seconds: a trainer stops only between two."""
IN_FLIGHT = 0.1
"""Seconds that a start may take to arrive; new work before that stops what it started, too."""
STEP_PAUSE = 3.0
"""Seconds between two rollouts, in which the policy is trained."""
RUNNING = 8
"""Requests that an engine runs at the same time."""
MORE = 0.3
"""Share of the engines that get more requests when they have finished their own."""
CLOCK_ERROR, CLOCK_DRIFT = 3600.0, 2e-4
"""Largest error of a clock, in seconds, and of its rate."""
DOWNTIME = 2.0
"""Seconds until a member that was killed is started again."""

Curve = Sequence[tuple[float, int]]
"""Seconds since a rollout's beginning, and the requests that are unfinished from then on."""


@dataclass
class Fleet:
    """The network, the dice and the load curves that all members share."""

    network: Network
    dice: random.Random
    curves: Sequence[Curve]
    preempted: list[tuple[float, float]] = field(default_factory=list)
    """When an engine got new work, and the seconds until its trainer confirmed that it stopped."""

    def client(self, name: str, role: messages.Role, device: str | None) -> Client:
        """Return a client with a clock of its own."""
        error = self.dice.uniform(-CLOCK_ERROR, CLOCK_ERROR)
        rate = 1 + self.dice.uniform(-CLOCK_DRIFT, CLOCK_DRIFT)
        timeline = self.network.timeline
        return Client(
            "simulated",
            name,
            role,
            device,
            clock=lambda: error + rate * timeline.now,
            connect=self.network.connect,
        )

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        """Have `event` happen so many seconds from now."""
        self.network.timeline.at(self.network.timeline.now + seconds, event)


class Member(ABC):
    """A process with a client, which can be killed; it is started again after a while."""

    role: messages.Role
    interval: float

    def __init__(self, fleet: Fleet, number: int) -> None:
        self.fleet, self.number, self.lives = fleet, number, 0
        self.client: Client
        self.up = False
        self.start()

    @property
    def joined(self) -> bool:
        """Return whether the coordinator has this member."""
        return self.up and self.client.connected

    def start(self) -> None:
        """Begin, or begin again."""
        self.lives += 1
        self.up = True
        name = f"{self.role}-{self.number}"
        self.client = self.fleet.client(name, self.role, f"device-{self.number}")
        life = self.lives
        self.fleet.after(self.fleet.dice.uniform(0, 0.5), lambda: self._turn(life))

    def kill(self) -> None:
        """End without a word."""
        if self.up:
            self.up = False
            self.fleet.after(DOWNTIME, self.start)

    @abstractmethod
    def turn(self) -> float:
        """Do what is to be done now, and return the seconds until the next time."""

    def _turn(self, life: int) -> None:
        if self.up and life == self.lives:
            self.fleet.after(self.turn(), lambda: self._turn(life))


class Engine(Member):
    """An engine, whose load follows the curves that it is given."""

    role: messages.Role = "engine"
    unfinished = 0
    busy_since: float | None = None

    def kill(self) -> None:
        super().kill()
        self.unfinished, self.busy_since = 0, None

    def rollout(self) -> None:
        """Get the share of a rollout that is about to begin, some time in the next half second."""
        self.fleet.after(self.fleet.dice.uniform(0, 0.5), lambda: self._begin(MORE))

    def _begin(self, more: float) -> None:
        """Get requests, and perhaps more of them after those."""
        dice = self.fleet.dice
        stretch = dice.lognormvariate(0, 0.3)
        curve = dice.choice(self.fleet.curves)
        life = self.lives
        for seconds, left in curve:
            self.fleet.after(stretch * seconds, lambda left=left: self._set(life, left))  # type: ignore[misc]
        if dice.random() < more:
            pause = dice.uniform(0.5, 4.0)
            self.fleet.after(stretch * curve[-1][0] + pause, lambda: self._begin(0.0))

    def _set(self, life: int, unfinished: int) -> None:
        """Change the load, unless the process that had the requests is gone."""
        if not self.up or life != self.lives:
            return
        if not self.unfinished and unfinished:
            self.busy_since = self.fleet.network.timeline.now
        elif not unfinished:
            self.busy_since = None
        self.unfinished = unfinished
        self.turn()

    def turn(self) -> float:
        running = min(RUNNING, self.unfinished)
        self.client.report(running, self.unfinished - running, 50.0 * running)
        return ENGINE_INTERVAL


class Trainer(Member):
    """A trainer beside an engine."""

    role: messages.Role = "trainer"

    def __init__(self, fleet: Fleet, number: int, engine: Engine, stack: Stack) -> None:
        self.engine, self.stack = engine, stack
        super().__init__(fleet, number)

    def start(self) -> None:
        self.on_since: float | None = None
        super().start()

    def turn(self) -> float:
        for instruction in self.client.poll():
            if isinstance(instruction, messages.Start):
                self.on_since = self.fleet.network.timeline.now
            elif isinstance(instruction, messages.Kill):
                self.kill()
            else:
                self._stop(instruction)
        return TRAINER_INTERVAL if self.on_since is None else self.fleet.dice.uniform(*MICRO_BATCH)

    def _stop(self, instruction: messages.Instruction) -> None:
        by_coordinator = isinstance(instruction, messages.Stop) and instruction.seq
        causes = [at for at in (self.engine.busy_since, self.stack.began) if at is not None]
        if self.on_since is not None and by_coordinator:
            # A stop also follows from a coordinator that is new, or an engine that is gone.
            recent = [at for at in causes if at >= self.on_since - IN_FLIGHT]
            if recent:
                seconds = self.fleet.network.timeline.now - min(recent)
                self.fleet.preempted.append((min(recent), seconds))
        self.on_since = None
        self.client.confirm_stop()


class Stack(Member):
    """An RL stack, which begins a rollout, waits for its end, trains, and begins the next one."""

    role: messages.Role = "stack"
    began: float | None = None
    """When the present rollout began."""
    engines: Sequence[Engine] = ()

    def start(self) -> None:
        self.lives += 1
        self.up = True
        self.client = self.fleet.client("rl", "stack", None)
        self.fleet.after(2.0, self._begin)
        self.fleet.after(0.1, self._poll)

    def turn(self) -> float:
        self.client.poll()
        return 0.1

    def _poll(self) -> None:
        self.fleet.after(self.turn(), self._poll)

    def _begin(self) -> None:
        self.began = self.fleet.network.timeline.now
        self.client.tell("rollout_begins")
        for engine in self.engines:
            engine.rollout()
        self.fleet.after(1.0, self._wait)

    def _wait(self) -> None:
        if any(engine.unfinished for engine in self.engines):
            return self.fleet.after(0.25, self._wait)
        self.began = None
        self.client.tell("rollout_ends")
        return self.fleet.after(STEP_PAUSE, self._begin)
