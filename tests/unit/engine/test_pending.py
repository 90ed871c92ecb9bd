"""Tokens pending for a deferred drafter stay in order and within their limit."""

from __future__ import annotations

import torch

from tlt_sglang.engine.pending import PendingTokens
from tlt_sglang.engine.to_device import LateCounts


def features(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).unsqueeze(-1).expand(-1, 3).clone()


def test_steps_of_different_widths_are_joined_by_request() -> None:
    pending = PendingTokens(1000)
    pending.put(["a", "b"], features(1, 2), torch.tensor([11, 12]), [1, 1])
    pending.put(["a", "b"], features(3, 4, 5, 6, 7, 8), torch.tensor([3, 4, 5, 6, 7, 8]), [2, 3])
    batch = pending.take(["x", "b", "a"])
    assert batch is not None
    assert (batch.rows, batch.counts) == ([1, 2], [4, 3])
    assert batch.tokens.tolist() == [12, 6, 7, 8, 11, 3, 4]
    assert batch.features[:, 0].tolist() == [2, 6, 7, 8, 1, 3, 4]
    assert pending.take(["a", "b"]) is None


def test_it_keeps_copies() -> None:
    pending = PendingTokens(1000)
    hidden, tokens = features(1), torch.tensor([7])
    pending.put(["a"], hidden, tokens, [1])
    hidden.zero_()
    tokens.zero_()
    batch = pending.take(["a"])
    assert batch is not None and batch.tokens.tolist() == [7] and batch.features[0, 0] == 1


def test_without_copy_it_keeps_the_tensors() -> None:
    pending = PendingTokens(1000)
    hidden, tokens = features(1), torch.tensor([7])
    pending.put(["a"], hidden, tokens, [1], copy=False)
    block, _ = pending._requests["a"][0]
    assert block.features is hidden and block.tokens is tokens


def test_counts_that_come_late_are_read_when_the_drafter_catches_up() -> None:
    pending = PendingTokens(1000)
    counts = LateCounts(torch.tensor([2, 1]))
    pending.put(["a", "b"], features(*range(6)), torch.arange(6), counts)
    pending.put(["a", "b"], features(6, 7), torch.tensor([6, 7]), [1, 1])
    batch = pending.take(["a", "b"], last_steps=1)
    assert batch is not None
    assert (batch.counts, batch.recent) == ([3, 2], [1, 1])
    assert batch.tokens.tolist() == [0, 1, 6, 3, 7]
    assert batch.features[:, 0].tolist() == [0, 1, 6, 3, 7]


def test_it_returns_whether_the_limit_is_reached() -> None:
    """Three numbers of four bytes for each of the tokens that count."""
    pending = PendingTokens(5 * 3 * 4)
    full = [pending.put(["a", "b"], features(*range(4)), torch.arange(4), [2, 1]) for _ in range(2)]
    assert full == [False, True]
    assert pending.nbytes == 6 * 3 * 4
    pending.take(["a"])
    assert pending.nbytes == 6 * 3 * 4  # a step is one block of memory
    pending.drop(["b"])
    assert pending.nbytes == 0


def test_ended_requests_are_dropped() -> None:
    pending = PendingTokens(1000)
    pending.put(list("abcd"), features(*range(4)), torch.arange(4), [1] * 4)
    pending.drop(["a"])
    assert pending.take(["a"]) is None
    pending.put(["b"], features(1), torch.tensor([1]), [1])
    assert len(pending) == 1


def test_what_ended_requests_have_left_does_not_reach_the_limit() -> None:
    """In the tail of a rollout requests end one by one while the engine decodes plainly."""
    pending = PendingTokens(4 * 3 * 4)
    full = [pending.put([name], features(1, 2), torch.arange(2), [2]) for name in "abcd"]
    assert full == [False] * 4 and len(pending) <= 2
    assert pending.put(["d"], features(1, 2, 3, 4), torch.arange(4), [4])


def test_tokens_of_the_last_steps() -> None:
    """Requests do not hold the tokens of steps in flight themselves."""
    pending = PendingTokens(1000)
    pending.put(["a"], features(1), torch.tensor([1]), [1])
    pending.put(["a", "b"], features(2, 3, 4, 5), torch.arange(4), [2, 1])
    for steps, recent in ((0, [0]), (1, [2]), (2, [3]), (3, None)):
        batch = pending.take(["a"], steps)
        assert batch is not None and batch.recent == recent
        pending.put(["a"], features(1), torch.tensor([1]), [1])
        pending.put(["a"], features(2, 3), torch.arange(2), [2])
    batch = pending.take(["a", "b"], 2)
    assert batch is not None and batch.recent is None  # b has one step
