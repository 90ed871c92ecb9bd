"""Policies: their choices, and that a sequence of calls always leads to the same ones."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest

from benchmarks import bench_policy
from tlt_sglang.config.settings import POLICIES, Config, PolicyName
from tlt_sglang.strategy.acceptance import Acceptance, mix_of
from tlt_sglang.strategy.beg_mab import BegMab
from tlt_sglang.strategy.cost_model import TRIAL, CostModel
from tlt_sglang.strategy.costs import Costs
from tlt_sglang.strategy.ema import Ema
from tlt_sglang.strategy.policies import make
from tlt_sglang.strategy.policy import Agreed, Fixed, Observation, Policy, bucket
from tlt_sglang.strategy.strategies import Strategy, parse
from tlt_sglang.strategy.trace import TracedPolicy, replay

OFF, CHAIN, TREE = parse("off"), parse("eagle3:3x1x4"), parse("eagle3:3x4x8")
SHORT, NGRAM = parse("eagle3:1x1x2"), parse("ngram:4")
POOL = (OFF, SHORT, CHAIN, TREE, NGRAM)


def observation(strategy: Strategy, accepted: list[int], seconds: float) -> Observation:
    return Observation(strategy, len(accepted), accepted, seconds)


def play(
    policy: Policy, size: int, steps: int, acceptance: float, cost: Callable[[Strategy], float]
) -> list[Strategy]:
    """Play steps in which each draft is accepted with this probability, n-grams with a third."""
    rng = random.Random(0)
    chosen = []
    for _ in range(steps):
        strategy = policy.choose(size)
        probability = acceptance / 3 if strategy.drafter == "ngram" else acceptance
        depth = strategy.num_steps or strategy.num_draft_tokens - 1
        accepted = []
        for _ in range(size):
            count = 0
            while count < depth and rng.random() < probability:
                count += 1
            accepted.append(count)
        policy.observe(observation(strategy, accepted, cost(strategy)))
        chosen.append(strategy)
    return chosen


def memory_bound(strategy: Strategy) -> float:
    return 0.03 + 0.002 * strategy.num_steps + 0.0002 * strategy.num_draft_tokens


def compute_bound(strategy: Strategy) -> float:
    return 0.03 * strategy.num_draft_tokens + 0.002 * strategy.num_steps


def share(chosen: list[Strategy], *strategies: Strategy) -> float:
    return sum(strategy in strategies for strategy in chosen) / len(chosen)


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


@pytest.mark.parametrize("steps", [30, 300])
@pytest.mark.parametrize("seed", range(4))
def test_it_follows_a_machine_that_another_process_takes_and_leaves(seed: int, steps: int) -> None:
    """As a trainer beside the engine does, from which strategies with a drafter suffer most."""
    policy, rng = CostModel(POOL, seed=seed), random.Random(seed)

    def alone(strategy: Strategy) -> float:
        cost = 0.01 + 0.0006 * strategy.num_draft_tokens + 0.0005 * strategy.num_steps
        return cost * rng.lognormvariate(0, 0.05)

    def shared(strategy: Strategy) -> float:
        return alone(strategy) * (5 if strategy.num_steps else 2)

    for strategy in POOL * 8:
        policy.observe(Observation(strategy, 8, (), alone(strategy)))
    assert share(play(policy, 8, 200, 0.6, alone)[100:], CHAIN, TREE) > 0.9
    assert share(play(policy, 8, steps, 0.6, shared)[steps // 2 :], OFF, NGRAM) > 0.6
    assert share(play(policy, 8, 200, 0.6, alone)[40:], CHAIN, TREE) > 0.9


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
    """Records the calls at which it chose a strategy that it did not expect to be the best."""

    def __init__(self) -> None:
        super().__init__(POOL, dwell=10)
        self.calls = 0
        self.trials: set[int] = set()

    def choose(
        self, batch_size: int, match_lengths: Sequence[int] = (), sampled: Sequence[bool] = ()
    ) -> Strategy:
        chosen = super().choose(batch_size, match_lengths, sampled)
        expected = {
            strategy: self.expected_throughput(strategy, batch_size, mix_of(batch_size))
            for strategy in POOL
        }
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
    # A strategy that was replaced sooner was a trial until then.
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


# -- acceptance and costs --------------------------------------------------------------------------


def step_of(
    strategy: Strategy,
    accepted: list[int],
    match_lengths: tuple[int, ...] = (),
    match_outcomes: tuple[tuple[int, bool], ...] = (),
) -> Observation:
    return Observation(strategy, len(accepted), accepted, 0.03, match_lengths, match_outcomes)


def test_chains_share_what_they_learn() -> None:
    acceptance = Acceptance()
    for now in range(1, 300):
        acceptance.observe(step_of(CHAIN, [3, 1, 0, 2]), now)  # 0.75, 2/3, 1/2
    assert acceptance.tokens(CHAIN, mix_of(1), 300) == pytest.approx(2.5, abs=0.1)
    assert acceptance.tokens(SHORT, mix_of(1), 300) == pytest.approx(1.75, abs=0.05)
    assert acceptance.tokens(OFF, mix_of(1), 300) == 1.0


def test_a_level_that_drops_drops_for_all() -> None:
    """A tree that was not tried since is expected to have become worse as the chain has."""
    acceptance = Acceptance()
    now = 0
    for _ in range(200):
        now += 2
        acceptance.observe(step_of(CHAIN, [2, 3, 1, 3]), now)
        acceptance.observe(step_of(TREE, [3, 3, 2, 3]), now)
    before = acceptance.tokens(TREE, mix_of(1), now)
    for _ in range(100):
        now += 1
        acceptance.observe(step_of(CHAIN, [0, 1, 0, 0]), now)
    after = acceptance.tokens(TREE, mix_of(1), now)
    assert after < 0.65 * before
    assert after > acceptance.tokens(CHAIN, mix_of(1), now)


def test_uncertainty_grows_with_time() -> None:
    acceptance = Acceptance()
    for now in range(1, 100):
        acceptance.observe(step_of(CHAIN, [1, 2]), now)

    def doubt(now: int) -> float:
        return acceptance.tokens(CHAIN, mix_of(1), now, 1.0) - acceptance.tokens(
            CHAIN, mix_of(1), now, -1.0
        )

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
    costs.observe(TREE, 1, 0.5, 9)  # an outlier by all other costs
    seconds, count, _ = costs.seconds(TREE, 1, 9)
    assert seconds is not None and seconds < 0.2 and count == 1


def test_costs_that_were_not_measured_are_derived() -> None:
    machine = bench_policy.MACHINES["cpu"]
    costs = Costs()
    for strategy in (OFF, CHAIN, TREE):
        for size in (1, 4, 16):
            for _ in range(3):
                costs.observe(strategy, size, machine.cost(strategy, size) / 1000, 1)
    for strategy, size in ((OFF, 2), (CHAIN, 8), (TREE, 2), (SHORT, 4), (SHORT, 16)):
        derived, count, _ = costs.seconds(strategy, size, 1)
        assert count == 0 and derived is not None
        assert derived == pytest.approx(machine.cost(strategy, size) / 1000, rel=0.3)


def test_one_calibration_counts_beside_the_model() -> None:
    costs = Costs()
    for strategy in (OFF, CHAIN):
        for size in (1, 4):
            for _ in range(3):
                costs.observe(strategy, size, 0.02, 0, calibrates=True)
    derived, count, _ = costs.seconds(OFF, 16, 1)
    assert derived is not None and count == 0
    costs.observe(OFF, 16, 4 * derived, 1, calibrates=True)
    once, count, _ = costs.seconds(OFF, 16, 2)
    assert once is not None and count == 1
    assert 1.2 * derived < once < 4 * derived


def test_later_measurements_correct_a_calibration_on_a_busy_machine() -> None:
    machine = bench_policy.MACHINES["cpu"]
    costs = Costs()
    for strategy in (OFF, CHAIN):
        for size in (1, 4, 16):
            for _ in range(3):
                costs.observe(strategy, size, 3 * machine.cost(strategy, size), 0, calibrates=True)
    for _ in range(3):
        costs.observe(OFF, 16, machine.cost(OFF, 16), 1)
    assert costs.seconds(OFF, 16, 1) == (machine.cost(OFF, 16), 3, 0)
    for size in (1, 4, 16):
        seconds, count, _ = costs.seconds(CHAIN, size, 1)
        assert seconds == pytest.approx(machine.cost(CHAIN, size))
        assert count == 1
    seconds, count, _ = costs.seconds(CHAIN, 8, 1)  # not calibrated
    assert seconds == pytest.approx(machine.cost(CHAIN, 8), rel=0.3)
    assert count == 0


def test_a_sudden_change_of_a_cost_is_one_of_the_machine() -> None:
    """Others count as calibrated, and changed likewise, until they are measured again."""
    machine = bench_policy.MACHINES["cpu"]
    costs, size = Costs(), 16
    true = {strategy: machine.cost(strategy, size) for strategy in (OFF, CHAIN)}
    for strategy, cost in true.items():
        for _ in range(8):
            costs.observe(strategy, size, cost, 0, calibrates=True)
            costs.observe(strategy, size, cost, 0)
    assert not costs.is_outdated(OFF, size)
    for _ in range(8):
        costs.observe(CHAIN, size, 3 * true[CHAIN], 1)
    seconds, count, _ = costs.seconds(OFF, size, 1)
    assert seconds == pytest.approx(3 * true[OFF])
    assert count == 1
    assert costs.is_outdated(OFF, size) and not costs.is_outdated(CHAIN, size)
    assert not costs.is_outdated(OFF, 1)  # where nothing has changed that is known
    for _ in range(3):
        costs.observe(OFF, size, 2 * true[OFF], 2)
    assert costs.seconds(OFF, size, 2) == (2 * true[OFF], 3, 0)
    assert not costs.is_outdated(OFF, size)


def test_a_cost_that_changes_little_by_little_is_no_change_of_the_machine() -> None:
    costs = Costs()
    for step in range(200):
        costs.observe(CHAIN, 16, 0.01 * 1.02**step, step)
    assert not costs.is_outdated(OFF, 16)


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


# -- the other policies ----------------------------------------------------------------------------


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
    assert all(share(chosen, strategy) > 0.05 for strategy in pool)


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
    """Each rank measures its own times; without agreement their choices would differ."""
    alone: list[Policy] = [CostModel(POOL), CostModel(POOL)]
    choices: list[int] = []

    def first(own: int) -> int:
        choices.append(own)
        return own

    def second(own: int) -> int:
        return choices[-1]

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
            for policy, strategy, cost in zip(
                policies, chosen, (memory_bound, compute_bound), strict=True
            ):
                policy.observe(
                    observation(strategy, [min(2, strategy.num_steps)] * 4, cost(strategy))
                )
    assert differ > 100


def test_ranks_exchange_a_choice_once_in_a_dwell() -> None:
    class Alternating(Fixed):
        """A policy that chooses another strategy at every call."""

        calls = 0

        def choose(
            self, batch_size: int, match_lengths: Sequence[int] = (), sampled: Sequence[bool] = ()
        ) -> Strategy:
            Alternating.calls += 1
            return POOL[Alternating.calls % len(POOL)]

    sent: list[int] = []

    def exchange(own: int) -> int:
        sent.append(own)
        return own

    policy = Agreed(Alternating(OFF), POOL, exchange, dwell=4)
    chosen = [policy.choose(size) for size in [8] * 8 + [7, 7] + [8]]
    assert len(sent) == 4
    assert [POOL.index(one) for one in chosen] == [1] * 4 + [2] * 4 + [3] * 2 + [4]
    policy.choose(8, [0, 3] * 4)
    assert len(sent) == 4
    policy.choose(8, [0, 5] * 4)
    assert len(sent) == 5


def test_fixed() -> None:
    assert share(play(Fixed(TREE), 3, 5, 0.5, memory_bound), TREE) == 1.0


def test_an_oracle_loses_nothing_in_the_simulation() -> None:
    """The cost model loses little, and a policy that is always off loses much."""
    world = bench_policy.World(bench_policy.MACHINES["gpu"], 0, 800)
    steps = range(len(world.sizes))
    best = [max(world.rate(strategy, i) for strategy in bench_policy.POOL) for i in steps]

    class Oracle:
        step = -1

        def choose(
            self, batch_size: int, match_lengths: Sequence[int] = (), sampled: Sequence[bool] = ()
        ) -> Strategy:
            self.step += 1
            return max(bench_policy.POOL, key=lambda strategy: world.rate(strategy, self.step))

        def observe(self, step: Observation) -> None:
            pass

    assert bench_policy.regret_of(Oracle(), world, 0, best) < bench_policy.SWITCH
    off = bench_policy.regret_of(Fixed(OFF), world, 0, best)
    model = bench_policy.regret_of(CostModel(bench_policy.POOL), world, 0, best)
    assert model < 0.1 < off


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_speculates_above_the_largest_batch(name: PolicyName) -> None:
    """This holds whatever it would choose; and no policy chooses a strategy that is not allowed."""
    chain, other = parse("eagle:3x1x4"), parse("eagle:1x1x2")
    config = Config(("eagle:3x1x4", "eagle:1x1x2", "off"), policy=name, max_batch=4)
    policy = make(config, config.pool)
    assert {str(policy.choose(5)) for _ in range(20)} == {"off"}
    narrow = make(config, config.pool, lambda batch_size: [other])
    assert {narrow.choose(2) for _ in range(20)} == {other}
    assert {str(narrow.choose(9)) for _ in range(20)} == {"off"}
    fixed = make(Config(("eagle:3x1x4", "off"), policy="fixed"), [chain, parse("off")])
    assert fixed.choose(99) == chain


# -- suffix matches --------------------------------------------------------------------------------


def test_n_grams_are_learned_by_match_length_whoever_drafts() -> None:
    acceptance = Acceptance()
    for now in range(1, 200):
        # A long match_length goes on as before, a short one does not.
        acceptance.observe(step_of(CHAIN, [1, 3], (2, 12), ((0, True), (3, False))), now)
        acceptance.observe(step_of(OFF, [0, 0], (12, 3), ((1, False), (0, True))), now)
    assert acceptance.tokens(NGRAM, mix_of(1, [12]), 200) > 3.7
    assert acceptance.tokens(NGRAM, mix_of(1, [3]), 200) < 1.2
    assert acceptance.tokens(NGRAM, mix_of(1, [0]), 200) == 1.0
    # A chain drafts some requests by itself and some from their match.
    assert acceptance.tokens(CHAIN, mix_of(2, [12, 2]), 200) == pytest.approx(
        acceptance.tokens(CHAIN, mix_of(1, [12]), 200)
        + acceptance.tokens(CHAIN, mix_of(1, [2]), 200)
    )
    assert acceptance.tokens(CHAIN, mix_of(1, [2]), 200) == acceptance.tokens(CHAIN, mix_of(1), 200)
    assert acceptance.tokens(TREE, mix_of(1, [12]), 200) == acceptance.tokens(TREE, mix_of(1), 200)


def test_the_drafter_does_not_learn_from_n_grams_in_its_chain() -> None:
    acceptance = Acceptance()
    for now in range(1, 100):
        acceptance.observe(step_of(CHAIN, [3, 0], (12, 0), ((3, False), (0, True))), now)
    assert acceptance.tokens(CHAIN, mix_of(1), 100) < 1.3
    assert acceptance.tokens(CHAIN, mix_of(1, [12]), 100) > 3.5


@pytest.mark.parametrize("match_length", [12, 3])
def test_a_match_changes_the_choice_at_once(match_length: int) -> None:
    """The dwell time holds for batches that are alike."""
    policy = CostModel(POOL, dwell=50)
    for _ in range(20):
        policy.observe(step_of(OFF, [0], (match_length,), ((7, False),)))
        for strategy in POOL:
            accepted = [1] if strategy.num_steps else [0]
            seconds = 0.02 + 0.001 * strategy.num_draft_tokens + 0.004 * strategy.num_steps
            policy.observe(Observation(strategy, 1, accepted, seconds, [0], [(0, True)]))
    before = [policy.choose(1, [0]) for _ in range(3)]
    assert NGRAM not in before
    assert policy.choose(1, [match_length]) == NGRAM
    assert policy.choose(1, [0]) != NGRAM


def test_n_grams_are_not_kept_without_a_match() -> None:
    policy = CostModel([OFF, NGRAM], dwell=50)
    for size in (1, 4):
        for _ in range(20):
            policy.observe(step_of(OFF, [0] * size, (3,) * size, ((7, False),) * size))
        assert policy.choose(size, [3] * size) == NGRAM
        assert policy.choose(size, [0] * size) == OFF


def test_a_growing_batch_changes_the_choice_at_once() -> None:
    """The best strategy for the first request of many is the worst for all of them."""
    policy = CostModel([OFF, CHAIN], dwell=50)
    for _ in range(20):
        for size in (1, 16):
            for strategy in (OFF, CHAIN):
                accepted = [3 if strategy == CHAIN else 0] * size
                seconds = 0.02 if strategy == OFF else 0.03 if size == 1 else 0.3
                policy.observe(Observation(strategy, size, accepted, seconds))
    assert [policy.choose(1) for _ in range(3)] == [CHAIN] * 3
    assert policy.choose(16) == OFF
    assert [policy.choose(1) for _ in range(3)] == [OFF] * 3  # one that shrinks waits


def test_a_trace_has_the_match_lengths() -> None:
    lines: list[str] = []
    traced = TracedPolicy(CostModel(POOL, seed=3), lines.append)
    for step in range(60):
        match_lengths = [12 if step % 7 == 0 else 0, 4]
        strategy = traced.choose(2, match_lengths)
        traced.observe(
            Observation(strategy, 2, [1, 0], 0.03, match_lengths, [(1, True), (0, True)])
        )
    again = list(replay(CostModel(POOL, seed=3), lines))
    assert len(again) == 60
    assert all(then == now for then, now in again)
