"""The token with the largest noisy score, for each row of logits, on every core.

The score of token v is z(v) + g(v): the row's logit, divided by the temperature, and Gumbel noise that
a hash of (seed, position, v) gives. Its argmax is a sample of softmax(z) (the Gumbel-max rule), and
SGLang's `multinomial_with_seed` samples by it. Here most of the noise is never computed: g is at
most 22.2, so a block whose largest z is too far below the best score so far is left out, and within
a block only a hash above a bound can win.

Runs in the scheduler process. Knows nothing of SGLang.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import carray, cfunc, types

from tlt_sglang.cpu.kernels.compile import Array, inline
from tlt_sglang.cpu.kernels.hashing import hash_column, hash_row
from tlt_sglang.cpu.kernels.team import next_item, pointer_to, start
from tlt_sglang.cpu.kernels.truncate import limits, truncate_row

BLOCK = 1024
LARGEST_NOISE = -math.log(2.0**-32)
"""No noise is larger: the hash has 32 bits."""
_TOP = np.float64(2**32 - 1)



def sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    top_ks: torch.Tensor | None = None,
    top_ps: torch.Tensor | None = None,
    min_ps: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sampled token of each row: [T] int64. It depends on nothing but the row.

    Args:
        logits: ``[T, V]`` float32, not written.
        temperatures: ``[T]`` or ``[T, 1]``, positive.
        seeds: ``[T]`` int64, taken as 64 bits.
        positions: ``[T]``, low 32 bits: of the token that the row's logits follow.
        top_ks: ``[T]``; 1 takes the largest logit, without noise. None for no limit.
        top_ps: ``[T]``, None for no limit.
        min_ps: ``[T]``, None for no limit.
    """
    rows = len(logits)
    ks, ps, mins = limits(rows, top_ks, top_ps, min_ps)
    greedy = ks == 1
    filtered = ~greedy & (((ks > 0) & (ks < logits.shape[1])) | (ps < 1) | (mins > 0))
    out = _sample(logits, temperatures, seeds, positions, greedy)
    if filtered.any():
        chosen = torch.from_numpy(np.nonzero(filtered)[0])
        warm = temperatures.view(-1, 1)[chosen]
        probs = torch.softmax(logits[chosen] / warm, dim=-1)
        values = probs.numpy()
        for place, row in enumerate(chosen.tolist()):
            truncate_row(values[place], ks[row], ps[row], mins[row])
        never = np.zeros(len(chosen), np.bool_)
        ones = torch.ones_like(warm)
        out[chosen] = _sample(probs.log_(), ones, seeds[chosen], positions[chosen], never)
    return out


def _sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    greedy: Array,
) -> torch.Tensor:
    if logits.stride(-1) != 1 or logits.dtype is not torch.float32:
        logits = logits.float().contiguous()
    rows, width = logits.shape
    out = torch.empty(rows, dtype=torch.int64)
    warm = temperatures.to(torch.float32).contiguous().view(-1)
    seed, position = seeds.to(torch.int64).contiguous(), positions.to(torch.int64).contiguous()
    flags = np.ascontiguousarray(greedy, np.int64)
    pointers = [tensor.data_ptr() for tensor in (logits, warm, seed, position)]
    data = np.array(
        [0, rows, width, logits.stride(0), *pointers, flags.ctypes.data, out.data_ptr()], np.int64
    )
    start(rows > 1)(_task.address, data.ctypes.data)
    return out


@inline(fastmath={"nnan", "nsz", "ninf"})
def _largest(block: Array) -> np.float32:
    largest = block[0]
    for i in range(1, block.size):
        largest = max(largest, block[i])
    return largest


@inline()
def _noise(hashed: np.uint32) -> float:
    """Return -log(-log(x)) for the x in [0, 1] that 32 bits stand for, as SGLang computes it."""
    x = np.float64(hashed) / _TOP
    if x <= 0.0:
        return -math.log(1.7976931348623157e308)
    return -math.log(max(-math.log(x), 2.0**-32))


@inline()
def _least_hash(needed: float) -> np.uint32:
    """Return a number below any hash whose noise is at least `needed`."""
    if needed < -6.5:  # no noise but that of very few hashes is below
        return np.uint32(0)
    return np.uint32(max(math.exp(-math.exp(-needed)) * _TOP - 4.0, 0.0))


@inline()
def _hash_block(state: np.uint32, begin: int, hashes: Array) -> np.uint32:
    """Hash the columns from `begin` on, and return the largest of their hashes."""
    for i in range(hashes.size):
        hashes[i] = hash_column(state, np.uint32(begin + i))
    largest = np.uint32(0)
    for i in range(hashes.size):
        largest = hashes[i] if hashes[i] > largest else largest
    return largest


@inline()
def _sample_row(row: Array, temperature: np.float32, state: np.uint32, greedy: bool) -> int:
    blocks = (row.size + BLOCK - 1) // BLOCK
    largest = np.empty(blocks, np.float32)
    for block in range(blocks):
        largest[block] = _largest(row[block * BLOCK : (block + 1) * BLOCK])
    first = 0
    for block in range(1, blocks):
        if largest[block] > largest[first]:
            first = block
    if greedy:
        for i in range(first * BLOCK, min((first + 1) * BLOCK, row.size)):
            if row[i] == largest[first]:
                return i
        return first * BLOCK
    hashes = np.empty(BLOCK, np.uint32)
    best, token = -np.inf, row.size
    # The block with the largest logit first: after it most others cannot win any more.
    for turn in range(-1, blocks):
        block = first if turn < 0 else turn
        if turn == first:
            continue
        ceiling = np.float64(largest[block] / temperature)
        if not ceiling + LARGEST_NOISE >= best:
            continue
        begin, end = block * BLOCK, min((block + 1) * BLOCK, row.size)
        part = hashes[: end - begin]
        least = _least_hash(best - ceiling)
        if _hash_block(state, begin, part) < least:
            continue
        for i in range(part.size):
            if part[i] < least:
                continue
            score = np.float64(row[begin + i] / temperature) + _noise(part[i])
            if score > best or (score == best and begin + i < token):
                best, token = score, begin + i
                least = _least_hash(best - ceiling)
    return token if token < row.size else first * BLOCK


def _work(pointer: int) -> None:
    """Run on each thread of the team: take one row after the other."""
    data = carray(pointer, (10,), np.int64)
    rows, width, stride = data[1], data[2], data[3]
    temperatures = carray(pointer_to(data[5]), (rows,), np.float32)
    seeds = carray(pointer_to(data[6]), (rows,), np.uint64)
    positions = carray(pointer_to(data[7]), (rows,), np.uint64)
    greedy = carray(pointer_to(data[8]), (rows,), np.int64)
    out = carray(pointer_to(data[9]), (rows,), np.int64)
    while True:
        row = next_item(data.ctypes.data)
        if row >= rows:
            return
        logits = carray(pointer_to(data[4] + row * stride * 4), (width,), np.float32)
        state = hash_row(seeds[row], positions[row])
        out[row] = _sample_row(logits, temperatures[row], state, greedy[row] != 0)


_task = cfunc(types.void(types.voidptr), nopython=True, cache=True)(_work)
