"""The two sums of attention, for several query heads that read the same keys and values.

They exist for head sizes of 64 and 128; other sizes take the plain loops of `attention`.

Shapes: G heads, n slots, D head size. The functions take a tuple of int64: addresses of float32 and
int32 arrays, counts, and strides in bytes.

Runs in the scheduler process. Knows nothing of SGLang.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.ir import Value
from numba.core import cgutils

from tlt_sglang.cpu.kernels import emit
from tlt_sglang.cpu.kernels.emit import F32, I32, I64

LANES = 16
SUMS = 12 if emit.WIDE else 4
"""Vectors of `LANES` floats that are accumulated at a time."""
PREFETCH_SLOTS = 16
"""How many slots before their use keys and values are prefetched."""


def _scores(
    b: ir.IRBuilder,
    dim: int,
    heads: Value,
    queries: Value,
    base: Value,
    slots: Value,
    n: Value,
    slot_size: Value,
    out: Value,
    out_size: Value,
) -> None:
    """Emit out [G, n] = each query [G, D] times the key of each slot."""

    def emit_tile(count: int, first: Value) -> None:
        begin, results = emit.step(b, queries, first, dim * 4), b.add(out, b.mul(first, out_size))
        query = [_row(b, emit.step(b, begin, I64(head), dim * 4), dim) for head in range(count)]

        def emit_slot(j: Value, key: Value) -> None:
            keys = _row(b, key, dim)
            for head in range(count):
                score = b.fmul(query[head][0], keys[0])
                for query_part, key_part in zip(query[head][1:], keys[1:], strict=True):
                    score = emit.multiply_add(b, query_part, key_part, score)
                row = b.add(results, b.mul(out_size, I64(head)))
                b.store(emit.total(b, score), emit.at(b, row, j, 4, F32), align=4)

        _over_slots(b, dim, base, slots, n, slot_size, emit_slot)

    emit.in_tiles(b, heads, _heads_per_tile(dim), emit_tile)


def _weighted(
    b: ir.IRBuilder,
    dim: int,
    heads: Value,
    weights: Value,
    base: Value,
    slots: Value,
    n: Value,
    slot_size: Value,
    out: Value,
    weights_size: Value,
) -> None:
    """Emit out [G, D] = the sum of the values of all slots, weighted by weights [G, n]."""
    vector, parts = emit.floats(LANES), range(dim // LANES)
    zeros = ir.Constant(vector, [0.0] * LANES)

    def emit_tile(count: int, first: Value) -> None:
        begin, results = (
            b.add(weights, b.mul(first, weights_size)),
            emit.step(b, out, first, dim * 4),
        )
        totals = [[cgutils.alloca_once(b, vector) for _ in parts] for _ in range(count)]
        for pointer in (pointer for head in totals for pointer in head):
            b.store(zeros, pointer)

        def emit_slot(j: Value, value: Value) -> None:
            values = _row(b, value, dim)
            for head in range(count):
                row = b.add(begin, b.mul(weights_size, I64(head)))
                number = b.load(emit.at(b, row, j, 4, F32), align=4)
                weight = emit.broadcast(b, number, LANES)
                for pointer, numbers in zip(totals[head], values, strict=True):
                    b.store(emit.multiply_add(b, weight, numbers, b.load(pointer)), pointer)

        _over_slots(b, dim, base, slots, n, slot_size, emit_slot)
        for head in range(count):
            for part in parts:
                pointer = emit.at(b, results, head * dim + part * LANES, 4, vector)
                b.store(b.load(totals[head][part]), pointer, align=4)

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
    size: Value,
    body: Callable[[Value, Value], None],
) -> None:
    """Emit a loop over the list of slots; `body(index, address)` emits the code for one row."""

    def row(index: Value) -> Value:
        slot = b.load(emit.at(b, slots, index, 4, I32), align=4)
        return b.add(base, b.mul(b.zext(slot, I64), size))

    last = b.sub(n, I64(1))
    with cgutils.for_range(b, n, intp=I64) as loop:
        later = b.add(loop.index, I64(PREFETCH_SLOTS))
        later = b.select(b.icmp_signed("<", later, last), later, last)
        emit.prefetch(b, row(later), dim * 4)
        body(loop.index, row(loop.index))


def _for_size(generate: Callable[..., None], dim: int) -> Any:
    """Return the kernel function of `generate` for the head size `dim`."""

    def sized(b: ir.IRBuilder, *values: Any) -> None:
        generate(b, dim, *values)

    return emit.function(sized)


scores_64, scores_128 = _for_size(_scores, 64), _for_size(_scores, 128)
weighted_64, weighted_128 = _for_size(_weighted, 64), _for_size(_weighted, 128)
