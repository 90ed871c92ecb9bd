"""The driver: when a step begins and ends, and what the policy observes of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from tlt_sglang.engine.clocks import CudaEvents, Wall
from tlt_sglang.engine.driver import IN_FLIGHT, PLAIN_RUN, SMALL_BATCH, Driver
from tlt_sglang.strategy.policy import Observation
from tlt_sglang.strategy.strategies import Strategy, parse

CHAIN, OFF = parse("eagle:3x1x4"), parse("off")


class RecordingPolicy:
    """A policy that records its calls."""

    def __init__(self, strategy: Strategy = CHAIN) -> None:
        self.strategy = strategy
        self.steps: list[Observation] = []
        self.batch_sizes: list[int] = []

    def choose(
        self, batch_size: int, match_lengths: Sequence[int] = (), sampled: Sequence[bool] = ()
    ) -> Strategy:
        self.batch_sizes.append(batch_size)
        return self.strategy

    def observe(self, step: Observation) -> None:
        self.steps.append(step)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def policy() -> RecordingPolicy:
    return RecordingPolicy()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def driver(policy: RecordingPolicy, clock: Clock) -> Driver:
    return Driver(policy, Wall(clock))


def step(driver: Driver, clock: Clock, work: float, between: float, accepted: list[int]) -> None:
    driver.begin(len(accepted))
    clock.now += work
    driver.end()
    driver.outcome(accepted)
    clock.now += between


def test_a_step_lasts_to_the_beginning_of_the_next(
    driver: Driver, clock: Clock, policy: RecordingPolicy
) -> None:
    step(driver, clock, 0.03, 0.005, [3, 1])
    assert policy.steps == []
    step(driver, clock, 0.04, 0.005, [2, 2])
    (observation,) = policy.steps
    assert (observation.strategy, observation.batch_size, observation.accepted) == (
        CHAIN,
        2,
        [3, 1],
    )
    assert observation.seconds == pytest.approx(0.035)
    assert observation.committed == 6
    assert observation.reward == pytest.approx(6 / 0.035)


def test_waiting_and_prefills_do_not_count(
    driver: Driver, clock: Clock, policy: RecordingPolicy
) -> None:
    step(driver, clock, 0.03, 9.0, [0])
    step(driver, clock, 0.03, 0.0, [0])
    assert policy.steps[0].seconds == pytest.approx(0.03)


def test_the_time_to_catch_up_is_not_part_of_a_step(
    driver: Driver, clock: Clock, policy: RecordingPolicy
) -> None:
    driver.begin(1)
    clock.now += 0.7
    driver.restart_timer()
    clock.now += 0.1
    driver.end()
    driver.outcome([1])
    driver.begin(1)
    assert [round(observation.seconds, 6) for observation in policy.steps] == [0.1]


def test_outcomes_that_come_late_find_their_step(
    driver: Driver, clock: Clock, policy: RecordingPolicy
) -> None:
    """With overlap scheduling a step begins before the outcome of the one before."""
    for size in (1, 2, 3):
        driver.begin(size)
        clock.now += 0.01
        driver.end()
        if size > 1:
            driver.outcome([size - 1] * (size - 1))
    assert [
        (observation.batch_size, list(observation.accepted)) for observation in policy.steps
    ] == [(1, [1]), (2, [2, 2])]


def test_outcomes_that_never_come_are_forgotten(
    driver: Driver, clock: Clock, policy: RecordingPolicy
) -> None:
    for _ in range(5 * IN_FLIGHT):
        driver.begin(1)
        clock.now += 0.01
        driver.end()
    driver.outcome([1])
    driver.begin(1)
    assert len(policy.steps) == 1


# ---- CUDA events ---------------------------------------------------------------------------------


class Event:
    """An event as torch.cuda's; the device is `behind` the last recorded one."""

    behind = 0
    recorded = 0

    def record(self) -> None:
        Event.recorded += 1
        self.at = Event.recorded

    def query(self) -> bool:
        return self.at <= Event.recorded - Event.behind

    def elapsed_time(self, end: Event) -> float:
        assert end.query(), "nobody may wait for an event"
        return 10.0 * (end.at - self.at)


def test_events_are_read_when_they_are_due(
    policy: RecordingPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is three events behind, so that outcomes come before times."""
    monkeypatch.setattr(Event, "recorded", 0)
    monkeypatch.setattr(Event, "behind", 3)
    driver = Driver(policy, CudaEvents(Event))
    for size in range(1, 6):
        driver.begin(size)
        driver.end()
        driver.outcome([0] * size)
    assert [observation.batch_size for observation in policy.steps] == [1, 2, 3]
    assert all(observation.seconds == pytest.approx(0.01) for observation in policy.steps)
    monkeypatch.setattr(Event, "behind", 0)
    driver.begin(1)
    assert [observation.batch_size for observation in policy.steps] == [1, 2, 3, 4, 5]


def test_a_calibration_gives_every_strategy_its_turn(
    driver: Driver, clock: Clock, policy: RecordingPolicy
) -> None:
    """The policy learns what steps cost, and nothing about the drafts of dummies."""
    strategies = [parse("off"), parse("ngram:4")]
    driver.calibrate(lambda size: strategies)
    chosen = []
    turns = 3
    for _ in range(2 * turns):
        chosen.append(driver.begin(2))
        clock.now += 1.0
        driver.end()
        assert driver.outcome([3, 3]) is None
    driver.calibrate(None)
    step(driver, clock, 1.0, 0.0, [1])
    driver.begin(1)
    assert [chosen.count(strategy) for strategy in strategies] == [turns] * 2
    assert all(one != other for one, other in itertools.pairwise(chosen))
    assert [observation.strategy for observation in policy.steps] == [*chosen, CHAIN]
    assert {tuple(observation.accepted) for observation in policy.steps[:-1]} == {()}
    assert policy.steps[-1].accepted == [1]
    assert {observation.seconds for observation in policy.steps} == {1.0}


# ---- plain runs ----------------------------------------------------------------------------------

MANY = 2 * SMALL_BATCH


def running_plain(strategy: Strategy, clock: Clock) -> tuple[Driver, RecordingPolicy]:
    policy = RecordingPolicy(strategy)
    return Driver(policy, Wall(clock), plain_runs=True), policy


def test_plain_steps_of_many_requests_share_a_selection(clock: Clock) -> None:
    driver, policy = running_plain(OFF, clock)
    skips = []
    for _ in range(3 * PLAIN_RUN):
        skips.append(driver.skips_selection(MANY))
        assert driver.begin(MANY) == OFF
        clock.now += 0.01
        driver.end()
        assert driver.outcome([0] * MANY) == (OFF, ())
    assert skips == 3 * ([False] + [True] * (PLAIN_RUN - 1))
    driver.begin(MANY)
    assert policy.batch_sizes == [MANY] * 4
    assert [observation.seconds for observation in policy.steps] == [pytest.approx(0.01)] * 3


@pytest.mark.parametrize(("strategy", "size"), [(CHAIN, MANY), (OFF, SMALL_BATCH), (OFF, 1)])
def test_every_other_step_has_its_own_selection(
    clock: Clock, strategy: Strategy, size: int
) -> None:
    driver, policy = running_plain(strategy, clock)
    for _ in range(2 * PLAIN_RUN):
        step(driver, clock, 0.01, 0.0, [0] * size)
    assert policy.batch_sizes == [size] * 2 * PLAIN_RUN


@pytest.mark.parametrize("size", [1, SMALL_BATCH, MANY - MANY // 4, 2 * MANY])
def test_a_plain_run_ends_when_the_batch_changes(clock: Clock, size: int) -> None:
    driver, policy = running_plain(OFF, clock)
    driver.begin(MANY)
    assert driver.skips_selection(MANY) and not driver.skips_selection(size)
    driver.begin(size)
    assert policy.batch_sizes == [MANY, size]


def test_a_plain_run_ends_when_a_strategy_is_pinned_or_calibrated(clock: Clock) -> None:
    driver, policy = running_plain(OFF, clock)
    driver.begin(MANY)
    driver.pinned_strategy = CHAIN
    assert driver.begin(MANY) == CHAIN
    driver.pinned_strategy = None
    assert driver.begin(MANY) == OFF
    driver.calibrate(lambda size: [CHAIN])
    assert driver.begin(MANY) == CHAIN
    driver.calibrate(None)
    driver.begin(MANY)
    assert policy.batch_sizes == [MANY] * 3


def test_without_plain_runs_every_step_has_its_own_selection(clock: Clock) -> None:
    policy = RecordingPolicy(OFF)
    driver = Driver(policy, Wall(clock))
    for _ in range(2 * PLAIN_RUN):
        step(driver, clock, 0.01, 0.0, [0] * MANY)
    assert policy.batch_sizes == [MANY] * 2 * PLAIN_RUN


def test_a_forced_strategy_is_not_observed(
    driver: Driver, clock: Clock, policy: RecordingPolicy
) -> None:
    """Where drafts have no KV slots, what is accepted says nothing about a strategy."""
    assert driver.begin(2, forced=OFF) == OFF
    clock.now += 0.03
    driver.end()
    assert driver.outcome([0, 0]) == (OFF, ())
    assert driver.begin(2) == CHAIN
    assert policy.batch_sizes == [2]
    assert policy.steps == []
