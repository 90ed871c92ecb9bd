"""N-grams in every step: what a policy is told of them, and the requests that they draft for."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tlt_sglang.engine.driver import Driver
from tlt_sglang.engine.step import LOOKED_UP, Rollout
from tlt_sglang.engine.telemetry import Telemetry
from tlt_sglang.strategy.arms import Strategy, parse
from tlt_sglang.strategy.policy import Observation

OFF, CHAIN, TREE, NGRAM = map(parse, ("off", "eagle3:3x1x4", "eagle3:3x4x7", "ngram:8"))
POOL = (OFF, CHAIN, TREE, NGRAM)
VOCAB = 40
OLD = list(range(1, 21))
NEW = [30, 31, 32, 33]


class Asked:
    """A policy that always chooses one strategy, and notes what it is told."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.endings: list[list[int]] = []
        self.seen: list[Observation] = []

    def choose(self, batch_size: int, endings: Sequence[int] = ()) -> Strategy:
        self.endings.append(list(endings))
        return self.strategy

    def observe(self, seen: Observation) -> None:
        self.seen.append(seen)


class States:
    """As far as drafting needs them."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategies, self.current, self.topk = POOL, strategy, 4
        self.worker = SimpleNamespace(topk=strategy.topk, _draft_worker=SimpleNamespace(topk=4))

    def switch(self, strategy: Strategy) -> None:
        self.current = strategy


def rollout(policy: Asked, up_to_date: bool = True) -> Rollout:
    states: Any = States(policy.strategy)
    return Rollout(
        states,
        Driver(policy),
        Telemetry(POOL),
        ngram_memory_mb=1,
        backlog_mb=1,
        up_to_date=up_to_date,
    )


def batch(*outputs: list[int]) -> Any:
    """One request that said OLD before, and others."""
    requests = [
        SimpleNamespace(rid=str(number), origin_input_ids=OLD, output_ids=output)
        for number, output in enumerate(outputs)
    ]
    ahead = SimpleNamespace(
        topk_p=torch.ones(len(outputs), 4), topk_index=torch.ones(len(outputs), 4)
    )
    return SimpleNamespace(reqs=requests, spec_info=ahead)


def step(
    engine: Rollout, requests: Any, tokens: list[list[int]], accepted: list[int], probs: Any = None
) -> Any:
    """One decode step in which the drafter proposes 9, and these tokens are committed."""
    size, width = len(requests.reqs), engine.driver._policy.strategy.num_draft_tokens  # type: ignore[attr-defined]
    engine.batch = requests
    engine.choose(size)
    given = torch.full((size, width), 9)
    verify = SimpleNamespace(draft_token=given.flatten(), draft_probs=probs)
    told = engine.draft(lambda _: verify, requests) if width > 1 else verify
    result = SimpleNamespace(
        next_token_ids=torch.tensor([row + [0] * (width - len(row)) for row in tokens]).flatten(),
        accept_lens=torch.tensor([count + 1 for count in accepted]),
    )
    if width > 1:
        engine.draft_extend(lambda: None, requests, result)
    engine.verified(accepted)
    return told


def test_a_chain_drafts_what_followed_a_long_ending() -> None:
    policy = Asked(CHAIN)
    engine = rollout(policy)
    requests = batch(OLD[2:8], NEW)  # the first repeats its prompt
    verify = step(engine, requests, [[9, 10, 11], [35]], [2, 0])
    assert policy.endings == [[6, 0]]
    assert verify.draft_token.view(2, 4).tolist() == [[9, 9, 10, 11], [9, 9, 9, 9]]
    step(engine, requests, [[9], [35]], [0, 0])
    (seen,) = policy.seen
    assert (seen.strategy, seen.endings) == (CHAIN, [6, 0])
    assert seen.repeated == [(3, False), (0, True)]


def test_nothing_is_looked_up_while_the_driver_rests() -> None:
    policy = Asked(OFF)
    engine = rollout(policy)
    engine.driver = Driver(policy, rests=True)
    requests = batch(*[OLD[2:8]] * 12)
    found = []
    for _ in range(5):
        step(engine, requests, [[9]] * 12, [0] * 12)
        found.append(engine._found is not None)
    assert found == [True, False, False, False, True]
    assert policy.endings == [[6] * 12] * 2


def test_a_short_ending_is_left_to_the_drafter() -> None:
    policy = Asked(CHAIN)
    verify = step(rollout(policy), batch([39, 4, 5]), [[6, 7, 36]], [2])
    assert policy.endings == [[2]]
    assert verify.draft_token.tolist() == [9] * 4


def test_trees_are_the_drafters() -> None:
    policy = Asked(TREE)
    verify = step(rollout(policy), batch(OLD[2:8]), [[9]], [0])
    assert policy.endings == [[6]]
    assert verify.draft_token.tolist() == [9] * 7


def test_what_repeats_itself_is_drawn_from_a_distribution_of_one_token() -> None:
    probs = torch.full((2, 3, VOCAB), 1 / VOCAB)
    requests = batch(OLD[2:8], NEW)
    step(rollout(Asked(CHAIN)), requests, [[9], [35]], [0, 0], probs)
    assert probs[0].argmax(-1).tolist() == [9, 10, 11]
    assert torch.equal(probs[0].sort(-1).values[:, :-1], torch.zeros(3, VOCAB - 1))
    assert torch.equal(probs[0].amax(-1), torch.ones(3))
    assert torch.equal(probs[1], torch.full((3, VOCAB), 1 / VOCAB))


def test_where_less_followed_the_drafter_goes_on() -> None:
    """A sibling that is one token ahead."""
    requests = batch([*NEW, 34], NEW)
    verify = step(rollout(Asked(CHAIN)), requests, [[35], [34]], [0, 0])
    assert verify.draft_token.view(2, 4).tolist() == [[9, 9, 9, 9], [9, 34, 9, 9]]


def test_a_strategy_that_is_pinned_is_what_it_says() -> None:
    engine = rollout(Asked(CHAIN))
    engine.pin(POOL.index(CHAIN))
    verify = step(engine, batch(OLD[2:8]), [[9]], [0])
    assert verify.draft_token.tolist() == [9] * 4


def test_the_guard_is_not_told_of_them() -> None:
    policy = Asked(CHAIN)
    engine = rollout(policy)
    requests = batch(OLD[2:8], NEW)
    engine.batch = requests
    engine.choose(2)
    verify = SimpleNamespace(draft_token=torch.full((8,), 9), draft_probs=None)
    engine.draft(lambda _: verify, requests)
    result = SimpleNamespace(
        next_token_ids=torch.zeros(8), accept_lens=torch.ones(2, dtype=torch.int64)
    )
    engine.draft_extend(lambda: None, requests, result)
    assert engine.verified([3, 0]) == (CHAIN, [0])


@pytest.mark.parametrize(("up_to_date", "size"), [(False, 1), (True, LOOKED_UP + 1)])
def test_nothing_is_looked_up_where_it_cannot_be_or_takes_too_long(
    up_to_date: bool, size: int
) -> None:
    policy = Asked(CHAIN)
    requests = batch(*[OLD[2:8]] * size)
    verify = step(rollout(policy, up_to_date), requests, [[9]] * size, [0] * size)
    assert policy.endings == [[]]
    assert set(verify.draft_token.tolist()) == {9}
