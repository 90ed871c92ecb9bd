"""A run of the simulated fleet: rollouts, failures, and how the coordinator deals with both."""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.fleet_simulation.coordinator import Coordinator
from benchmarks.fleet_simulation.members import Curve, Engine, Fleet, Member, Stack, Trainer
from benchmarks.fleet_simulation.network import Network, Timeline
from benchmarks.harness.statistics import quantile
from tlt_sglang.coordinator import messages
from tlt_sglang.coordinator.states import Event, step
from tlt_sglang.coordinator.world import Rules, World

KILLED = 0.001
"""Share of the engines and trainers that is killed each second."""
COORDINATOR_DIES = 0.5
"""When the coordinator is killed, as a share of the run."""
COORDINATOR_DOWNTIME = 1.0
"""Seconds until it is started again."""
MESSAGE = 0.2
"""Seconds before its death from which on what was reported may not have been acted upon."""


@dataclass(frozen=True)
class SimulationResult:
    """The figures of a run with one number of engines."""

    engines: int
    seconds: float
    """The virtual length of the run."""
    preemptions: int
    preempt_p50_ms: float
    preempt_p99_ms: float
    preempt_max_ms: float
    failover_preemptions: int
    """Preemptions whose cause came while no coordinator knew the members; not among the above."""
    failover_max_ms: float
    late: int
    """Stops that were not confirmed in time, since the coordinator's second start."""
    killed: int
    """Engines and trainers that were killed."""
    forgotten: int
    """Messages of members that the coordinator had removed although they were alive."""
    rejoin_seconds: float
    """From the coordinator's second start until it knew 99 % of the members again."""
    received_per_s: float
    """Messages that reached the coordinator."""
    sent_per_s: float
    message_us: float
    """Mean time of one core for a received message, with all that it causes and with ZMQ."""
    busy: float
    """Share of one core that the coordinator took."""
    longest_queue: int
    """The most messages that waited for it."""
    memory_mb: float
    """Memory of its knowledge."""


class Simulation:
    """A coordinator, an RL stack, and as many engines and trainers as wanted."""

    def __init__(
        self, engines: int, curves: Sequence[Curve], rules: Rules, socket: float, seed: int
    ) -> None:
        self.dice, self.timeline = random.Random(seed), Timeline()
        network = Network(self.timeline, self.dice)
        self.coordinator = Coordinator(network, rules, socket)
        self.fleet = Fleet(network, self.dice, curves)
        stack = Stack(self.fleet, 0)
        self.engines = [Engine(self.fleet, number) for number in range(engines)]
        stack.engines = self.engines
        trainers = [Trainer(self.fleet, one.number, one, stack) for one in self.engines]
        self.members: list[Member] = [*self.engines, *trainers]
        self.killed, self.rejoin_seconds = 0, float("nan")

    def run(self, seconds: float) -> SimulationResult:
        """Let so many virtual seconds pass."""
        dies = COORDINATOR_DIES * seconds
        self.timeline.at(dies, self.coordinator.die)
        self.timeline.at(dies + COORDINATOR_DOWNTIME, self._restart)
        self.timeline.at(1.0, self._kill_some)
        self.timeline.run(seconds)
        one, again = self.coordinator, dies + COORDINATOR_DOWNTIME + self.rejoin_seconds
        during = [took for at, took in self.fleet.preempted if dies - MESSAGE <= at < again]
        times = sorted(
            took for at, took in self.fleet.preempted if not dies - MESSAGE <= at < again
        )
        return SimulationResult(
            engines=len(self.engines),
            seconds=seconds,
            preemptions=len(times),
            preempt_p50_ms=1000 * quantile(times, 0.5),
            preempt_p99_ms=1000 * quantile(times, 0.99),
            preempt_max_ms=1000 * times[-1],
            failover_preemptions=len(during),
            failover_max_ms=1000 * max(during, default=0.0),
            late=one.world.late,
            killed=self.killed,
            forgotten=one.forgotten,
            rejoin_seconds=self.rejoin_seconds,
            received_per_s=one.received / seconds,
            sent_per_s=one.sent / seconds,
            message_us=1e6 * one.busy / one.received,
            busy=one.busy / seconds,
            longest_queue=one.longest_queue,
            memory_mb=memory_mb(len(self.engines)),
        )

    def _kill_some(self) -> None:
        for member in self.members:
            if self.dice.random() < KILLED:
                self.killed += member.up
                member.kill()
        self.timeline.at(self.timeline.now + 1.0, self._kill_some)

    def _restart(self) -> None:
        self.coordinator.start()
        self._look(self.timeline.now)

    def _look(self, began: float) -> None:
        """Look every 10 ms whether the coordinator knows its members again."""
        if len(self.coordinator.world.members) >= 0.99 * len(self.members):
            self.rejoin_seconds = self.timeline.now - began
        else:
            self.timeline.at(self.timeline.now + 0.01, lambda: self._look(began))


def memory_mb(engines: int) -> float:
    """Return the MB that the knowledge of so many engines with a trainer each takes."""
    gc.collect()
    tracemalloc.start()
    world, rules = World(), Rules()
    for number in range(engines):
        device = f"device-{number}"
        for role in ("engine", "trainer"):
            hello = messages.Hello(f"{role}-{number}", role, device)
            step(world, Event(0.0, f"6d{hello.name:0>32}", hello), rules)
        step(world, Event(0.0, f"6d{f'engine-{number}':0>32}", messages.Load(0, 0, 0.0)), rules)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size / 1e6
