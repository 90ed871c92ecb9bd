"""When a step begins and ends, and what the policy is told of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from tlt_sglang.engine.clocks import CudaEvents, Wall
from tlt_sglang.engine.driver import FEW, IN_FLIGHT, REST, Driver
from tlt_sglang.strategy.arms import Strategy, parse
from tlt_sglang.strategy.policy import Observation

CHAIN, OFF = parse("eagle:3x1x4"), parse("off")


class Told:
    """A policy that notes what it is told."""

    def __init__(self, strategy: Strategy = CHAIN) -> None:
        self.strategy = strategy
        self.seen: list[Observation] = []
        self.asked: list[int] = []

    def choose(self, batch_size: int, endings: Sequence[int] = ()) -> Strategy:
        self.asked.append(batch_size)
        return self.strategy

    def observe(self, seen: Observation) -> None:
        self.seen.append(seen)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def driver(told: Told, clock: Clock) -> Driver:
    return Driver(told, Wall(clock))


def step(driver: Driver, clock: Clock, work: float, between: float, accepted: list[int]) -> None:
    driver.begin(len(accepted))
    clock.now += work
    driver.end()
    driver.outcome(accepted)
    clock.now += between


def test_a_step_lasts_to_the_beginning_of_the_next(
    driver: Driver, clock: Clock, told: Told
) -> None:
    step(driver, clock, 0.03, 0.005, [3, 1])
    assert told.seen == []
    step(driver, clock, 0.04, 0.005, [2, 2])
    (seen,) = told.seen
    assert (seen.strategy, seen.batch_size, seen.accepted) == (CHAIN, 2, [3, 1])
    assert seen.seconds == pytest.approx(0.035)
    assert seen.committed == 6
    assert seen.reward == pytest.approx(6 / 0.035)


def test_waiting_and_prefills_do_not_count(driver: Driver, clock: Clock, told: Told) -> None:
    step(driver, clock, 0.03, 9.0, [0])
    step(driver, clock, 0.03, 0.0, [0])
    assert told.seen[0].seconds == pytest.approx(0.03)


def test_what_a_drafter_catches_up_is_no_part_of_a_step(
    driver: Driver, clock: Clock, told: Told
) -> None:
    driver.begin(1)
    clock.now += 0.7
    driver.begin_again()
    clock.now += 0.1
    driver.end()
    driver.outcome([1])
    driver.begin(1)
    assert [round(seen.seconds, 6) for seen in told.seen] == [0.1]


def test_outcomes_that_come_late_find_their_step(driver: Driver, clock: Clock, told: Told) -> None:
    """Overlap scheduling: a step begins before the one before it is told."""
    for size in (1, 2, 3):
        driver.begin(size)
        clock.now += 0.01
        driver.end()
        if size > 1:
            driver.outcome([size - 1] * (size - 1))
    assert [(seen.batch_size, list(seen.accepted)) for seen in told.seen] == [(1, [1]), (2, [2, 2])]


def test_outcomes_that_never_come_are_forgotten(driver: Driver, clock: Clock, told: Told) -> None:
    for _ in range(5 * IN_FLIGHT):
        driver.begin(1)
        clock.now += 0.01
        driver.end()
    driver.outcome([1])
    driver.begin(1)
    assert len(told.seen) == 1


# ---- by events -----------------------------------------------------------------------------------


class Event:
    """As torch.cuda's; the device is `behind` what was recorded."""

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


def test_events_are_read_when_they_are_due(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is three events behind; outcomes are known before the times."""
    monkeypatch.setattr(Event, "recorded", 0)
    monkeypatch.setattr(Event, "behind", 3)
    driver = Driver(told, CudaEvents(Event))
    for size in range(1, 6):
        driver.begin(size)
        driver.end()
        driver.outcome([0] * size)
    assert [seen.batch_size for seen in told.seen] == [1, 2, 3]
    assert all(seen.seconds == pytest.approx(0.01) for seen in told.seen)
    monkeypatch.setattr(Event, "behind", 0)
    driver.begin(1)
    assert [seen.batch_size for seen in told.seen] == [1, 2, 3, 4, 5]


def test_a_calibration_gives_every_strategy_its_turn(
    driver: Driver, clock: Clock, told: Told
) -> None:
    """The policy learns what steps cost, and nothing of what dummies had accepted."""
    arms = [parse("off"), parse("ngram:4")]
    driver.calibrate(lambda size: arms)
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
    assert [chosen.count(arm) for arm in arms] == [turns] * 2
    assert all(one != other for one, other in itertools.pairwise(chosen))
    assert [seen.strategy for seen in told.seen] == [*chosen, CHAIN]
    assert {tuple(seen.accepted) for seen in told.seen[:-1]} == {()}
    assert told.seen[-1].accepted == [1]
    assert {seen.seconds for seen in told.seen} == {1.0}


# ---- rests ---------------------------------------------------------------------------------------

MANY = 2 * FEW


def resting(strategy: Strategy, clock: Clock) -> tuple[Driver, Told]:
    told = Told(strategy)
    return Driver(told, Wall(clock), rests=True), told


def test_plain_decoding_of_many_is_let_be_for_a_few_steps(clock: Clock) -> None:
    driver, told = resting(OFF, clock)
    rests = []
    for _ in range(3 * REST):
        rests.append(driver.rests(MANY))
        assert driver.begin(MANY) == OFF
        clock.now += 0.01
        driver.end()
        assert driver.outcome([0] * MANY) == (OFF, ())
    assert rests == 3 * ([False] + [True] * (REST - 1))
    driver.begin(MANY)
    assert told.asked == [MANY] * 4
    assert [seen.seconds for seen in told.seen] == [pytest.approx(0.01)] * 3


@pytest.mark.parametrize(("strategy", "size"), [(CHAIN, MANY), (OFF, FEW), (OFF, 1)])
def test_nothing_else_is_let_be(clock: Clock, strategy: Strategy, size: int) -> None:
    driver, told = resting(strategy, clock)
    for _ in range(2 * REST):
        step(driver, clock, 0.01, 0.0, [0] * size)
    assert told.asked == [size] * 2 * REST


@pytest.mark.parametrize("size", [1, FEW, MANY - MANY // 4, 2 * MANY])
def test_a_rest_ends_with_the_batch_it_was_for(clock: Clock, size: int) -> None:
    driver, told = resting(OFF, clock)
    driver.begin(MANY)
    assert driver.rests(MANY) and not driver.rests(size)
    driver.begin(size)
    assert told.asked == [MANY, size]


def test_a_rest_ends_where_a_strategy_is_pinned_or_calibrated(clock: Clock) -> None:
    driver, told = resting(OFF, clock)
    driver.begin(MANY)
    driver.pinned = CHAIN
    assert driver.begin(MANY) == CHAIN
    driver.pinned = None
    assert driver.begin(MANY) == OFF
    driver.calibrate(lambda size: [CHAIN])
    assert driver.begin(MANY) == CHAIN
    driver.calibrate(None)
    driver.begin(MANY)
    assert told.asked == [MANY] * 3


def test_only_who_may_rests(clock: Clock) -> None:
    told = Told(OFF)
    driver = Driver(told, Wall(clock))
    for _ in range(2 * REST):
        step(driver, clock, 0.01, 0.0, [0] * MANY)
    assert told.asked == [MANY] * 2 * REST
