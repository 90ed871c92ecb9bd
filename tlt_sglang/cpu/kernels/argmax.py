"""The most likely token of each row of logits, on every core.

A row is read once, in blocks of which only the largest number is looked for; where it stands is
looked up in the best block alone. Floats are compared by their bits, as integers, of which LLVM
makes vectors.

Runs in the scheduler process. Knows nothing of SGLang.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, types

from tlt_sglang.cpu.kernels.compile import Array, inline
from tlt_sglang.cpu.kernels.team import next_item, pointer_to, start

BLOCK = 1024
WORTH_A_TEAM = 65_536
"""Numbers from which on the other cores are worth waking."""

_MAGNITUDE, _INFINITY, _MOST = np.int32(0x7FFFFFFF), np.int32(0x7F800000), np.int32(0x7FFFFFFF)
"""Of the bits of a float32: all but the sign; infinity; what no number has."""


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The place of the first of the largest of each row: [T, V] float32 -> [T] int64.

    As torch has it: what is not a number (NaN) is larger than any that is.
    """
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    rows, width = logits.shape
    out = torch.empty(rows, dtype=torch.int64)
    data = np.array([0, rows, width, logits.stride(0), logits.data_ptr(), out.data_ptr()], np.int64)
    together = rows > 1 and rows * width >= WORTH_A_TEAM
    start(together)(_task.address, data.ctypes.data)
    return out


@inline()
def _order(bits: Any) -> Any:
    """An integer for the bits of a float32: the larger, the larger the number."""
    size = np.int32(bits & _MAGNITUDE)
    signed = size if bits >= 0 else np.int32(-size)
    return signed if size <= _INFINITY else _MOST


@inline()
def largest_order(part: Array) -> Any:
    """The largest of what orders some numbers, given as their bits."""
    largest = np.int32(-_MOST)
    for i in range(part.size):
        order = _order(part[i])
        largest = order if order > largest else largest
    return largest


@inline()
def first_of_largest(row: Array) -> int:
    """The place of the first of the largest of some numbers, given as their bits."""
    best, block = np.int32(-_MOST), 0
    for begin in range(0, row.size, BLOCK):
        largest = largest_order(row[begin : begin + BLOCK])
        if largest > best:
            best, block = largest, begin
    for i in range(block, min(block + BLOCK, row.size)):
        if _order(row[i]) == best:
            return i
    return block


def _work(pointer: Any) -> None:
    """What each thread of the team does: one row after the other."""
    data = carray(pointer, (6,), np.int64)
    rows, width, stride = data[1], data[2], data[3]
    out = carray(pointer_to(data[5]), (rows,), np.int64)
    while True:
        row = next_item(data.ctypes.data)
        if row >= rows:
            return
        logits = carray(pointer_to(data[4] + row * stride * 4), (width,), np.int32)
        out[row] = first_of_largest(logits)


_task = cfunc(types.void(types.voidptr), nopython=True, cache=True)(_work)
