"""The two sums of attention, for several query heads that read the same keys and values.

They exist for head sizes of 64 and 128; other sizes take the plain loops of `attention`.

Every sum is added in one order, whatever heads and slots it shares a call with. The variants
`..._warm` are for rows that are in the cache.

Shapes: G heads, n slots, D head size. The functions take a tuple of int64: addresses of float32 and
int32 arrays, counts, and strides in bytes.

Runs in the scheduler process. Knows nothing of SGLang.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from llvmlite.ir import Value
from numba.core import cgutils

from tlt_sglang.cpu.kernels import emit
from tlt_sglang.cpu.kernels.emit import F32, I32, I64

LANES = 16
SUMS = 12 if emit.WIDE else 4
"""Vectors of `LANES` floats that are accumulated at a time."""
SLOTS = 4
"""Slots whose scores are computed at a time."""
PREFETCH_SLOTS = 8
"""How many slots before their use keys and values are prefetched."""


def _scores(
    b: ir.IRBuilder,
    dim: int,
    warm: bool,
    heads: Value,
    queries: Value,
    base: Value,
    slots: Value,
    n: Value,
    last: Value,
    slot_size: Value,
    out: Value,
    out_size: Value,
) -> None:
    """Emit out [G, n] = each query [G, D] times the key of each slot."""

    def emit_tile(count: int, first: Value) -> None:
        begin, results = emit.step(b, queries, first, dim * 4), b.add(out, b.mul(first, out_size))
        query = [_row(b, emit.step(b, begin, I64(head), dim * 4), dim) for head in range(count)]

        def emit_slots(j: Value, rows: Sequence[Value]) -> None:
            products: list[list[Value]] = [[] for _ in query]
            for keys in (_row(b, row, dim) for row in rows):
                for parts, sums in zip(query, products, strict=True):
                    score = b.fmul(parts[0], keys[0])
                    for query_part, key_part in zip(parts[1:], keys[1:], strict=True):
                        score = emit.multiply_add(b, query_part, key_part, score)
                    sums.append(score)
            for head, sums in enumerate(products):
                row = b.add(results, b.mul(out_size, I64(head)))
                totals = _totals(b, sums)
                b.store(totals, emit.at(b, row, j, 4, totals.type), align=4)

        _over_slots(b, dim, base, slots, n, last, slot_size, SLOTS, warm, emit_slots)

    emit.in_tiles(b, heads, _heads_per_tile(dim), emit_tile)


def _totals(b: ir.IRBuilder, vectors: Sequence[Value]) -> Value:
    """Return the sum of each vector's floats, of one vector or of four.

    Each is added by halves, so a sum does not depend on how many there are.
    """
    if len(vectors) == 1:
        x = vectors[0]
        while x.type.count > 1:
            half = x.type.count // 2
            x = _folded(b, x, x, [*range(half)], half)
        return x
    one, two, three, four = vectors
    halves = [*range(8), *range(16, 24)]
    first, second = _folded(b, one, two, halves, 8), _folded(b, three, four, halves, 8)
    quarters = [lane + part for part in range(0, 32, 8) for lane in range(4)]
    x = _folded(b, first, second, quarters, 4)
    x = _folded(b, x, x, [lane + part for part in range(0, 16, 4) for lane in range(2)], 2)
    return _folded(b, x, x, [0, 2, 4, 6], 1)


def _folded(b: ir.IRBuilder, x: Value, y: Value, lanes: Sequence[int], distance: int) -> Value:
    """Return these lanes of x and y, one after the other, plus those `distance` further."""
    low, high = (
        b.shuffle_vector(
            x, y, ir.Constant(ir.VectorType(I32, len(lanes)), [lane + more for lane in lanes])
        )
        for more in (0, distance)
    )
    return b.fadd(low, high)


def _weighted(
    b: ir.IRBuilder,
    dim: int,
    warm: bool,
    heads: Value,
    weights: Value,
    base: Value,
    slots: Value,
    n: Value,
    last: Value,
    slot_size: Value,
    out: Value,
    weights_size: Value,
) -> None:
    """Emit out [G, D] += the values of all slots, weighted by weights [G, n], one after another."""
    vector, parts = emit.floats(LANES), range(dim // LANES)

    def emit_tile(count: int, first: Value) -> None:
        begin, results = (
            b.add(weights, b.mul(first, weights_size)),
            emit.step(b, out, first, dim * 4),
        )
        totals = [[cgutils.alloca_once(b, vector) for _ in parts] for _ in range(count)]
        places = [
            [emit.at(b, results, head * dim + part * LANES, 4, vector) for part in parts]
            for head in range(count)
        ]
        for pointers, own in zip(totals, places, strict=True):
            for pointer, place in zip(pointers, own, strict=True):
                b.store(b.load(place, align=4), pointer)

        def emit_slots(j: Value, rows: Sequence[Value]) -> None:
            values = _row(b, rows[0], dim)
            for head in range(count):
                row = b.add(begin, b.mul(weights_size, I64(head)))
                number = b.load(emit.at(b, row, j, 4, F32), align=4)
                weight = emit.broadcast(b, number, LANES)
                for pointer, numbers in zip(totals[head], values, strict=True):
                    b.store(emit.multiply_add(b, weight, numbers, b.load(pointer)), pointer)

        _over_slots(b, dim, base, slots, n, last, slot_size, 1, warm, emit_slots)
        for pointers, own in zip(totals, places, strict=True):
            for pointer, place in zip(pointers, own, strict=True):
                b.store(b.load(pointer), place, align=4)

    emit.in_tiles(b, heads, _heads_per_tile(dim), emit_tile)


def _row(b: ir.IRBuilder, address: Value, dim: int) -> list[Value]:
    """Load the D floats at an address, as vectors."""
    vector = emit.floats(LANES)
    return [b.load(emit.at(b, address, at, 4, vector), align=4) for at in range(0, dim, LANES)]


def _heads_per_tile(dim: int) -> int:
    """Return the number of heads whose sums stay in registers."""
    return max(1, SUMS * LANES // dim)


def _over_slots(
    b: ir.IRBuilder,
    dim: int,
    base: Value,
    slots: Value,
    n: Value,
    last: Value,
    size: Value,
    at_once: int,
    warm: bool,
    body: Callable[[Value, Sequence[Value]], None],
) -> None:
    """Emit a loop over the first `n` slots of a list whose last one has the index `last`.

    `body(index, addresses)` emits the code for `at_once` rows from `index` on, or for one of those
    that are left. Rows that are not warm are prefetched.
    """

    def row(index: Value) -> Value:
        slot = b.load(emit.at(b, slots, index, 4, I32), align=4)
        return b.add(base, b.mul(b.zext(slot, I64), size))

    def emit_rows(index: Value, count: int) -> None:
        indices = [b.add(index, I64(more)) for more in range(count)]
        for later in () if warm else [b.add(one, I64(PREFETCH_SLOTS)) for one in indices]:
            nearest = b.select(b.icmp_signed("<", later, last), later, last)
            emit.prefetch(b, row(nearest), dim * 4)
        body(index, [row(one) for one in indices])

    whole = b.sub(n, b.srem(n, I64(at_once)))
    with cgutils.for_range_slice(b, I64(0), whole, I64(at_once), I64) as (index, _):
        emit_rows(index, at_once)
    if at_once > 1:
        with cgutils.for_range_slice(b, whole, n, I64(1), I64) as (index, _):
            emit_rows(index, 1)


def _for_size(generate: Callable[..., None], dim: int, *, warm: bool = False) -> Any:
    """Return the kernel function of `generate` for the head size `dim`."""

    def sized(b: ir.IRBuilder, *values: Any) -> None:
        generate(b, dim, warm, *values)

    return emit.function(sized)


scores_64, scores_128 = _for_size(_scores, 64), _for_size(_scores, 128)
scores_64_warm, scores_128_warm = (_for_size(_scores, dim, warm=True) for dim in (64, 128))
weighted_64, weighted_128 = _for_size(_weighted, 64), _for_size(_weighted, 128)
weighted_64_warm, weighted_128_warm = (_for_size(_weighted, dim, warm=True) for dim in (64, 128))
