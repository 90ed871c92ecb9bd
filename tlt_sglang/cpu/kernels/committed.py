"""Which of the tokens that were verified are committed, as the drafter's next pass sees them.

Shapes: B requests, W tokens verified of each, T of all of them committed.

Runs in the scheduler process. Knows nothing of SGLang.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tlt_sglang.cpu.kernels.compile import Array, indices, kernel


@dataclass(frozen=True, slots=True)
class Committed:
    """Of a verify step, one request after the other."""

    places: torch.Tensor  # [T] int64: among the B * W that were verified
    positions: torch.Tensor  # [T] int64
    rows: torch.Tensor  # [T] int64: of the request table
    last: torch.Tensor  # [B] int64: the place in the three above of each request's last token


def committed(
    counts: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor, width: int
) -> Committed:
    """The first counts[i] of the `width` tokens of each request i, which had lengths[i] before."""
    size = len(counts)
    told = torch.empty((3, size * width), dtype=torch.int64)
    last = torch.empty(size, dtype=torch.int64)
    total = _list(
        indices(counts), indices(lengths), indices(rows), width, told.numpy(), last.numpy()
    )
    return Committed(told[0, :total], told[1, :total], told[2, :total], last)


@kernel("int64(int64[::1], int64[::1], int64[::1], int64, int64[:, ::1], int64[::1])")
def _list(counts: Array, lengths: Array, rows: Array, width: int, out: Array, last: Array) -> int:
    at = 0
    for i in range(counts.shape[0]):
        for j in range(counts[i]):
            out[0, at] = i * width + j
            out[1, at] = lengths[i] + j
            out[2, at] = rows[i]
            at += 1
        last[i] = at - 1
    return at
