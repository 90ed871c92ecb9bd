"""What a drafter that is put off has missed, in order, and bounded."""

from __future__ import annotations

import torch

from tlt_sglang.engine.backlog import Backlog


def features(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).unsqueeze(-1).expand(-1, 3).clone()


def test_steps_of_different_widths_are_joined_by_request() -> None:
    backlog = Backlog(1000)
    backlog.put(["a", "b"], features(1, 2), torch.tensor([11, 12]), [1, 1])
    backlog.put(["a", "b"], features(3, 4, 5, 6, 7, 8), torch.tensor([3, 4, 5, 6, 7, 8]), [2, 3])
    missed = backlog.take(["x", "b", "a"])
    assert missed is not None
    assert (missed.rows, missed.counts) == ([1, 2], [4, 3])
    assert missed.tokens.tolist() == [12, 6, 7, 8, 11, 3, 4]
    assert missed.features[:, 0].tolist() == [2, 6, 7, 8, 1, 3, 4]
    assert backlog.take(["a", "b"]) is None


def test_it_keeps_copies() -> None:
    backlog = Backlog(1000)
    hidden, tokens = features(1), torch.tensor([7])
    backlog.put(["a"], hidden, tokens, [1])
    hidden.zero_()
    tokens.zero_()
    missed = backlog.take(["a"])
    assert missed is not None and missed.tokens.tolist() == [7] and missed.features[0, 0] == 1


def test_what_is_given_is_not_copied() -> None:
    backlog = Backlog(1000)
    hidden, tokens = features(1), torch.tensor([7])
    backlog.put(["a"], hidden, tokens, [1], given=True)
    step, _, _ = backlog._waiting["a"].parts[0]
    assert step.features is hidden and step.tokens is tokens


def test_it_says_when_there_is_enough() -> None:
    """Three numbers of four bytes for each of the tokens that count."""
    backlog = Backlog(5 * 3 * 4)
    told = [backlog.put(["a", "b"], features(*range(4)), torch.arange(4), [2, 1]) for _ in range(2)]
    assert told == [False, True]
    assert backlog.nbytes == 6 * 3 * 4
    backlog.take(["a"])
    assert backlog.nbytes == 6 * 3 * 4  # a step is one block of memory
    backlog.drop(["b"])
    assert backlog.nbytes == 0


def test_requests_that_are_gone_are_dropped() -> None:
    backlog = Backlog(1000)
    backlog.put(list("abcd"), features(*range(4)), torch.arange(4), [1] * 4)
    backlog.drop(["a"])
    assert backlog.take(["a"]) is None
    backlog.put(["b"], features(1), torch.tensor([1]), [1])
    assert len(backlog) == 1
