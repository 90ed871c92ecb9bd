"""Greedy and sampled requests: acceptance is learned apart, and a mixed batch counts both."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from tlt_sglang.strategy.acceptance import Acceptance, mix_of
from tlt_sglang.strategy.cost_model import CostModel
from tlt_sglang.strategy.policy import Observation
from tlt_sglang.strategy.strategies import Strategy, parse
from tlt_sglang.strategy.trace import TracedPolicy, replay

OFF, CHAIN, NGRAM = parse("off"), parse("eagle3:3x1x4"), parse("ngram:4")
GREEDY, SAMPLED = False, True
COST = {OFF: 0.02, CHAIN: 0.05}
"""The chain pays from an accept length of 2.5 on."""


def step(strategy: Strategy, sampled: Sequence[bool]) -> Observation:
    """Return a step in which the chain has all of a greedy request's drafts accepted, or none."""
    accepted = [0 if flag or strategy == OFF else 3 for flag in sampled]
    return Observation(strategy, len(accepted), accepted, COST[strategy], sampled=sampled)


def learned() -> CostModel:
    """Return a policy that has seen batches of either kind alone."""
    policy = CostModel([OFF, CHAIN], dwell=1)
    for _ in range(60):
        for kind in (GREEDY, SAMPLED):
            for strategy in (OFF, CHAIN):
                policy.choose(4, sampled=[kind] * 4)
                policy.observe(step(strategy, [kind] * 4))
    return policy


def test_sampled_requests_are_not_judged_by_greedy_acceptance() -> None:
    policy = learned()
    for _ in range(3):
        assert policy.choose(4) == CHAIN
        assert policy.choose(4, sampled=[SAMPLED] * 4) == OFF


@pytest.mark.parametrize(("sampled", "best"), [(1, CHAIN), (3, OFF)])
def test_a_mixed_batch_counts_its_requests_of_either_kind(sampled: int, best: Strategy) -> None:
    flags = [SAMPLED] * sampled + [GREEDY] * (4 - sampled)
    policy = learned()
    assert {policy.choose(4, sampled=flags) for _ in range(3)} == {best}
    tokens = [
        policy.acceptance.tokens(CHAIN, mix_of(4, sampled=kinds), 480)
        for kinds in (flags, [GREEDY] * 4, [SAMPLED] * 4)
    ]
    assert tokens[0] == pytest.approx(((4 - sampled) * tokens[1] + sampled * tokens[2]) / 4)
    assert tokens[1] > 15 and tokens[2] < 5


def test_in_a_mixed_batch_each_request_teaches_its_own_kind() -> None:
    acceptance = Acceptance()
    for now in range(1, 200):
        acceptance.observe(step(CHAIN, [SAMPLED, GREEDY, SAMPLED]), now)
    assert acceptance.tokens(CHAIN, mix_of(1), 200) > 3.8
    assert acceptance.tokens(CHAIN, mix_of(1, sampled=[SAMPLED]), 200) < 1.1


def test_n_grams_are_learned_apart_too() -> None:
    acceptance = Acceptance()
    outcomes = ((3, False), (0, True))
    for now in range(1, 200):
        observed = Observation(OFF, 2, [0, 0], 0.03, (8, 8), outcomes, (GREEDY, SAMPLED))
        acceptance.observe(observed, now)
    assert acceptance.tokens(NGRAM, mix_of(1, [8], [GREEDY]), 200) > 3.5
    assert acceptance.tokens(NGRAM, mix_of(1, [8], [SAMPLED]), 200) < 1.2


def test_a_trace_has_the_kinds_and_older_traces_replay_without() -> None:
    lines: list[str] = []
    traced = TracedPolicy(CostModel([OFF, CHAIN]), lines.append)
    for number in range(80):
        sampled = [SAMPLED, GREEDY] if number % 20 < 10 else [GREEDY, GREEDY]
        traced.observe(step(traced.choose(2, sampled=sampled), sampled))
    choices = list(replay(CostModel([OFF, CHAIN]), lines))
    assert len(choices) == 80 and all(then == now for then, now in choices)

    lines.clear()
    greedy = TracedPolicy(CostModel([OFF, CHAIN]), lines.append)
    for _ in range(80):
        greedy.observe(step(greedy.choose(2), [GREEDY] * 2))
    older = [json.dumps(json.loads(line)[:-1]) + "\n" for line in lines]
    choices = list(replay(CostModel([OFF, CHAIN]), older))
    assert len(choices) == 80 and all(then == now for then, now in choices)
