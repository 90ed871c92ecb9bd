"""The simulated fleet: real decisions and clients, and faults that they have to stand."""

from __future__ import annotations

import math
import random

import pytest

from benchmarks.bench_coordinator import recorded_curves
from benchmarks.fleet_simulation.network import Network, Timeline
from benchmarks.fleet_simulation.simulation import Simulation
from tlt_sglang.coordinator.client import Client
from tlt_sglang.coordinator.world import Rules

CURVES = [[(0.0, 12), (1.0, 5), (2.0, 0)], [(0.0, 12), (3.0, 1), (4.0, 0)]]


def test_events_happen_in_the_order_of_their_times() -> None:
    timeline, happened = Timeline(), []
    timeline.at(2.0, lambda: happened.append(("b", timeline.now)))
    timeline.at(1.0, lambda: timeline.at(0.5, lambda: happened.append(("a", timeline.now))))
    timeline.at(3.0, lambda: happened.append(("c", timeline.now)))
    timeline.run(3.0)
    assert happened == [("a", 1.0), ("b", 2.0)] and timeline.now == 3.0


def test_a_fleet_trains_and_is_preempted_in_time() -> None:
    simulation = Simulation(20, CURVES, Rules(), 2e-6, seed=1)
    result = simulation.run(20.0)
    assert result.preemptions > 20
    assert result.preempt_p99_ms < 1000 * Rules().preempt
    assert result.failover_max_ms < 3000, "the coordinator is down for a second"
    assert result.forgotten == 0
    assert 0 < result.rejoin_seconds < 1.0
    assert result.received_per_s > 20 and 0 < result.busy < 0.5
    assert len(simulation.coordinator.world.names) == len(simulation.coordinator.world.members)


def test_a_coordinator_that_stays_down_has_no_members_and_stops_no_engine() -> None:
    simulation = Simulation(5, CURVES, Rules(), 2e-6, seed=2)
    simulation.timeline.run(5.0)
    assert all(member.joined for member in simulation.members)
    simulation.coordinator.die()
    simulation.timeline.run(5.0 + 2 * Rules().timeout)
    assert not any(member.joined for member in simulation.members)
    # A trainer that hears nothing stops by itself.
    assert all(getattr(member, "on_since", None) is None for member in simulation.members)


def test_a_coordinator_that_is_slow_makes_its_messages_wait() -> None:
    quick = Simulation(30, CURVES, Rules(), 1e-6, seed=3).run(6.0)
    slow = Simulation(30, CURVES, Rules(), 1e-3, seed=3).run(6.0)
    assert slow.longest_queue > quick.longest_queue
    assert slow.preempt_p50_ms > quick.preempt_p50_ms


def test_a_message_is_delayed_and_may_get_lost() -> None:
    timeline = Timeline()
    network = Network(timeline, random.Random(0))
    arrived: list[float] = []
    for _ in range(20_000):
        network.carry(0.0, lambda: arrived.append(timeline.now))
    timeline.run(10.0)
    assert 19_900 < len(arrived) < 20_000
    assert arrived[len(arrived) // 2] == pytest.approx(0.0003, rel=0.1)


def test_a_client_without_a_coordinator_sends_nothing() -> None:
    timeline = Timeline()
    network = Network(timeline, random.Random(0))
    network.receiver = type("Down", (), {"up": False})()
    client = Client("x", "e", "engine", "d", clock=lambda: timeline.now, connect=network.connect)
    client.report(1, 0, 1.0)
    timeline.run(1.0)
    assert not client.connected


def test_the_recorded_curves_end_without_requests() -> None:
    for curve in recorded_curves():
        times = [time for time, _ in curve]
        assert times == sorted(times) and curve[-1][1] == 0 and math.isclose(times[0], 0.0)
        assert max(left for _, left in curve) >= 8
