"""The guard of a hot swap: worse drafters go, others stay, at batch size 1 and above."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from statistics import median

import pytest

from tlt_sglang.weights.baseline import LEAST_EASE, REQUESTS, Baseline, Spread
from tlt_sglang.weights.guard import MOST_VERIFY_STEPS, Guard, Verdict


class World:
    """Requests of about 60 verify steps, each as easy as it happens to be, and a chain of 3 drafts.

    Every draft of an average request is accepted with a chance of a half.
    """

    def __init__(self, seed: int, batch: int, ease: float = 0.5) -> None:
        self.dice = random.Random(seed)
        self.ease = ease
        self.names = map(str, itertools.count())
        self.live = [self.arrival() for _ in range(batch)]

    def arrival(self) -> tuple[str, float, list[int]]:
        chance = 1 / (1 + math.exp(self.dice.gauss(0, self.ease)))
        return next(self.names), chance, [5 + int(self.dice.expovariate(1 / 60))]

    def verify_steps(self, quality: float = 1.0) -> Iterator[tuple[str, int]]:
        """(request, drafts accepted); each draft is `quality` times as likely to be right."""
        while True:
            for place, (name, chance, left) in enumerate(self.live):
                accepted = 0
                while accepted < 3 and self.dice.random() < chance * quality:
                    accepted += 1
                yield name, accepted
                left[0] -= 1
                if left[0] <= 0:
                    self.live[place] = self.arrival()


def swap(seed: int, batch: int, quality: float, before: int = 2000) -> tuple[Verdict, int]:
    """The verdict over a drafter, and the verify steps that it took."""
    world = World(seed, batch)
    baseline = Baseline()
    for name, accepted in itertools.islice(world.verify_steps(), before):
        baseline.observe(name, 1, accepted)
    guard = Guard(baseline)
    for name, accepted in world.verify_steps(quality):
        if guard.observe(name, 1, accepted) != "undecided":
            break
    return guard.verdict, guard.verify_steps


# ---- error rates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 16])
def test_a_drafter_that_is_as_good_is_not_rolled_back(batch: int) -> None:
    verdicts = [swap(seed, batch, 1.0) for seed in range(30)]
    assert [verdict for verdict, _ in verdicts].count("roll back") <= 1
    if batch == 16:
        assert median(verify_steps for _, verify_steps in verdicts) < 500


@pytest.mark.parametrize("batch", [1, 16])
def test_a_better_drafter_is_kept_soon(batch: int) -> None:
    verdicts = [swap(seed, batch, 1.2) for seed in range(30)]
    assert {verdict for verdict, _ in verdicts} == {"keep"}
    assert median(verify_steps for _, verify_steps in verdicts) < 500


@pytest.mark.parametrize(("batch", "most"), [(1, 500), (16, 100)])
def test_a_drafter_that_is_half_as_good_is_rolled_back(batch: int, most: int) -> None:
    verdicts = [swap(seed, batch, 0.5) for seed in range(30)]
    assert {verdict for verdict, _ in verdicts} == {"roll back"}
    assert median(verify_steps for _, verify_steps in verdicts) < most


@pytest.mark.parametrize("batch", [1, 16])
def test_a_drafter_that_gets_nothing_right_is_rolled_back_at_once(batch: int) -> None:
    verdicts = [swap(seed, batch, 0.0) for seed in range(30)]
    assert {verdict for verdict, _ in verdicts} == {"roll back"}
    assert median(verify_steps for _, verify_steps in verdicts) < 40


def test_little_is_held_against_a_drafter_after_few_verify_steps_before() -> None:
    verdicts = [swap(seed, 1, 1.0, before=150)[0] for seed in range(25)]
    assert verdicts.count("roll back") <= 1


# ---- what counts as evidence ---------------------------------------------------------------------


def steady(
    verify_steps: int, requests: int = 40, accepted: int = 1, strategy: str = ""
) -> Baseline:
    """Each request with so many verify steps, and `accepted` drafts in each of them."""
    baseline = Baseline()
    for request in range(requests):
        baseline.observe(f"before {request}", verify_steps, verify_steps * accepted, strategy)
    return baseline


def varied() -> Baseline:
    """Requests that differ: a third of them at 0.4, 1.0 and 1.6 accepted drafts a verify step."""
    baseline = Baseline()
    for request in range(60):
        baseline.observe(f"before {request}", 100, (40, 100, 160)[request % 3])
    return baseline


def test_one_hard_request_is_not_held_against_a_drafter_but_many_are() -> None:
    guard = Guard(varied())
    for _ in range(1000):
        guard.observe("hard", 1, 0 if guard.verify_steps % 5 < 3 else 1)
    assert guard.figures()["requests"] == 1
    verdicts = [guard.observe(f"hard {request}", 100, 40) for request in range(20)]
    assert verdicts[0] == "undecided" and verdicts[-1] == "roll back"


def test_a_request_that_was_hard_before_the_swap_may_be_so_after_it() -> None:
    hard = varied()
    for request in range(40):
        hard.observe(f"hard {request}", 50, 20)
    known_ease, unknown = Guard(hard), Guard(hard)
    for request in range(40):
        known_ease.observe(f"hard {request}", 50, 20)
        unknown.observe(f"new {request}", 50, 20)
    assert known_ease.figures()["evidence"] < 0
    assert unknown.verdict == "roll back"


def test_a_request_that_gets_worse_at_the_swap_counts_for_more_than_a_new_one() -> None:
    baseline = varied()
    known_ease, unknown = Guard(baseline), Guard(baseline)
    known_ease.observe("before 1", 100, 50)
    unknown.observe("new", 100, 50)
    assert known_ease.figures()["evidence"] > unknown.figures()["evidence"]


def test_the_less_requests_differ_the_sooner_a_verdict() -> None:
    alike, different = Guard(steady(100)), Guard(varied())
    for request in range(6):
        alike.observe(f"new {request}", 100, 60)
        different.observe(f"new {request}", 100, 60)
    assert alike.verdict == "roll back"
    assert different.verdict == "undecided"


def test_a_shallower_strategy_does_not_look_like_a_worse_drafter() -> None:
    baseline = Baseline()
    for request in range(40):
        baseline.observe(f"before {request}", 90, 180, "eagle3:7x1x8")
        baseline.observe(f"before {request}", 10, 5, "eagle3:1x1x2")
    guard = Guard(baseline)
    for request in range(40):
        guard.observe(f"new {request}", 50, 25, "eagle3:1x1x2")
    assert guard.verdict == "keep"
    assert guard.figures()["ratio"] == 1.0


def test_verify_steps_of_a_strategy_without_a_baseline_tell_nothing() -> None:
    guard = Guard(steady(100, strategy="eagle3:3x1x4"))
    for _ in range(30):
        assert guard.observe("new", 100, 0, "eagle3:1x1x2") == "undecided"
    assert guard.figures() == {"verify_steps": 3000, "requests": 0, "ratio": 1.0, "evidence": 0.0}


@pytest.mark.parametrize("before", [Baseline(), steady(100, accepted=0)])
def test_without_anything_to_compare_with_a_drafter_is_kept_in_the_end(before: Baseline) -> None:
    guard = Guard(before)
    assert guard.observe("new", MOST_VERIFY_STEPS - 1, 0) == "undecided"
    assert guard.observe("new", 1, 0) == "keep"


def test_a_verdict_does_not_change() -> None:
    guard = Guard(steady(100))
    for request in range(9):
        guard.observe(f"new {request}", 100, 0)
    assert guard.verdict == "roll back"
    verify_steps = guard.verify_steps
    assert guard.observe("new", 1000, 3000) == "roll back"
    assert guard.verify_steps == verify_steps


def test_verify_steps_one_by_one_or_together_are_the_same_evidence() -> None:
    one, other = Guard(varied(), 10**6), Guard(varied(), 10**6)
    for _ in range(10):
        one.observe("new", 1, 1)
        one.observe("newer", 1, 0)
    other.observe("newer", 10, 0)
    other.observe("new", 10, 10)
    assert one.figures() == other.figures()


def test_what_is_seen_after_a_swap_is_the_baseline_of_the_next_one() -> None:
    guard = Guard(steady(100))
    for request in range(20):
        guard.observe(f"new {request}", 50, 100)
    assert guard.verdict == "keep"
    assert guard.after.means() == {"": 2.0}


# ---- the baseline --------------------------------------------------------------------------------


def test_a_baseline_remembers_the_requests_heard_of_last() -> None:
    baseline = Baseline()
    for request in range(REQUESTS + 10):
        baseline.observe(str(request), 1, 1)
        baseline.observe("0", 1, 1)
    assert len(baseline.requests()) == REQUESTS
    assert "0" in baseline.requests() and "5" not in baseline.requests()
    assert baseline.scaled("0", {"": 1.0}) == ((REQUESTS + 11) / 2, (REQUESTS + 11) / 2)


def test_how_much_requests_differ_is_learnt_from_many() -> None:
    """Gamma variables of shape 4, Poisson counts: the shape is found again."""
    dice = random.Random(0)
    requests = []
    for _ in range(400):
        mean = 40 * dice.gammavariate(4, 1 / 4)
        requests.append((max(0.0, dice.gauss(mean, math.sqrt(mean))), 40.0))
    spread = Spread.of(requests)
    assert spread.shape == pytest.approx(4, rel=0.15)
    assert 0.9 < spread.low < 0.98
    few = Spread.of(requests[:2])
    assert few.low < 0.75
    assert Spread.of([(40.0, 40.0)] * 10_000).shape == pytest.approx(1 / LEAST_EASE**2)
    assert Spread.of([]).low == 1.0
