"""The committed tokens of a verify step, which the drafter's next pass reads."""

from __future__ import annotations

import torch

from tlt_sglang.cpu.kernels.committed import committed


def test_the_first_tokens_of_each_request() -> None:
    counts = torch.tensor([2, 1, 4], dtype=torch.int32)
    tokens = committed(counts, torch.tensor([10, 0, 7]), torch.tensor([5, 3, 9]), 4)
    assert tokens.indices.tolist() == [0, 1, 4, 8, 9, 10, 11]
    assert tokens.positions.tolist() == [10, 11, 0, 7, 8, 9, 10]
    assert tokens.rows.tolist() == [5, 5, 3, 9, 9, 9, 9]
    assert tokens.last.tolist() == [1, 2, 6]
    assert all(part.is_contiguous() for part in (tokens.indices, tokens.positions, tokens.rows))
