"""Which verified tokens the drafter's next pass goes over."""

from __future__ import annotations

import torch

from tlt_sglang.cpu.kernels.committed import committed


def test_the_first_tokens_of_each_request() -> None:
    counts = torch.tensor([2, 1, 4], dtype=torch.int32)
    found = committed(counts, torch.tensor([10, 0, 7]), torch.tensor([5, 3, 9]), 4)
    assert found.places.tolist() == [0, 1, 4, 8, 9, 10, 11]
    assert found.positions.tolist() == [10, 11, 0, 7, 8, 9, 10]
    assert found.rows.tolist() == [5, 5, 3, 9, 9, 9, 9]
    assert found.last.tolist() == [1, 2, 6]
    assert all(part.is_contiguous() for part in (found.places, found.positions, found.rows))
