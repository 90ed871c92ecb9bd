"""Argmax over each row of logits, on every core.

A row is read once, in blocks: only the largest number of each block is computed, and its index is
searched in the best block alone. Floats are compared by their bits, as integers, which LLVM
vectorises.

Runs in the scheduler process. Knows nothing of SGLang.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, cfunc, types

from tlt_sglang.cpu.kernels.compile import Array, inline
from tlt_sglang.cpu.kernels.team import next_item, pointer_to, start

BLOCK = 1024
PARALLEL_SIZE = 65_536
"""Inputs with fewer numbers are computed by one thread, as waking the others takes longer."""

_MAGNITUDE, _INFINITY, _LARGEST = np.int32(0x7FFFFFFF), np.int32(0x7F800000), np.int32(0x7FFFFFFF)
"""Bits of a float32: all but the sign; infinity; and the key of NaN, above any number's."""


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Return the first index of the largest number of each row: [T, V] float32 -> [T] int64.

    As in torch, NaN is larger than any number.
    """
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    rows, width = logits.shape
    out = torch.empty(rows, dtype=torch.int64)
    data = np.array([0, rows, width, logits.stride(0), logits.data_ptr(), out.data_ptr()], np.int64)
    parallel = rows > 1 and rows * width >= PARALLEL_SIZE
    start(parallel)(_task.address, data.ctypes.data)
    return out


@inline()
def _sort_key(bits: np.int32) -> np.int32:
    """Map the bits of a float32 to an integer that is ordered like the number."""
    size = np.int32(bits & _MAGNITUDE)
    signed = size if bits >= 0 else np.int32(-size)
    return signed if size <= _INFINITY else _LARGEST


@inline()
def largest_key(part: Array) -> np.int32:
    """Return the largest sort key of numbers that are passed as their bits."""
    largest = np.int32(-_LARGEST)
    for i in range(part.size):
        key = _sort_key(part[i])
        largest = key if key > largest else largest
    return largest


@inline()
def first_of_largest(row: Array) -> int:
    """Return the first index of the largest of numbers that are passed as their bits."""
    best, block = np.int32(-_LARGEST), 0
    for begin in range(0, row.size, BLOCK):
        largest = largest_key(row[begin : begin + BLOCK])
        if largest > best:
            best, block = largest, begin
    for i in range(block, min(block + BLOCK, row.size)):
        if _sort_key(row[i]) == best:
            return i
    return block


def _work(pointer: int) -> None:
    """Run on each thread of the team: take one row after the other."""
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
