"""Top-k, top-p and min-p on probabilities, with the sets SGLang's plain sampler keeps.

All three filters look at the untruncated distribution, as in SGLang's
``top_k_top_p_min_p_sampling_from_probs_torch``: speculation and plain decoding then sample
from the same distribution. Among equal probabilities the lower token id ranks first.

Runs in the scheduler process. Knows nothing of SGLang.
"""

import torch

from tlt_sglang.cpu.kernels.compile import Array, flat, indices, inline, kernel, np

_MARGIN = 1e-6
"""Larger than the rounding of a cumulated probability, smaller than any that matters."""

_STEP = np.float32(1 / 16)
"""The factor by which each pass lowers the floor of the candidates."""


@inline(fastmath={"reassoc"})
def _mass_above(row: Array, floor: np.float32) -> tuple[int, float]:
    count, mass = 0, 0.0
    for token in range(row.size):
        above = row[token] >= floor
        count += 1 if above else 0
        mass += np.float64(row[token]) if above else 0.0
    return count, mass


@inline(fastmath={"reassoc", "nnan"})
def _largest(row: Array) -> np.float32:
    top = np.float32(0)
    for token in range(row.size):
        top = max(top, row[token])
    return top


@inline()
def _candidates(row: Array, top: np.float32, k: int, p: np.float32, least: np.float32) -> Array:
    """Return ascending ids that include every token that may be kept."""
    # Lower the floor until the tokens above it are enough for each filter.
    floor = top
    while True:
        floor = max(floor * _STEP, least)
        if floor < np.float32(1e-12):
            floor = np.float32(0)
        count, mass = _mass_above(row, floor)
        if floor <= least or count >= k or mass > p + _MARGIN:
            break
    tokens = np.empty(count, np.int64)
    cursor = 0
    for token in range(row.size):
        if row[token] >= floor:
            tokens[cursor] = token
            cursor += 1
    return tokens[:cursor]


@inline()
def _descending(values: Array) -> Array:
    """Return the stable descending order of non-negative values, by a radix sort on their bits."""
    keys = ~values.view(np.uint32)  # non-negative floats order like their bits
    order, other = np.arange(keys.size), np.empty(keys.size, np.int64)
    for digit in range(3):
        shift = np.uint32(11 * digit)
        starts = np.zeros(2049, np.int64)
        for i in range(keys.size):
            starts[((keys[i] >> shift) & np.uint32(2047)) + 1] += 1
        for bucket in range(2048):
            starts[bucket + 1] += starts[bucket]
        for i in range(keys.size):
            bucket = (keys[order[i]] >> shift) & np.uint32(2047)
            other[starts[bucket]] = order[i]
            starts[bucket] += 1
        order, other = other, order
    return order


@inline()
def truncate_row(row: Array, k: int, p: np.float32, min_p: np.float32) -> None:
    """Truncate and renormalise one row [vocab] in place; k <= 0, p = 1, min_p = 0 keep all."""
    if k <= 0 or k >= row.size:
        k = row.size
    if k == row.size and p >= 1 and min_p <= 0:
        return
    top = _largest(row)
    if not top > 0:
        return
    least = top * min_p
    tokens = _candidates(row, top, k, p, least)
    values = row[tokens]
    order = _descending(values)
    mass, kept = 0.0, 0.0
    for rank in range(order.size):
        value = values[order[rank]]
        mass += value
        # The plain sampler's float32 arithmetic: the boundary falls on the same token.
        before = np.float32(mass) - value
        if rank >= k or (p < 1 and before > p) or value < least:
            values[order[rank]] = 0
        else:
            kept += value
    row[:] = 0
    for i in range(tokens.size):
        row[tokens[i]] = np.float32(values[i] / kept)


@kernel("void(float32[:, ::1], int64[::1], float32[::1], float32[::1])")
def _truncate(probs: Array, ks: Array, ps: Array, min_ps: Array) -> None:
    for row in range(probs.shape[0]):
        truncate_row(probs[row], ks[row], ps[row], min_ps[row])


def truncate_probs(
    probs: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    need_top_k: bool,
    need_top_p: bool,
    need_min_p: bool,
) -> torch.Tensor:
    """Drop the tokens that top-k, top-p or min-p exclude and renormalise, in place.

    Args:
        probs: ``[rows, vocab]`` float32, written. Rows that exclude nothing stay as they are.
        top_ks: ``[rows]``, or one for each of equally many consecutive rows (a request's
            nodes); at least the vocabulary's size, or not positive, for no limit.
        top_ps: like ``top_ks``; 1 for no limit.
        min_ps: like ``top_ks``; 0 for no limit.
        need_top_k: whether ``top_ks`` applies.
        need_top_p: whether ``top_ps`` applies.
        need_min_p: whether ``min_ps`` applies.

    Returns:
        ``probs``.
    """
    if not (need_top_k or need_top_p or need_min_p):
        return probs
    flat(probs, torch.float32, "probs")
    _truncate(
        probs.numpy(),
        *limits(
            probs.shape[0],
            top_ks if need_top_k else None,
            top_ps if need_top_p else None,
            min_ps if need_min_p else None,
        ),
    )
    return probs


def top_k_renorm_prob(probs: torch.Tensor, top_ks: torch.Tensor) -> torch.Tensor:
    """Return a renormalised copy of ``[rows, vocab]`` with the ``top_ks`` likeliest tokens."""
    return truncate_probs(_copy(probs), top_ks, top_ks, top_ks, True, False, False)


def top_p_renorm_prob(probs: torch.Tensor, top_ps: torch.Tensor) -> torch.Tensor:
    """Return a renormalised copy with the likeliest tokens until their mass exceeds ``top_ps``."""
    return truncate_probs(_copy(probs), top_ps, top_ps, top_ps, False, True, False)


def min_p_renorm_prob(probs: torch.Tensor, min_ps: torch.Tensor) -> torch.Tensor:
    """Return a renormalised copy with tokens of at least ``min_ps`` times the largest."""
    return truncate_probs(_copy(probs), min_ps, min_ps, min_ps, False, False, True)


def limits(
    rows: int,
    top_ks: torch.Tensor | None,
    top_ps: torch.Tensor | None,
    min_ps: torch.Tensor | None,
) -> tuple[Array, Array, Array]:
    """Return the limits of each row as `truncate_row` takes them; None stands for no limit."""
    return (
        np.zeros(rows, np.int64) if top_ks is None else _per_row(indices(top_ks), rows),
        np.ones(rows, np.float32) if top_ps is None else _per_row(_floats(top_ps), rows),
        np.zeros(rows, np.float32) if min_ps is None else _per_row(_floats(min_ps), rows),
    )


def _copy(probs: torch.Tensor) -> torch.Tensor:
    return probs.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _floats(tensor: torch.Tensor) -> Array:
    return tensor.to(torch.float32).contiguous().numpy().reshape(-1)


def _per_row(values: Array, rows: int) -> Array:
    if values.size == rows:
        return values
    if values.size == 0 or rows % values.size:
        raise ValueError(f"{values.size} limits cannot be divided over {rows} rows")
    return np.repeat(values, rows // values.size)
