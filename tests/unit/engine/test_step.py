"""N-gram matches in every step: what the policy sees of them, and the requests they draft for."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tlt_sglang.engine.driver import Driver
from tlt_sglang.engine.ngram_drafting import MAX_LOOKUP_BATCH
from tlt_sglang.engine.online_drafter import OnlineDrafter
from tlt_sglang.engine.pool import Pool
from tlt_sglang.engine.step import SpeculationStep
from tlt_sglang.engine.telemetry import Telemetry
from tlt_sglang.strategy.acceptance import Acceptance
from tlt_sglang.strategy.policy import Observation
from tlt_sglang.strategy.strategies import Strategy, parse

OFF, CHAIN, TREE, NGRAM = map(parse, ("off", "eagle3:3x1x4", "eagle3:3x4x7", "ngram:8"))
POOL = (OFF, CHAIN, TREE, NGRAM)
OLD = list(range(1, 21))
NEW = [30, 31, 32, 33]
GREEDY, SAMPLED = (SimpleNamespace(top_k=k, custom_params=None) for k in (1, 1 << 30))


class RecordingPolicy:
    """A policy that always chooses one strategy, and keeps what it is asked and observes."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.match_lengths: list[list[int]] = []
        self.observed: list[Observation] = []
        self.sampled: Sequence[bool] = ()

    def choose(
        self, batch_size: int, match_lengths: Sequence[int] = (), sampled: Sequence[bool] = ()
    ) -> Strategy:
        self.sampled = sampled
        self.match_lengths.append(list(match_lengths))
        return self.strategy

    def observe(self, step: Observation) -> None:
        self.observed.append(step)


class States:
    """As far as drafting needs them."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategies, self.current, self.topk = POOL, strategy, 4
        self.worker = SimpleNamespace(topk=strategy.topk, _draft_worker=SimpleNamespace(topk=4))

    def switch(self, strategy: Strategy) -> None:
        self.current = strategy


def pool(policy: RecordingPolicy) -> Pool:
    states: Any = States(policy.strategy)
    return Pool(states, Driver(policy), Telemetry(POOL), ngram_memory_mb=1, pending_mb=1)


def batch(*outputs: list[int]) -> Any:
    """One request that said OLD before, and others."""
    requests = [
        SimpleNamespace(
            rid=str(number), origin_input_ids=OLD, output_ids=output, sampling_params=GREEDY
        )
        for number, output in enumerate(outputs)
    ]
    draft_input = SimpleNamespace(
        topk_p=torch.ones(len(outputs), 4),
        topk_index=torch.ones(len(outputs), 4),
        bonus_tokens=torch.zeros(len(outputs), dtype=torch.int32),
    )
    lengths = torch.zeros(len(outputs), dtype=torch.int64)
    return SimpleNamespace(reqs=requests, spec_info=draft_input, seq_lens=lengths)


def step(engine: Pool, requests: Any, tokens: list[list[int]], accepted: list[int]) -> Any:
    """One decode step in which the drafter proposes 9, and these tokens are committed."""
    size, width = len(requests.reqs), engine.driver._policy.strategy.num_draft_tokens  # type: ignore[attr-defined]
    engine.choose(requests)
    proposed = torch.full((size, width), 9)
    verify = SimpleNamespace(draft_token=proposed.flatten())
    verify_input = engine.draft(lambda _: verify, requests) if width > 1 else verify
    result = SimpleNamespace(
        next_token_ids=torch.tensor([row + [0] * (width - len(row)) for row in tokens]).flatten(),
        accept_lens=torch.tensor([count + 1 for count in accepted]),
    )
    if width > 1:
        engine.draft_extend(lambda: None, requests, result)
    engine.verified(accepted)
    return verify_input


def step_in_flight(engine: Pool, requests: Any, tokens: list[list[int]]) -> Any:
    """Launch a decode step that commits these tokens; the host does not learn that yet."""
    size = len(requests.reqs)
    engine.choose(requests)
    verify = SimpleNamespace(draft_token=torch.full((size * 4,), 9))
    engine.draft(lambda _: verify, requests)
    result: Any = SimpleNamespace(
        next_token_ids=torch.tensor([row + [0] * (4 - len(row)) for row in tokens]).flatten(),
        accept_lens=torch.tensor([len(row) for row in tokens]),
    )
    engine.draft_extend(lambda: None, requests, result)
    return verify


def test_a_chain_drafts_the_continuation_of_a_long_match() -> None:
    policy = RecordingPolicy(CHAIN)
    engine = pool(policy)
    requests = batch(OLD[2:8], NEW)  # the first repeats its prompt
    verify = step(engine, requests, [[9, 10, 11], [35]], [2, 0])
    assert policy.match_lengths == [[6, 0]]
    assert verify.draft_token.view(2, 4).tolist() == [[9, 9, 10, 11], [9, 9, 9, 9]]
    step(engine, requests, [[9], [35]], [0, 0])
    (observation,) = policy.observed
    assert (observation.strategy, observation.match_lengths) == (CHAIN, [6, 0])
    assert observation.match_outcomes == [(3, False), (0, True)]


def test_a_chain_drafts_the_output_that_the_client_predicts() -> None:
    engine = pool(RecordingPolicy(CHAIN))
    output: list[int] = []
    requests = batch(output)
    expected = {"predicted_output": [31, 32, 33, 34]}
    requests.reqs[0].sampling_params = SimpleNamespace(top_k=1, custom_params=expected)
    engine.prefill(lambda: None, requests)
    output.append(31)
    verify = step(engine, requests, [[32, 9]], [1])
    assert verify.draft_token.tolist() == [9, 32, 33, 34]
    output += [32, 9]  # the text has left the prediction
    verify = step(engine, requests, [[9]], [0])
    assert verify.draft_token.tolist() == [9] * 4


def test_nothing_is_looked_up_while_the_driver_rests() -> None:
    policy = RecordingPolicy(OFF)
    engine = pool(policy)
    engine.driver = Driver(policy, plain_runs=True)
    requests = batch(*[OLD[2:8]] * 12)
    looked_up = []
    for _ in range(5):
        step(engine, requests, [[9]] * 12, [0] * 12)
        assert engine.ngrams is not None
        looked_up.append(engine.ngrams.matches is not None)
    assert looked_up == [True, False, False, False, True]
    assert policy.match_lengths == [[6] * 12] * 2


def test_a_short_match_is_left_to_the_drafter() -> None:
    policy = RecordingPolicy(CHAIN)
    verify = step(pool(policy), batch([39, 4, 5]), [[6, 7, 36]], [2])
    assert policy.match_lengths == [[2]]
    assert verify.draft_token.tolist() == [9] * 4


def test_a_tree_is_drafted_by_the_drafter_alone() -> None:
    policy = RecordingPolicy(TREE)
    verify = step(pool(policy), batch(OLD[2:8]), [[9]], [0])
    assert policy.match_lengths == [[6]]
    assert verify.draft_token.tolist() == [9] * 7


def test_the_drafter_continues_after_a_short_continuation() -> None:
    """A sibling that is one token draft_input."""
    requests = batch([*NEW, 34], NEW)
    verify = step(pool(RecordingPolicy(CHAIN)), requests, [[35], [34]], [0, 0])
    assert verify.draft_token.view(2, 4).tolist() == [[9, 9, 9, 9], [9, 34, 9, 9]]


def test_a_pinned_strategy_drafts_without_matches() -> None:
    engine = pool(RecordingPolicy(CHAIN))
    engine.pin(POOL.index(CHAIN))
    verify = step(engine, batch(OLD[2:8]), [[9]], [0])
    assert verify.draft_token.tolist() == [9] * 4


def test_requests_with_a_match_are_returned_with_the_strategy() -> None:
    policy = RecordingPolicy(CHAIN)
    engine = pool(policy)
    requests = batch(OLD[2:8], NEW)
    engine.choose(requests)
    verify = SimpleNamespace(draft_token=torch.full((8,), 9))
    engine.draft(lambda _: verify, requests)
    result = SimpleNamespace(
        next_token_ids=torch.zeros(8), accept_lens=torch.ones(2, dtype=torch.int64)
    )
    engine.draft_extend(lambda: None, requests, result)
    assert engine.verified([3, 0]) == (CHAIN, [0])


def test_matches_are_not_looked_up_in_large_batches() -> None:
    policy = RecordingPolicy(CHAIN)
    size = MAX_LOOKUP_BATCH + 1
    verify = step(pool(policy), batch(*[OLD[2:8]] * size), [[9]] * size, [0] * size)
    assert policy.match_lengths == [[]]
    assert set(verify.draft_token.tolist()) == {9}


def test_a_match_is_aligned_with_the_tokens_of_the_step_in_flight() -> None:
    """The first goes on as its match does, the second does not, the third was in no step."""
    engine, requests = pool(RecordingPolicy(CHAIN)), batch(OLD[2:8], OLD[4:10], OLD[1:5])
    others = batch(OLD[2:8], OLD[4:10])
    for tokens in ([9, 10], [0, 0]):
        assert step_in_flight(engine, others, [tokens, [11, 20]]) is not None
        verify = step_in_flight(engine, requests, [[11], [35], [6]])
        drafts = verify.draft_token.view(3, 4).tolist()
        same = tokens == [9, 10]
        assert drafts == [[9, 11, 12, 13] if same else [9] * 4, [9] * 4, [9, 6, 7, 8]]
        for _ in range(2):
            engine.verified([1, 1, 0])
        engine.flush()


def test_a_match_is_aligned_with_the_token_of_a_prefill() -> None:
    """The host does not know it yet; the third request has been prefilled before."""
    engine, requests = pool(RecordingPolicy(CHAIN)), batch([], [], OLD[1:5])
    requests.reqs[0].origin_input_ids = requests.reqs[1].origin_input_ids = [*OLD, 39, *OLD[2:8]]
    prefilled: Any = SimpleNamespace(reqs=requests.reqs[:2])
    engine.prefill(lambda: None, prefilled)
    requests.spec_info.bonus_tokens = torch.tensor([9, 35, 6])
    verify = step_in_flight(engine, requests, [[10], [35], [6]])
    assert verify.draft_token.view(3, 4).tolist() == [[9, 10, 11, 12], [9] * 4, [9, 6, 7, 8]]


def test_a_match_is_not_used_where_more_than_one_step_is_in_flight() -> None:
    engine, requests = pool(RecordingPolicy(CHAIN)), batch(OLD[2:8])
    for _ in range(2):
        step_in_flight(engine, requests, [[9]])
    verify = step_in_flight(engine, requests, [[10]])
    assert verify.draft_token.tolist() == [9] * 4


def test_the_narrowest_strategy_runs_where_slots_are_short() -> None:
    policy = RecordingPolicy(CHAIN)
    engine = pool(policy)
    engine.choose(batch(OLD[:6]), slots_short=True)
    assert engine.states.current == OFF
    assert policy.match_lengths == []


def test_what_a_step_computes_of_an_ended_request_does_not_count() -> None:
    """With overlap scheduling the step after its last token has begun when its end is known."""
    counted: list[Any] = []
    online: Any = SimpleNamespace(
        log_verify_step=lambda batch, result: None,
        count_accepted=lambda *arguments: counted.append(arguments),
    )
    one = SpeculationStep(telemetry=Telemetry([CHAIN]), online_drafter=online)
    more: dict[str, Any] = {"sampling_params": SAMPLED}
    requests = [
        SimpleNamespace(rid="goes on", **more, finished=lambda: False, is_retracted=False),
        SimpleNamespace(rid="ended", **more, finished=lambda: True, is_retracted=False),
        SimpleNamespace(rid="retracted", **more, finished=lambda: False, is_retracted=True),
    ]
    for reqs in (requests[:1], requests):
        stepped: Any = SimpleNamespace(reqs=reqs)
        one.draft_extend(lambda: None, stepped, stepped)
    one.verified([3])
    one.verified([2, 1, 1])
    assert counted == [([n], ["goes on"], str(CHAIN), (), [True]) for n in (3, 2)]
    assert one.telemetry is not None
    tally = one.telemetry.tallies[CHAIN]
    assert (tally.verify_steps, tally.accepted) == (2, 5)
    assert (tally.sampled_verify_steps, tally.sampled_accepted) == (2, 5)


def test_cut_drafts_do_not_tell_against_the_drafter() -> None:
    counted: list[Any] = []
    online: Any = SimpleNamespace(
        log_verify_step=lambda batch, result: None,
        count_accepted=lambda *arguments: counted.append(arguments),
    )
    one = SpeculationStep(telemetry=Telemetry([CHAIN]), online_drafter=online)
    watched: list[list[int]] = []
    one._watch = watched.append  # type: ignore[method-assign, assignment]
    more: dict[str, Any] = {"sampling_params": SAMPLED, "is_retracted": False}
    ended = SimpleNamespace(rid="ended", **more, finished=lambda: True)
    others = [SimpleNamespace(rid=name, **more, finished=lambda: False) for name in "ab"]
    stepped: Any = SimpleNamespace(reqs=[ended, *others])
    one.cut = {0, 2}
    one.draft_extend(lambda: None, stepped, stepped)
    one.draft_extend(lambda: None, stepped, stepped)
    for accepted in ([1, 3, 0], [1, 3, 2]):
        one.verified(accepted)
    assert watched == [[3], [3, 2]]
    assert [matched for _, _, _, matched, _ in counted] == [[1], ()]


def test_matches_of_an_ended_request_do_not_count_either() -> None:
    """With overlap scheduling n-grams have drafted for it before its end is known."""
    policy = RecordingPolicy(CHAIN)
    one = SpeculationStep(pool=pool(policy))
    requests = batch(NEW, OLD[2:8], [39, 4, 5])
    for request in requests.reqs:
        request.finished, request.is_retracted = (lambda: False), False
    result = SimpleNamespace(
        next_token_ids=torch.tensor([0, 0, 0, 0, 9, 0, 0, 0, 6, 0, 0, 0]),
        accept_lens=torch.ones(3, dtype=torch.int64),
    )
    verify = SimpleNamespace(draft_token=torch.full((12,), 9))
    for accepted in ([0, 3, 0], [0, 0, 0]):
        one.choose(requests)
        one.draft(lambda _: verify, requests, 1)
        one.draft_extend(lambda: None, requests, result)
        requests.reqs[0].finished = lambda: True
        one.verified(accepted)
    (observation,) = policy.observed
    assert (observation.accepted, observation.match_lengths) == ([3, 0], [6, 2])
    assert observation.match_outcomes == [(1, False), (1, False)]
    Acceptance().observe(observation, 1)


def test_greedy_and_sampled_requests_are_compared_apart_after_a_swap() -> None:
    """Else a drafter would look worse than the one before as soon as sampled requests arrive."""
    observed: list[Any] = []
    online = object.__new__(OnlineDrafter)
    swap: Any = SimpleNamespace(observe=lambda *arguments: observed.append(arguments))
    online.swap, online._committed = swap, 0
    online.count_accepted(
        [3, 1, 2, 0], ["a", "b", "c", "d"], "chain", [3], [False, True, False, True]
    )
    assert observed == [(["a", "c"], [3, 2], "chain"), (["b"], [1], "chain sampled")]


def test_an_idle_engine_waits_for_the_other_parts_of_an_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, begun = [0.0], list[float]()
    monkeypatch.setattr("tlt_sglang.engine.online_drafter.time.monotonic", lambda: now[0])
    online = object.__new__(OnlineDrafter)
    swap: Any = SimpleNamespace(
        is_single_rank=True, swap_in=lambda: None, target_changed=lambda: begun.append(now[0])
    )
    online.swap, online.harvester, online._harvests = swap, None, False
    online._updater = None
    for now[0] in (0.0, 0.4, 0.8):  # three buckets
        online.mark_target_updated()
        online.idle()
    now[0] = 1.7
    online.idle()
    assert begun == []
    now[0] = 1.9
    online.idle()
    assert begun == [1.9]
    now[0] = 2.0
    online.mark_target_updated()
    online.swap_in()  # a step: what it computes is of the new version
    assert begun == [1.9, 2.0]


def test_nothing_is_taken_inside_a_session_of_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step between two buckets would leave a drafter that is half the client's."""
    writable, taken = [False], list[str]()
    monkeypatch.setattr("tlt_sglang.engine.drafter_weights.writable", lambda _: writable[0])
    online: Any = object.__new__(OnlineDrafter)
    online.swap = SimpleNamespace(
        swap_in=lambda: taken.append("swap"), target_changed=lambda: taken.append("target")
    )
    online._updater, online._harvests = SimpleNamespace(), False
    online.mark_target_updated()
    online.swap_in()
    assert taken == []
    writable[0] = True
    online.swap_in()
    assert taken == ["target", "swap"]


def test_the_policy_knows_which_requests_are_sampled() -> None:
    policy = RecordingPolicy(CHAIN)
    one = SpeculationStep(pool=pool(policy))
    requests = batch(NEW, NEW, NEW)
    requests.reqs[1].sampling_params = SAMPLED
    for request in requests.reqs:
        request.finished, request.is_retracted = (lambda: False), False
    result = SimpleNamespace(
        next_token_ids=torch.zeros(12), accept_lens=torch.ones(3, dtype=torch.int64)
    )
    verify = SimpleNamespace(draft_token=torch.full((12,), 9))
    for accepted in ([3, 1, 2], [0, 0, 0]):
        one.choose(requests)
        assert policy.sampled == [False, True, False]
        one.draft(lambda _: verify, requests, 4)
        one.draft_extend(lambda: None, requests, result)
        one.verified(accepted)
    (observation,) = policy.observed
    assert (observation.accepted, observation.sampled) == ([3, 1, 2], [False, True, False])
    assert one.pool is not None
    tally = one.pool._telemetry.tallies[CHAIN]
    assert (tally.verify_steps, tally.sampled_verify_steps, tally.sampled_accepted) == (6, 2, 1)
