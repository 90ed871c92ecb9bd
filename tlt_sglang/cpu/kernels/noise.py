"""The tokens with the largest noisy scores, for each row of logits, on every core.

The score of token v is z(v) + g(v): the row's logit, divided by the temperature, and Gumbel noise
that a hash of (seed, position, v) gives. Its argmax is a sample of softmax(z), the Gumbel-max rule:
SGLang's `multinomial_with_seed` samples by it. Here most of the noise is never computed: g is
at most 22.2, so a block whose largest z is too far below the best score so far is left out, and
within a block only a hash above a bound can win.

Nothing is sorted for top-k, top-p and min-p: what they keep are the first of a row's tokens by
probability, of equal ones the lower id first. The token with the largest score is nearly always
among them, and one pass over the row tells, by the number of tokens before it and their
probability. If it is not, the next one is looked for among the tokens before it.

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
from tlt_sglang.cpu.kernels.truncate import limits
from tlt_sglang.cpu.kernels.vector import exp_block

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
    filters = limits(len(logits), top_ks, top_ps, min_ps)
    greedy = torch.from_numpy(filters[0] == 1)
    return _top(logits, temperatures, seeds, positions, 1, None, greedy, filters)[1].view(-1)


def top(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    k: int,
    *,
    token_ids: torch.Tensor | None = None,
    greedy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ``k`` largest noisy scores of each row and their columns, the largest first.

    Args:
        logits: ``[T, D]`` float32, not written.
        temperatures: as in `sample`.
        seeds: as in `sample`.
        positions: as in `sample`.
        k: at most D.
        token_ids: ``[D]`` int64, the tokens that the columns stand for; None for the columns.
        greedy: ``[T]`` bool, rows without noise; None for none of them.

    Returns:
        ``[T, k]`` float32 and ``[T, k]`` int64.
    """
    if greedy is None:
        greedy = torch.zeros(len(logits), dtype=torch.bool)
    return _top(logits, temperatures, seeds, positions, k, token_ids, greedy, _NO_FILTERS)


def _top(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    k: int,
    token_ids: torch.Tensor | None,
    greedy: torch.Tensor,
    filters: tuple[Array, Array, Array],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel; for arguments and result see `top`. `filters` are limits on a row, with k=1,
    or empty."""
    if logits.stride(-1) != 1 or logits.dtype is not torch.float32:
        logits = logits.float().contiguous()
    rows, width = logits.shape
    scores, columns = torch.empty(rows, k), torch.empty((rows, k), dtype=torch.int64)
    inputs = [
        temperatures.to(torch.float32).contiguous(),
        seeds.to(torch.int64).contiguous(),
        positions.to(torch.int64).contiguous(),
        _NO_IDS if token_ids is None else token_ids.contiguous(),
        greedy.contiguous(),
    ]
    pointers = [tensor.data_ptr() for tensor in (logits, *inputs, scores, columns)]
    pointers += [one.ctypes.data for one in filters]
    ids, filtered = 0 if token_ids is None else len(token_ids), len(filters[0])
    sizes = [0, rows, width, logits.stride(0), k, ids, filtered]
    data = np.array([*sizes, *pointers], np.int64)
    start(rows > 1)(_task.address, data.ctypes.data)
    return scores, columns


_NO_IDS = torch.empty(0, dtype=torch.int64)
_NO_FILTERS = np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.float32)


@inline(fastmath={"nnan", "nsz", "ninf"})
def _largest(block: Array) -> np.float32:
    largest = np.float32(-np.inf)
    for i in range(block.size):
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
    """Return a number that no hash is below whose noise is at least `needed`."""
    if needed < -6.5:  # the noise of hardly any hash is less
        return np.uint32(0)
    return np.uint32(max(math.exp(-math.exp(-needed)) * _TOP - 4.0, 0.0))


@inline()
def _hash_block(state: np.uint32, begin: int, ids: Array, hashes: Array) -> np.uint32:
    """Hash the tokens of the columns from `begin` on, and return the largest hash."""
    if ids.size > 0:
        for i in range(hashes.size):
            hashes[i] = hash_column(state, np.uint32(ids[begin + i]))
    else:
        for i in range(hashes.size):
            hashes[i] = hash_column(state, np.uint32(begin + i))
    largest = np.uint32(0)
    for i in range(hashes.size):
        largest = hashes[i] if hashes[i] > largest else largest
    return largest


@inline()
def _insert(scores: Array, columns: Array, score: float, column: int) -> None:
    """Put a score in its place among the largest; of equal ones the lower column comes first."""
    place = scores.size - 1
    while place > 0 and (
        scores[place - 1] < score or (scores[place - 1] == score and columns[place - 1] > column)
    ):
        scores[place], columns[place] = scores[place - 1], columns[place - 1]
        place -= 1
    scores[place], columns[place] = score, column


@inline()
def _top_row(
    row: Array,
    temperature: np.float32,
    state: np.uint32,
    greedy: bool,
    ids: Array,
    largest: Array,
    last: int,
    scores: Array,
    columns: Array,
) -> None:
    """Fill in the largest scores, given the largest logit of each block; if `last` is a column,
    those of the tokens that rank before it."""
    blocks, first = largest.size, 0
    for block in range(1, blocks):
        if largest[block] > largest[first]:
            first = block
    hashes = np.zeros(BLOCK, np.uint32)
    scores[:], columns[:] = -np.inf, row.size
    k = scores.size
    most = 0.0 if greedy else LARGEST_NOISE
    # The block with the largest logit first: after it most others cannot win any more.
    for turn in range(-1, blocks):
        block = first if turn < 0 else turn
        ceiling = np.float64(largest[block] / temperature)
        if turn == first or not ceiling + most >= scores[k - 1]:
            continue
        begin, end = block * BLOCK, min((block + 1) * BLOCK, row.size)
        part, least = hashes[: end - begin], np.uint32(0)
        if not greedy:
            least = _least_hash(scores[k - 1] - ceiling)
            if _hash_block(state, begin, ids, part) < least:
                continue
        for i in range(part.size):
            if part[i] < least or (last >= 0 and not _ranks_before(row, begin + i, last)):
                continue
            score = np.float64(row[begin + i] / temperature)
            if not greedy:
                score += _noise(part[i])
            column = begin + i
            if score > scores[k - 1] or (score == scores[k - 1] and column < columns[k - 1]):
                _insert(scores, columns, score, column)
                if not greedy:
                    least = _least_hash(scores[k - 1] - ceiling)


@inline()
def _ranks_before(row: Array, column: int, other: int) -> bool:
    return row[column] > row[other] or (row[column] == row[other] and column < other)


@inline(fastmath={"reassoc"})
def _sums(values: Array, before: Array) -> tuple[float, float]:
    total, part = 0.0, 0.0
    for i in range(values.size):
        total += np.float64(values[i])
        part += np.float64(values[i]) if before[i] else 0.0
    return total, part


@inline()
def _is_kept(
    row: Array,
    temperature: np.float32,
    largest: np.float32,
    column: int,
    k: int,
    p: np.float32,
    min_p: np.float32,
) -> bool:
    """Return whether the filters of a row keep a token, given the row's largest logit; a row of NaN
    keeps all."""
    if (k <= 0 or k >= row.size) and p >= 1 and min_p <= 0:
        return True
    if min_p > 0 and math.exp(np.float64(row[column] - largest) / temperature) < min_p:
        return False
    before = np.empty(BLOCK, np.bool_)
    scaled, powers, ints = (
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK, np.int32),
    )
    count, total, mass = 0, 0.0, 0.0
    value = row[column]
    for begin in range(0, row.size, BLOCK):
        block = row[begin : begin + BLOCK]
        size = block.size
        for i in range(size):
            before[i] = block[i] > value or (block[i] == value and begin + i < column)
            count += 1 if before[i] else 0
        if p < 1:
            for i in range(size):
                scaled[i] = (block[i] - largest) / temperature
            exp_block(scaled[:size], powers[:size], ints[:size])
            of_block, of_before = _sums(powers[:size], before[:size])
            total += of_block
            mass += of_before
    return not ((k > 0 and count >= k) or mass > p * total)


def _work(pointer: int) -> None:
    """Run on each thread of the team: take one row after the other."""
    data = carray(pointer, (18,), np.int64)
    rows, width, stride, k = data[1], data[2], data[3], data[4]
    temperatures = carray(pointer_to(data[8]), (rows,), np.float32)
    seeds = carray(pointer_to(data[9]), (rows,), np.uint64)
    positions = carray(pointer_to(data[10]), (rows,), np.uint64)
    ids = carray(pointer_to(data[11]), (data[5],), np.int64)
    greedy = carray(pointer_to(data[12]), (rows,), np.bool_)
    scores = carray(pointer_to(data[13]), (rows, k), np.float32)
    columns = carray(pointer_to(data[14]), (rows, k), np.int64)
    filtered = data[6]
    ks = carray(pointer_to(data[15]), (filtered,), np.int64)
    ps = carray(pointer_to(data[16]), (filtered,), np.float32)
    min_ps = carray(pointer_to(data[17]), (filtered,), np.float32)
    best, largest = np.empty(k, np.float64), np.empty((width + BLOCK - 1) // BLOCK, np.float32)
    while True:
        row = next_item(data.ctypes.data)
        if row >= rows:
            return
        logits = carray(pointer_to(data[7] + row * stride * 4), (width,), np.float32)
        state = hash_row(seeds[row], positions[row])
        for block in range(largest.size):
            largest[block] = _largest(logits[block * BLOCK : (block + 1) * BLOCK])
        temperature, last = temperatures[row], -1
        while True:
            _top_row(
                logits, temperature, state, greedy[row], ids, largest, last, best, columns[row]
            )
            last = columns[row, 0]
            if filtered == 0 or greedy[row] or last >= width:
                break
            top = _largest(largest)
            if _is_kept(logits, temperature, top, last, ks[row], ps[row], min_ps[row]):
                break
        for i in range(k):
            scores[row, i] = best[i]
            columns[row, i] = min(columns[row, i], width - 1)  # of a row of NaN


_task = cfunc(types.void(types.voidptr), nopython=True, cache=True)(_work)
