"""The committed tokens of a verify step, as the drafter's draft-extend reads them.

Shapes: B requests, W verified tokens per request, T committed tokens of all requests.

Runs in the scheduler process. Knows nothing of SGLang.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tlt_sglang.cpu.kernels.compile import Array, indices, kernel


@dataclass(frozen=True, slots=True)
class Committed:
    """The committed tokens of a verify step, one request after the other."""

    indices: torch.Tensor  # [T] int64: among the B * W verified tokens
    positions: torch.Tensor  # [T] int64
    rows: torch.Tensor  # [T] int64: rows of the request table
    last: torch.Tensor  # [B] int64: index of each request's last token in the three above


def committed(
    counts: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor, width: int
) -> Committed:
    """Return the first counts[i] of the `width` tokens of request i, after lengths[i] others."""
    size = len(counts)
    table = torch.empty((3, size * width), dtype=torch.int64)
    last = torch.empty(size, dtype=torch.int64)
    total = _fill(
        indices(counts), indices(lengths), indices(rows), width, table.numpy(), last.numpy()
    )
    return Committed(table[0, :total], table[1, :total], table[2, :total], last)


@kernel("int64(int64[::1], int64[::1], int64[::1], int64, int64[:, ::1], int64[::1])")
def _fill(counts: Array, lengths: Array, rows: Array, width: int, out: Array, last: Array) -> int:
    at = 0
    for i in range(counts.shape[0]):
        for j in range(counts[i]):
            out[0, at] = i * width + j
            out[1, at] = lengths[i] + j
            out[2, at] = rows[i]
            at += 1
        last[i] = at - 1
    return at
