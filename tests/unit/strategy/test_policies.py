"""Policies: what they choose, and why. Pure: a sequence of calls leads to the same choices."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest

from benchmarks import bench_policy
from tlt_sglang.config.config import POLICIES, Config, PolicyName
from tlt_sglang.strategy.acceptance import Acceptance
from tlt_sglang.strategy.arms import Strategy, parse
from tlt_sglang.strategy.beg_mab import BegMab
from tlt_sglang.strategy.cost_model import TRIAL, CostModel
from tlt_sglang.strategy.costs import Costs
from tlt_sglang.strategy.ema import Ema
from tlt_sglang.strategy.policies import make
from tlt_sglang.strategy.policy import Agreed, Fixed, Observation, Policy, bucket
from tlt_sglang.strategy.trace import Recorded, replay

OFF, CHAIN, TREE = parse("off"), parse("eagle3:3x1x4"), parse("eagle3:3x4x8")
SHORT, NGRAM = parse("eagle3:1x1x2"), parse("ngram:4")
POOL = (OFF, SHORT, CHAIN, TREE, NGRAM)


def seen(arm: Strategy, accepted: list[int], seconds: float) -> Observation:
    return Observation(arm, len(accepted), accepted, seconds)


def play(
    policy: Policy, size: int, steps: int, chance: float, cost: Callable[[Strategy], float]
) -> list[Strategy]:
    """Steps in a world where every draft is accepted with `chance`, n-grams with a third of it."""
    dice = random.Random(0)
    chosen = []
    for _ in range(steps):
        arm = policy.choose(size)
        share = chance / 3 if arm.drafter == "ngram" else chance
        depth = arm.num_steps or arm.num_draft_tokens - 1
        accepted = []
        for _ in range(size):
            count = 0
            while count < depth and dice.random() < share:
                count += 1
            accepted.append(count)
        policy.observe(seen(arm, accepted, cost(arm)))
        chosen.append(arm)
    return chosen


def memory_bound(arm: Strategy) -> float:
    return 0.03 + 0.002 * arm.num_steps + 0.0002 * arm.num_draft_tokens


def compute_bound(arm: Strategy) -> float:
    return 0.03 * arm.num_draft_tokens + 0.002 * arm.num_steps


def share(chosen: list[Strategy], *arms: Strategy) -> float:
    return sum(arm in arms for arm in chosen) / len(chosen)


@pytest.mark.parametrize("size", [1, 4, 32])
def test_good_drafts_that_cost_little_are_taken(size: int) -> None:
    chosen = play(CostModel(POOL), size, 300, 0.8, memory_bound)
    assert share(chosen[100:], CHAIN, TREE) > 0.95


@pytest.mark.parametrize("size", [1, 4, 32])
def test_where_nothing_pays_it_is_off(size: int) -> None:
    chosen = play(CostModel(POOL), size, 300, 0.8, compute_bound)
    assert share(chosen[100:], OFF) > 0.95


def test_it_goes_off_and_comes_back() -> None:
    policy = CostModel(POOL)
    assert share(play(policy, 4, 200, 0.8, memory_bound)[100:], OFF) < 0.05
    # An n-gram that is never right costs 2 % here.
    assert share(play(policy, 4, 300, 0.02, memory_bound)[150:], OFF, NGRAM) > 0.9
    assert share(play(policy, 4, 500, 0.8, memory_bound)[300:], OFF) < 0.05


def test_above_the_largest_batch_it_is_off() -> None:
    policy = CostModel(POOL, max_batch=8)
    assert share(play(policy, 8, 100, 0.8, memory_bound)[50:], OFF) < 0.1
    assert share(play(policy, 9, 50, 0.8, memory_bound), OFF) == 1.0


@pytest.mark.parametrize("make", [CostModel, BegMab, Ema])
def test_the_same_calls_lead_to_the_same_choices(
    make: Callable[[tuple[Strategy, ...]], Policy],
) -> None:
    runs = [play(make(POOL), 4, 200, 0.6, memory_bound) for _ in range(2)]
    assert runs[0] == runs[1]


class Trials(CostModel):
    """Notes at which calls it chose what it did not expect to be the best."""

    def __init__(self) -> None:
        super().__init__(POOL, dwell=10)
        self.calls = 0
        self.trials: set[int] = set()

    def choose(self, batch_size: int, endings: Sequence[int] = ()) -> Strategy:
        chosen = super().choose(batch_size, endings)
        expected = {arm: self.worth(arm, batch_size) for arm in POOL}
        if expected[chosen] < max(expected.values()):
            self.trials.add(self.calls)
        self.calls += 1
        return chosen


def test_a_choice_is_kept_for_a_while() -> None:
    policy = Trials()
    chosen = play(policy, 4, 300, 0.5, memory_bound)
    changes = [i for i in range(1, 300) if chosen[i] != chosen[i - 1]]
    kept = list(itertools.pairwise(changes))
    assert all(b - a >= TRIAL for a, b in kept)
    # What was left sooner was only a trial, until it was left.
    assert all(b - a >= 10 or set(range(a, b)) & policy.trials for a, b in kept)
    assert len(policy.trials) < 60


def test_without_strategies_there_is_no_policy() -> None:
    for kind in (CostModel, BegMab, Ema):
        with pytest.raises(ValueError, match="there is no"):
            kind(())
    with pytest.raises(ValueError, match="there is no"):
        BegMab([OFF])
    with pytest.raises(ValueError, match="there is no chain"):
        Ema([OFF, TREE, NGRAM])


# -- what it knows -----------------------------------------------------------------------------


def told(
    strategy: Strategy,
    accepted: list[int],
    endings: tuple[int, ...] = (),
    repeated: tuple[tuple[int, bool], ...] = (),
) -> Observation:
    return Observation(strategy, len(accepted), accepted, 0.03, endings, repeated)


def test_chains_share_what_they_learn() -> None:
    known = Acceptance()
    for now in range(1, 300):
        known.observe(told(CHAIN, [3, 1, 0, 2]), now)  # 0.75, 2/3, 1/2
    assert known.tokens(CHAIN, 1, 300) == pytest.approx(2.5, abs=0.1)
    assert known.tokens(SHORT, 1, 300) == pytest.approx(1.75, abs=0.05)
    assert known.tokens(OFF, 1, 300) == 1.0


def test_a_level_that_drops_drops_for_all() -> None:
    """A tree that was not tried since is expected to have become worse as the chain has."""
    known = Acceptance()
    now = 0
    for _ in range(200):
        now += 2
        known.observe(told(CHAIN, [2, 3, 1, 3]), now)
        known.observe(told(TREE, [3, 3, 2, 3]), now)
    before = known.tokens(TREE, 1, now)
    for _ in range(100):
        now += 1
        known.observe(told(CHAIN, [0, 1, 0, 0]), now)
    after = known.tokens(TREE, 1, now)
    assert after < 0.65 * before
    assert after > known.tokens(CHAIN, 1, now)


def test_what_was_not_seen_for_long_is_uncertain() -> None:
    known = Acceptance()
    for now in range(1, 100):
        known.observe(told(CHAIN, [1, 2]), now)

    def doubt(now: int) -> float:
        return known.tokens(CHAIN, 1, now, 1.0) - known.tokens(CHAIN, 1, now, -1.0)

    assert 0 < doubt(100) < doubt(300) < doubt(900)


def test_costs_are_medians_and_outliers_count_little() -> None:
    costs = Costs()
    assert costs.seconds(CHAIN, 4, 0) == (None, 0, 0)
    for took in (0.04, 0.041, 0.4, 0.039):
        costs.observe(CHAIN, 4, took, 7)
    seconds, count, age = costs.seconds(CHAIN, 4, 9)
    assert seconds == pytest.approx(0.0405)
    assert (count, age) == (4, 2)
    for _ in range(5):
        costs.observe(TREE, 4, 0.05, 8)
    costs.observe(TREE, 1, 0.5, 9)  # one that the others do not bear out
    seconds, count, _ = costs.seconds(TREE, 1, 9)
    assert seconds is not None and seconds < 0.2 and count == 1


def test_costs_that_were_not_measured_are_derived() -> None:
    machine = bench_policy.MACHINES["cpu"]
    costs = Costs()
    for arm in (OFF, CHAIN, TREE):
        for size in (1, 4, 16):
            for _ in range(3):
                costs.observe(arm, size, machine.cost(arm, size) / 1000, 1)
    for arm, size in ((OFF, 2), (CHAIN, 8), (TREE, 2), (SHORT, 4), (SHORT, 16)):
        derived, count, _ = costs.seconds(arm, size, 1)
        assert count == 0 and derived is not None
        assert derived == pytest.approx(machine.cost(arm, size) / 1000, rel=0.3)


def test_what_was_calibrated_once_counts_beside_the_model() -> None:
    costs = Costs()
    for arm in (OFF, CHAIN):
        for size in (1, 4):
            for _ in range(3):
                costs.observe(arm, size, 0.02, 0, calibrates=True)
    derived, count, _ = costs.seconds(OFF, 16, 1)
    assert derived is not None and count == 0
    costs.observe(OFF, 16, 4 * derived, 1, calibrates=True)
    once, count, _ = costs.seconds(OFF, 16, 2)
    assert once is not None and count == 1
    assert 1.2 * derived < once < 4 * derived


def test_a_calibration_on_a_busy_machine_is_set_right_by_what_is_measured_later() -> None:
    machine = bench_policy.MACHINES["cpu"]
    costs = Costs()
    for arm in (OFF, CHAIN):
        for size in (1, 4, 16):
            for _ in range(3):
                costs.observe(arm, size, 3 * machine.cost(arm, size), 0, calibrates=True)
    for _ in range(3):
        costs.observe(OFF, 16, machine.cost(OFF, 16), 1)
    assert costs.seconds(OFF, 16, 1) == (machine.cost(OFF, 16), 3, 0)
    for size in (1, 4, 16):
        seconds, count, _ = costs.seconds(CHAIN, size, 1)
        assert seconds == pytest.approx(machine.cost(CHAIN, size))
        assert count == 1
    seconds, count, _ = costs.seconds(CHAIN, 8, 1)  # which was not calibrated
    assert seconds == pytest.approx(machine.cost(CHAIN, 8), rel=0.3)
    assert count == 0


def test_buckets() -> None:
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17, 100)] == [
        1,
        2,
        3,
        4,
        6,
        6,
        8,
        8,
        12,
        16,
        24,
        128,
    ]


# -- the others --------------------------------------------------------------------------------


def test_beg_mab_verifies_more_for_small_batches() -> None:
    policy = BegMab(POOL, first_range=2, max_batch=8, epsilon=0.0)
    play(policy, 1, 20, 0.5, memory_bound)
    assert policy.choose(1) == policy.choose(2) == TREE  # eight tokens
    assert policy.choose(3) in (CHAIN, NGRAM)  # four
    assert policy.choose(8) == SHORT
    assert policy.choose(9) == OFF


def test_beg_mab_explores() -> None:
    pool = [parse("eagle3:3x4x8"), parse("eagle3:5x2x8"), parse("ngram:8")]
    chosen = play(BegMab(pool, epsilon=0.3), 1, 400, 0.7, memory_bound)
    assert all(share(chosen, arm) > 0.05 for arm in pool)


def test_ema_follows_the_accept_length() -> None:
    pool = [parse(text) for text in ("off", "eagle:1x1x2", "eagle:3x1x4", "eagle:5x1x6")]
    policy = Ema(pool)
    assert share(play(policy, 1, 200, 0.98, memory_bound)[150:], pool[3]) == 1.0
    assert share(play(policy, 1, 200, 0.1, memory_bound)[150:], pool[1]) == 1.0
    assert share(play(policy, 100, 20, 0.98, memory_bound), OFF) == 1.0


@pytest.mark.parametrize("make", [CostModel, BegMab, Ema])
def test_only_strategies_of_the_pool_are_chosen(
    make: Callable[[tuple[Strategy, ...]], Policy],
) -> None:
    policy = make((CHAIN, SHORT))
    for size in (1, 200):
        assert set(play(policy, size, 60, 0.1, compute_bound)) <= {CHAIN, SHORT}


def test_ranks_with_different_clocks_agree() -> None:
    """Each rank measures other times; alone they would choose differently."""
    alone: list[Policy] = [CostModel(POOL), CostModel(POOL)]
    told: list[int] = []

    def first(own: int) -> int:
        told.append(own)
        return own

    def second(own: int) -> int:
        return told[-1]

    agreed: list[Policy] = [
        Agreed(CostModel(POOL), POOL, first),
        Agreed(CostModel(POOL), POOL, second),
    ]
    differ = 0
    for _ in range(300):
        for policies in (alone, agreed):
            chosen = [policy.choose(4) for policy in policies]
            if policies is agreed:
                assert chosen[0] == chosen[1]
            else:
                differ += chosen[0] != chosen[1]
            for policy, arm, cost in zip(
                policies, chosen, (memory_bound, compute_bound), strict=True
            ):
                policy.observe(seen(arm, [min(2, arm.num_steps)] * 4, cost(arm)))
    assert differ > 100


def test_fixed() -> None:
    assert share(play(Fixed(TREE), 3, 5, 0.5, memory_bound), TREE) == 1.0


def test_an_oracle_loses_nothing_in_the_simulation() -> None:
    """And a policy that is always off loses what the simulation says it does."""
    world = bench_policy.World(bench_policy.MACHINES["gpu"], 0, 800)
    steps = range(len(world.sizes))
    best = [max(world.rate(arm, i) for arm in bench_policy.POOL) for i in steps]

    class Oracle:
        step = -1

        def choose(self, batch_size: int, endings: Sequence[int] = ()) -> Strategy:
            self.step += 1
            return max(bench_policy.POOL, key=lambda arm: world.rate(arm, self.step))

        def observe(self, seen: Observation) -> None:
            pass

    assert bench_policy.regret_of(Oracle(), world, 0, best) < bench_policy.SWITCH
    off = bench_policy.regret_of(Fixed(OFF), world, 0, best)
    model = bench_policy.regret_of(CostModel(bench_policy.POOL), world, 0, best)
    assert model < 0.1 < off


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_speculates_above_the_largest_batch(name: PolicyName) -> None:
    """Whatever it would choose; and no policy chooses what is not possible."""
    chain, other = parse("eagle:3x1x4"), parse("eagle:1x1x2")
    config = Config(("eagle:3x1x4", "eagle:1x1x2", "off"), policy=name, max_batch=4)
    policy = make(config, config.pool)
    assert {str(policy.choose(5)) for _ in range(20)} == {"off"}
    narrow = make(config, config.pool, lambda batch_size: [other])
    assert {narrow.choose(2) for _ in range(20)} == {other}
    assert {str(narrow.choose(9)) for _ in range(20)} == {"off"}
    fixed = make(Config(("eagle:3x1x4", "off"), policy="fixed"), [chain, parse("off")])
    assert fixed.choose(99) == chain


# -- endings that were there before --------------------------------------------------------------


def test_n_grams_are_learned_by_the_ending_whoever_drafts() -> None:
    known = Acceptance()
    for now in range(1, 200):
        # A long ending goes on as before, a short one does not.
        known.observe(told(CHAIN, [1, 3], (2, 12), ((0, True), (3, False))), now)
        known.observe(told(OFF, [0, 0], (12, 3), ((1, False), (0, True))), now)
    assert known.tokens(NGRAM, 1, 200, endings=[12]) > 3.7
    assert known.tokens(NGRAM, 1, 200, endings=[3]) < 1.2
    assert known.tokens(NGRAM, 1, 200, endings=[0]) == 1.0
    # Whom a chain drafts for by itself, and whom by n-grams.
    assert known.tokens(CHAIN, 2, 200, endings=[12, 2]) == pytest.approx(
        known.tokens(CHAIN, 1, 200, endings=[12]) + known.tokens(CHAIN, 1, 200, endings=[2])
    )
    assert known.tokens(CHAIN, 1, 200, endings=[2]) == known.tokens(CHAIN, 1, 200)
    assert known.tokens(TREE, 1, 200, endings=[12]) == known.tokens(TREE, 1, 200)


def test_what_n_grams_drafted_in_a_chain_is_not_the_drafters() -> None:
    known = Acceptance()
    for now in range(1, 100):
        known.observe(told(CHAIN, [3, 0], (12, 0), ((3, False), (0, True))), now)
    assert known.tokens(CHAIN, 1, 100) < 1.3
    assert known.tokens(CHAIN, 1, 100, endings=[12]) > 3.5


@pytest.mark.parametrize("ending", [12, 3])
def test_an_ending_decides_at_once(ending: int) -> None:
    """A dwell time is for batches that are alike."""
    policy = CostModel(POOL, dwell=50)
    for _ in range(20):
        policy.observe(told(OFF, [0], (ending,), ((7, False),)))
        for arm in POOL:
            accepted = [1] if arm.num_steps else [0]
            seconds = 0.02 + 0.001 * arm.num_draft_tokens + 0.004 * arm.num_steps
            policy.observe(Observation(arm, 1, accepted, seconds, [0], [(0, True)]))
    before = [policy.choose(1, [0]) for _ in range(3)]
    assert NGRAM not in before
    assert policy.choose(1, [ending]) == NGRAM
    assert policy.choose(1, [0]) != NGRAM


def test_n_grams_are_not_kept_for_those_that_repeat_nothing() -> None:
    policy = CostModel([OFF, NGRAM], dwell=50)
    for size in (1, 4):
        for _ in range(20):
            policy.observe(told(OFF, [0] * size, (3,) * size, ((7, False),) * size))
        assert policy.choose(size, [3] * size) == NGRAM
        assert policy.choose(size, [0] * size) == OFF


def test_a_batch_that_grows_decides_at_once() -> None:
    """What is best for the first request of many is the worst for all of them."""
    policy = CostModel([OFF, CHAIN], dwell=50)
    for _ in range(20):
        for size in (1, 16):
            for arm in (OFF, CHAIN):
                accepted = [3 if arm == CHAIN else 0] * size
                seconds = 0.02 if arm == OFF else 0.03 if size == 1 else 0.3
                policy.observe(Observation(arm, size, accepted, seconds))
    assert [policy.choose(1) for _ in range(3)] == [CHAIN] * 3
    assert policy.choose(16) == OFF
    assert [policy.choose(1) for _ in range(3)] == [OFF] * 3  # one that shrinks waits


def test_a_trace_has_the_endings() -> None:
    lines: list[str] = []
    recorded = Recorded(CostModel(POOL, seed=3), lines.append)
    for step in range(60):
        endings = [12 if step % 7 == 0 else 0, 4]
        arm = recorded.choose(2, endings)
        recorded.observe(Observation(arm, 2, [1, 0], 0.03, endings, [(1, True), (0, True)]))
    again = list(replay(CostModel(POOL, seed=3), lines))
    assert len(again) == 60
    assert all(then == now for then, now in again)
