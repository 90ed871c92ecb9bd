"""The two sums of attention, for several heads that read the same keys and values.

Of head sizes of 64 and 128; others take the plain loops of `attention`.

Shapes: G heads, n slots, D head size. The functions take a tuple of int64: addresses of
float32 and int32 arrays, counts, and strides in bytes.

Runs in the scheduler process. Knows nothing of SGLang.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from tlt_sglang.cpu.kernels import emit
from tlt_sglang.cpu.kernels.emit import F32, I32, I64

LANES = 16
SUMS = 12 if emit.WIDE else 4
"""Vectors of `LANES` that are added up at a time."""
AHEAD = 16
"""Slots whose keys or values are asked of the memory before their turn."""


def _scores(
    b: ir.IRBuilder,
    dim: int,
    heads: Any,
    queries: Any,
    base: Any,
    slots: Any,
    n: Any,
    slot_size: Any,
    out: Any,
    out_size: Any,
) -> None:
    """out [G, n] = each query [G, D] times the key of each slot."""

    def some(count: int, first: Any) -> None:
        begin, results = emit.step(b, queries, first, dim * 4), b.add(out, b.mul(first, out_size))
        query = [_row(b, emit.step(b, begin, I64(head), dim * 4), dim) for head in range(count)]

        def slot(j: Any, key: Any) -> None:
            keys = _row(b, key, dim)
            for head in range(count):
                score = b.fmul(query[head][0], keys[0])
                for of_query, of_key in zip(query[head][1:], keys[1:], strict=True):
                    score = emit.multiply_add(b, of_query, of_key, score)
                row = b.add(results, b.mul(out_size, I64(head)))
                b.store(emit.total(b, score), emit.at(b, row, j, 4, F32), align=4)

        _over_slots(b, dim, base, slots, n, slot_size, slot)

    emit.in_tiles(b, heads, _at_a_time(dim), some)


def _weighted(
    b: ir.IRBuilder,
    dim: int,
    heads: Any,
    weights: Any,
    base: Any,
    slots: Any,
    n: Any,
    slot_size: Any,
    out: Any,
    weights_size: Any,
) -> None:
    """out [G, D] = the sum of the values of all slots, each times its weights [G, n]."""
    vector, parts = emit.floats(LANES), range(dim // LANES)
    nothing = ir.Constant(vector, [0.0] * LANES)

    def some(count: int, first: Any) -> None:
        begin, results = (
            b.add(weights, b.mul(first, weights_size)),
            emit.step(b, out, first, dim * 4),
        )
        totals = [[cgutils.alloca_once(b, vector) for _ in parts] for _ in range(count)]
        for place in (place for head in totals for place in head):
            b.store(nothing, place)

        def slot(j: Any, value: Any) -> None:
            values = _row(b, value, dim)
            for head in range(count):
                row = b.add(begin, b.mul(weights_size, I64(head)))
                number = b.load(emit.at(b, row, j, 4, F32), align=4)
                weight = emit.everywhere(b, number, LANES)
                for place, numbers in zip(totals[head], values, strict=True):
                    b.store(emit.multiply_add(b, weight, numbers, b.load(place)), place)

        _over_slots(b, dim, base, slots, n, slot_size, slot)
        for head in range(count):
            for part in parts:
                place = emit.at(b, results, head * dim + part * LANES, 4, vector)
                b.store(b.load(totals[head][part]), place, align=4)

    emit.in_tiles(b, heads, _at_a_time(dim), some)


def _row(b: ir.IRBuilder, address: Any, dim: int) -> list[Any]:
    """The D floats at an address, as vectors."""
    vector = emit.floats(LANES)
    return [b.load(emit.at(b, address, at, 4, vector), align=4) for at in range(0, dim, LANES)]


def _at_a_time(dim: int) -> int:
    """Heads whose sums stay in registers."""
    return max(1, SUMS * LANES // dim)


def _over_slots(
    b: ir.IRBuilder,
    dim: int,
    base: Any,
    slots: Any,
    n: Any,
    size: Any,
    body: Callable[[Any, Any], None],
) -> None:
    """`body(place, address)` for each place in the list of slots, and its row's address."""

    def row(place: Any) -> Any:
        slot = b.load(emit.at(b, slots, place, 4, I32), align=4)
        return b.add(base, b.mul(b.zext(slot, I64), size))

    last = b.sub(n, I64(1))
    with cgutils.for_range(b, n, intp=I64) as loop:
        later = b.add(loop.index, I64(AHEAD))
        later = b.select(b.icmp_signed("<", later, last), later, last)
        emit.prefetch(b, row(later), dim * 4)
        body(loop.index, row(loop.index))


def _of(generate: Callable[..., None], dim: int) -> Any:
    def sized(b: ir.IRBuilder, *values: Any) -> None:
        generate(b, dim, *values)

    return emit.function(sized)


scores_64, scores_128 = _of(_scores, 64), _of(_scores, 128)
weighted_64, weighted_128 = _of(_weighted, 64), _of(_weighted, 128)
