"""The Gumbel-max rule on CUDA: noisy scores, and the token with the largest one of each row.

The score of token v is z(v) + g(v): the row's logit, divided by the temperature, and the noise that
a hash of (seed, position, v) gives. Hash and noise are those of SGLang's `multinomial_with_seed`,
which is the reference that the tests compare with; the CPU engine's kernel is `cpu.kernels.noise`,
which also tells how the filters work without sorting. Nothing here waits for the device.

Runs in the scheduler process.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024
SPAN = 4 * BLOCK
"""Columns of a row that one program looks at."""
WIDE_BLOCK = 4096
"""Columns at once where one program looks at a whole row."""
LARGEST_NOISE = tl.constexpr(22.19)
"""No noise is as large: the hash has 32 bits, and -log(2 ** -32) is 22.18."""
_LEAST_NOISE = tl.constexpr(-709.782712893384)
"""Noise of the hash 0, whose logarithm SGLang replaces by the least float64."""


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
        logits: ``[T, V]`` floats, not written.
        temperatures: ``[T]`` or ``[T, 1]``, positive.
        seeds: ``[T]`` int64, taken as 64 bits.
        positions: ``[T]``, low 32 bits: of the token that the row's logits follow.
        top_ks: ``[T]``; 1 takes the largest logit, without noise. None for no limit.
        top_ps: ``[T]``, None for no limit.
        min_ps: ``[T]``, None for no limit.
    """
    all_limits, filters = (top_ks, top_ps, min_ps), None
    if any(limits is not None for limits in all_limits):
        filters = torch.zeros((3, len(logits)), dtype=torch.float64, device=logits.device)
        filters[1] = 1.0
        for row, limits in zip(filters, all_limits, strict=True):
            if limits is not None:
                row.copy_(limits.view(-1))
    greedy = None if top_ks is None else top_ks.view(-1) == 1
    return argmax(logits, temperatures, seeds, positions, filters=filters, greedy=greedy)


def argmax(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    *,
    filters: torch.Tensor | None = None,
    greedy: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the column with the largest noisy score of each row, the lowest of equal ones.

    Args:
        logits: ``[T, D]`` floats.
        temperatures: as in `sample`.
        seeds: as in `sample`.
        positions: as in `sample`.
        filters: ``[3, T]`` float64, each row's top-k (0 for no limit), top-p and min-p; None for
            none. They look at the unfiltered distribution, as SGLang's
            `top_k_top_p_min_p_sampling_from_probs_torch` does.
        greedy: ``[T]`` bool, rows without noise; None for none of them.
        token_ids: ``[D]`` int64, the tokens that the columns stand for; None for the columns.

    Returns:
        ``[T]`` int64.
    """
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    rows, width = logits.shape
    parts = triton.cdiv(width, SPAN)
    # Score, column, logit and largest logit of each part of a row.
    bests = torch.empty((4, rows, parts), dtype=torch.float64, device=logits.device)
    columns = torch.empty(rows, dtype=torch.int64, device=logits.device)
    tables = (
        logits,
        temperatures.float().contiguous(),
        seeds.contiguous(),
        positions.contiguous(),
        logits if greedy is None else greedy.contiguous(),
        logits if token_ids is None else token_ids.contiguous(),
        bests,
    )
    sizes = rows, width, logits.stride(0)
    flags = {"MAY_BE_GREEDY": greedy is not None, "RENAMED": token_ids is not None}
    _bests[(rows, parts)](*tables, *sizes, **flags, BLOCK=BLOCK, SPAN=SPAN)
    is_filtered = filters is not None
    _choice[(rows,)](
        *tables,
        filters if is_filtered else logits,
        columns,
        *sizes,
        parts,
        **flags,
        FILTERED=is_filtered,
        PARTS=triton.next_power_of_2(parts),
        BLOCK=WIDE_BLOCK,
        num_warps=8 if is_filtered else 1,
    )
    return columns


def scores(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    greedy: torch.Tensor,
    token_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the noisy scores of each row, [T, D] float32; arguments as in `argmax`.

    Those of greedy rows are their logits.
    """
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    rows, width = logits.shape
    noisy = torch.empty((rows, width), dtype=torch.float32, device=logits.device)
    _scores[(rows, triton.cdiv(width, BLOCK))](
        logits,
        temperatures.float().contiguous(),
        seeds.contiguous(),
        positions.contiguous(),
        greedy.contiguous(),
        logits if token_ids is None else token_ids.contiguous(),
        noisy,
        width,
        logits.stride(0),
        RENAMED=token_ids is not None,
        BLOCK=BLOCK,
    )
    return noisy


@triton.jit
def _mix(state, block):  # type: ignore[no-untyped-def]
    block *= 0xCC9E2D51
    block = ((block << 15) | (block >> 17)) * 0x1B873593
    state ^= block
    state = (state << 13) | (state >> 19)
    return state * 5 + 0xE6546B64


@triton.jit
def _hash(seed, position, tokens):  # type: ignore[no-untyped-def]
    """Return MurmurHash3 of (seed, position, token), 32 bits of each of the tokens."""
    nothing = tl.zeros_like(tokens)
    state = _mix(nothing, nothing + (seed & 0xFFFFFFFF).to(tl.uint32))
    state = _mix(state, nothing + (seed >> 32).to(tl.uint32))
    state = _mix(state, nothing + position)
    state = _mix(state, tokens) ^ 16
    state = (state ^ (state >> 16)) * 0x85EBCA6B
    state = (state ^ (state >> 13)) * 0xC2B2AE35
    return state ^ (state >> 16)


@triton.jit
def _noise(hashed):  # type: ignore[no-untyped-def]
    """Return -log(-log(x)) in float64 for the x in [0, 1] that 32 bits stand for."""
    # Constants in float64 from the start: as literals they might be rounded to float32.
    x = hashed.to(tl.float64) / tl.full(hashed.shape, 4294967295, tl.uint32).to(tl.float64)
    spacing = tl.full(hashed.shape, 2.3283064365386963e-10, tl.float64)  # 2 ** -32
    noise = -tl.log(tl.maximum(-tl.log(tl.where(hashed == 0, 1.0, x)), spacing))
    return tl.where(hashed == 0, tl.full(hashed.shape, _LEAST_NOISE, tl.float64), noise)


@triton.jit
def _row(  # type: ignore[no-untyped-def]
    temperatures, seeds, positions, greedy, row, MAY_BE_GREEDY: tl.constexpr
):
    """Return temperature, seed, position of a row, and whether it has no noise."""
    noiseless = False
    if MAY_BE_GREEDY:
        noiseless = tl.load(greedy + row).to(tl.int1)
    seed = tl.load(seeds + row).to(tl.uint64)
    return tl.load(temperatures + row), seed, tl.load(positions + row).to(tl.uint32), noiseless


@triton.jit
def _best(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    seed,
    position,
    noiseless,
    token_ids,
    column,
    last_z,
    last,
    begin,
    end,
    width,
    MAY_BE_GREEDY: tl.constexpr,
    RENAMED: tl.constexpr,
    BEHIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the best of the columns from `begin` to `end`: score, column, logit; and the largest
    logit. If BEHIND, only of those that rank behind the column `last`; `column` if there is none.
    """
    best = tl.full([], float("-inf"), tl.float64)
    best_z = tl.full([], float("-inf"), tl.float32)
    largest_z = tl.full([], float("-inf"), tl.float32)
    for start in range(begin, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        z = tl.load(logits + columns, mask=inside, other=float("-inf"))
        z = tl.div_rn(z.to(tl.float32), temperature)
        largest_z = tl.maximum(tl.max(z, axis=0), largest_z)
        if BEHIND:
            before = (z > last_z) | ((z == last_z) & (columns < last))
            z = tl.where(before, z, float("-inf"))
        # Where the largest noise is not enough, none is computed.
        if tl.max(z, axis=0).to(tl.float64) + LARGEST_NOISE > best:
            tokens = columns.to(tl.uint32)
            if RENAMED:
                tokens = tl.load(token_ids + columns, mask=inside, other=0).to(tl.uint32)
            noise = _noise(_hash(seed, position, tokens))
            if MAY_BE_GREEDY:
                noise = tl.where(noiseless, 0.0, noise)
            scores = z.to(tl.float64) + noise
            largest = tl.max(scores, axis=0)
            first = tl.min(tl.where(scores == largest, columns, width), axis=0)
            if largest > best:
                column = first.to(tl.int64)
                best_z = tl.max(tl.where(columns == first, z, float("-inf")), axis=0)
            best = tl.maximum(largest, best)
    return best, column, best_z, largest_z


@triton.jit(do_not_specialize=["rows"])  # Triton makes a 1 a Python number, which has no `to`
def _bests(  # type: ignore[no-untyped-def]
    logits,
    temperatures,
    seeds,
    positions,
    greedy,
    token_ids,
    bests,
    rows,
    width,
    stride,
    MAY_BE_GREEDY: tl.constexpr,
    RENAMED: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Write the best of each part of a row."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature, seed, position, noiseless = _row(
        temperatures, seeds, positions, greedy, row, MAY_BE_GREEDY
    )
    begin = part * SPAN
    best, column, best_z, largest_z = _best(
        logits + row * stride,
        temperature,
        seed,
        position,
        noiseless,
        token_ids,
        tl.full([], 0, tl.int64) + begin,
        0.0,
        0,
        begin,
        tl.minimum(begin + SPAN, width),
        width,
        MAY_BE_GREEDY,
        RENAMED,
        False,
        BLOCK,
    )
    size = rows.to(tl.int64) * parts
    place = bests + row * parts + part
    tl.store(place, best)
    tl.store(place + size, column.to(tl.float64))
    tl.store(place + 2 * size, best_z.to(tl.float64))
    tl.store(place + 3 * size, largest_z.to(tl.float64))


@triton.jit(do_not_specialize=["rows"])  # Triton makes a 1 a Python number, which has no `to`
def _choice(  # type: ignore[no-untyped-def]
    logits,
    temperatures,
    seeds,
    positions,
    greedy,
    token_ids,
    bests,
    filters,
    chosen,
    rows,
    width,
    stride,
    parts,
    MAY_BE_GREEDY: tl.constexpr,
    RENAMED: tl.constexpr,
    FILTERED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the best column of each row that its filters keep."""
    row = tl.program_id(0).to(tl.int64)
    size = rows.to(tl.int64) * parts
    places = tl.arange(0, PARTS)
    there = places < parts
    places = bests + row * parts + places
    scores = tl.load(places, mask=there, other=float("-inf"))
    columns = tl.load(places + size, mask=there, other=0.0)
    best = tl.max(scores, axis=0)
    first = tl.min(tl.where((scores == best) & there, columns, width), axis=0)
    column = first.to(tl.int64)
    if FILTERED:
        temperature, seed, position, noiseless = _row(
            temperatures, seeds, positions, greedy, row, MAY_BE_GREEDY
        )
        zs = tl.load(places + 2 * size, mask=there, other=float("-inf"))
        z = tl.max(tl.where(columns == first, zs, float("-inf")), axis=0).to(tl.float32)
        zs = tl.load(places + 3 * size, mask=there, other=float("-inf"))
        largest_z = tl.max(zs, axis=0).to(tl.float32)
        logits += row * stride
        top_k = tl.load(filters + row)
        top_p, min_p = tl.load(filters + rows + row), tl.load(filters + 2 * rows + row)
        # While the filters drop the best one, it is looked for among those that rank before it.
        searching = best > float("-inf")
        while searching:
            searching = _is_dropped(
                logits, temperature, z, column, largest_z, width, top_k, top_p, min_p, BLOCK
            )
            if searching:
                best, column, z, _ = _best(
                    logits,
                    temperature,
                    seed,
                    position,
                    noiseless,
                    token_ids,
                    column,
                    z,
                    column,
                    0,
                    width,
                    width,
                    MAY_BE_GREEDY,
                    RENAMED,
                    True,
                    BLOCK,
                )
                searching = best > float("-inf")
    tl.store(chosen + row, column)


@triton.jit
def _is_dropped(  # type: ignore[no-untyped-def]
    logits, temperature, z_of, column, largest_z, width, top_k, top_p, min_p, BLOCK: tl.constexpr
):
    """Return whether the filters of a row drop the token of a column, with logit `z_of`."""
    dropped = False
    if ((top_k > 0) & (top_k < width)) | (top_p < 1) | (min_p > 0):
        count = tl.full([], 0, tl.int32)
        total = tl.full([], 0, tl.float64)
        mass = tl.full([], 0, tl.float64)
        for begin in range(0, width, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            z = tl.load(logits + columns, mask=columns < width, other=float("-inf"))
            z = tl.div_rn(z.to(tl.float32), temperature)
            before = (z > z_of) | ((z == z_of) & (columns < column))
            weights = tl.exp(z - largest_z).to(tl.float64)
            count += tl.sum(before.to(tl.int32), axis=0)
            total += tl.sum(weights, axis=0)
            mass += tl.sum(tl.where(before, weights, 0.0), axis=0)
        dropped = (top_p < 1) & (mass > top_p * total)
        dropped = dropped | ((top_k > 0) & (count >= top_k))
        dropped = dropped | (tl.exp((z_of - largest_z).to(tl.float64)) < min_p)
    return dropped


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    logits,
    temperatures,
    seeds,
    positions,
    greedy,
    token_ids,
    noisy,
    width,
    stride,
    RENAMED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    z = tl.load(logits + row * stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
    if tl.load(greedy + row).to(tl.int1) == 0:
        tokens = columns.to(tl.uint32)
        if RENAMED:
            tokens = tl.load(token_ids + columns, mask=inside, other=0).to(tl.uint32)
        seed = tl.load(seeds + row).to(tl.uint64)
        noise = _noise(_hash(seed, tl.load(positions + row).to(tl.uint32), tokens))
        z = tl.div_rn(z, tl.load(temperatures + row))
        z = (z.to(tl.float64) + noise).to(tl.float32)
    tl.store(noisy + row * width + columns, z, mask=inside)
